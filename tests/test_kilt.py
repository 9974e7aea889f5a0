"""KILT records: what is parsed, and the reason that a bad one gets."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskspec.data.kilt import Page, Provenance, Query, parse_page_line, parse_query_line
from taskspec.errors import DataError

PLACE = {
    "wikipedia_id": "12",
    "title": "Pluto",
    "start_paragraph_id": 1,
    "start_character": 0,
    "end_paragraph_id": 3,
    "end_character": 9,
}
QUERY = {"id": "q1", "input": "who found Pluto", "output": [{"answer": "Tombaugh", "provenance": [PLACE]}], "meta": {}}
PAGE = {"_id": "12", "wikipedia_id": "12", "wikipedia_title": "Pluto", "text": ["Pluto", "A planet."], "anchors": []}


def line(record, **changes):
    return json.dumps({key: value for key, value in (record | changes).items() if value is not ...}).encode()


def with_place(**changes):
    place = {key: value for key, value in (PLACE | changes).items() if value is not ...}
    return line(QUERY, output=[{"provenance": [place]}])


def test_a_record_of_a_task_file_is_its_input_and_its_evidence_sets():
    output = [
        {"answer": "no provenance"},
        {"answer": "two pages", "provenance": [PLACE, {"wikipedia_id": "7", "title": "Ceres"}]},
        {"answer": "empty", "provenance": []},
        {"provenance": [{"wikipedia_id": "7", "start_paragraph_id": 4}]},
    ]
    assert parse_query_line(line(QUERY, output=output)) == Query(
        "q1",
        "who found Pluto",
        [[Provenance("12", 1, 3), Provenance("7", None, None)], [Provenance("7", 4, 4)]],
    )


def test_a_record_without_provenance_has_no_evidence():
    for output in ([], [{"answer": "Tombaugh"}, {"provenance": []}]):
        assert parse_query_line(line(QUERY, output=output)) == Query("q1", "who found Pluto", [])


def test_an_unknown_paragraph_may_be_missing_or_null_or_minus_one():
    for value in (..., None, -1):
        query = parse_query_line(with_place(start_paragraph_id=value, end_paragraph_id=value))
        assert query.evidence == [[Provenance("12", None, None)]]


def test_a_page_keeps_its_paragraphs():
    assert parse_page_line(line(PAGE)) == Page("12", "Pluto", ["Pluto", "A planet."])


def test_a_byte_order_mark_and_windows_line_ends_are_no_damage():
    assert parse_query_line(b"\xef\xbb\xbf" + line(QUERY) + b"\r\n").query_id == "q1"


@pytest.mark.parametrize(
    ("damaged", "reason"),
    [
        (b"", "is an empty line"),
        (b" \t\r\n", "is an empty line"),
        (line(QUERY).replace(b"who", b"wh\xff"), r"is not UTF-8 \(byte 0xff at position 25\)"),
        (line(QUERY)[:40], r"is not JSON \(.* at position \d+\)"),
        (line(QUERY, meta=float("nan")), r"is not JSON \(NaN is no JSON value\)"),
        (b"[" * 100_000, r"is not JSON \(.*recursion.*\)"),
        (b'{"id": ' + b"1" * 5000 + b"}", r"is not JSON \(.*digits.*\)"),
        (b"[1, 2]", r"is no object \(is list\)"),
        (b"null", r"is no object \(is null\)"),
        (line(QUERY, id=...), "has no 'id'"),
        (line(QUERY, id=7), r"'id' must be a text \(is number\)"),
        (line(QUERY, input=...), "has no 'input'"),
        (line(QUERY, input=True), r"'input' must be a text \(is boolean\)"),
        (line(QUERY, input=" \n"), "'input' is empty"),
        (line(QUERY, input="\ud800"), r"'input' is not Unicode \(half a surrogate pair at position 0\)"),
        (line(QUERY, output=...), "has no 'output'"),
        (line(QUERY, output={}), r"'output' must be a list \(is object\)"),
        (line(QUERY, output=["Tombaugh"]), r"an output is no object \(output 0 is text\)"),
        (line(QUERY, output=[{"provenance": None}]), r"'provenance' must be a list \(is null\)"),
        (
            line(QUERY, output=[{}, {"provenance": [1]}]),
            r"a provenance is no object \(output 1, provenance 0 is number\)",
        ),
        (with_place(wikipedia_id=...), r"a provenance has no 'wikipedia_id' \(output 0, provenance 0\)"),
        (with_place(wikipedia_id=12), r"'wikipedia_id' must be a text \(is number\)"),
        (with_place(wikipedia_id=""), "'wikipedia_id' is empty"),
        (with_place(start_paragraph_id="1"), r"'start_paragraph_id' must be a whole number \(is text\)"),
        (with_place(end_paragraph_id=2**31), r"'end_paragraph_id' must be a whole number \(is number\)"),
        (with_place(end_paragraph_id=0), r"ends before it starts \(output 0, provenance 0: paragraphs 1 to 0\)"),
    ],
)
def test_a_damaged_query_gets_its_reason(damaged, reason):
    with pytest.raises(DataError, match=rf"{reason}$"):
        parse_query_line(damaged)


@pytest.mark.parametrize(
    ("damaged", "reason"),
    [
        (line(PAGE, wikipedia_id=...), "has no 'wikipedia_id'"),
        (line(PAGE, wikipedia_title="\ud800"), r"'wikipedia_title' is not Unicode \(half a surrogate pair .*\)"),
        (line(PAGE, text=...), "has no 'text'"),
        (line(PAGE, text="A planet."), r"'text' must be a list \(is text\)"),
        (line(PAGE, text=[]), "'text' is empty"),
        (line(PAGE, text=["Pluto", None]), r"'text' must be a list of texts \(item 1 is null\)"),
        (line(PAGE, text=["Pluto", "\udfff"]), r"'text' is not Unicode \(half a surrogate pair .*\)"),
    ],
)
def test_a_damaged_page_gets_its_reason(damaged, reason):
    with pytest.raises(DataError, match=rf"^{reason}$"):
        parse_page_line(damaged)


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_else(content):
    for parse in (parse_query_line, parse_page_line):
        with pytest.raises(DataError):
            parse(content)


@given(st.data())
def test_what_is_parsed_can_be_written_as_utf_8(data):
    cut = data.draw(st.integers(0, len(line(QUERY)) - 1))
    damaged = line(QUERY)[:cut] + data.draw(st.binary(max_size=3)) + line(QUERY)[cut:]
    try:
        query = parse_query_line(damaged)
    except DataError:
        return
    json.dumps(query, ensure_ascii=False).encode()
