"""Cutting pages, and which passages are gold."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from taskspec.data.kilt import Provenance
from taskspec.data.passages import Passage, cut_page, gold_passages

paragraphs = st.lists(st.text("ab \n", max_size=60), max_size=12).map(lambda found: ["title", *found])


def test_a_page_by_hand():
    page = ["Pluto", "one two three", "", "four five", "six seven"]
    assert cut_page(page, 3) == [Passage("one two three", 1, 1), Passage("four five six seven", 3, 4)]
    assert cut_page(page, 100) == [Passage("one two three four five six seven", 1, 4)]


def test_headings_and_lists_lose_their_markers_only():
    page = ["Pluto", "Section::::History:Name.", "BULLET::::- First item", "BULLET::::2. second", "a Section:::: kept"]
    (passage,) = cut_page(page, 100)
    assert passage.text == "History:Name. First item 2. second a Section:::: kept"


def test_a_page_without_text_is_one_passage_without_text():
    assert cut_page(["Pluto"], 100) == cut_page(["Pluto", " ", "Section::::"], 100) == [Passage("", 0, 0)]


@given(paragraphs, st.integers(1, 20))
def test_passages_hold_every_word_once_and_differ_by_one_word_at_most(page, passage_words):
    passages = cut_page(page, passage_words)
    words = [word for paragraph in page[1:] for word in paragraph.split()]
    assert [word for passage in passages for word in passage.text.split()] == words
    lengths = [len(passage.text.split()) for passage in passages]
    assert max(lengths) - min(lengths) <= 1
    assert len(passages) == max(1, round(len(words) / passage_words))


@given(paragraphs, st.integers(1, 20))
def test_a_passage_knows_the_paragraphs_of_its_first_and_last_word(page, passage_words):
    owners = [number for number, paragraph in enumerate(page) if number for _ in paragraph.split()]
    start = 0
    for passage in cut_page(page, passage_words) if owners else []:
        end = start + len(passage.text.split())
        assert (passage.start_paragraph, passage.end_paragraph) == (owners[start], owners[end - 1])
        start = end


SPANS_N2 = np.array([[1, 2], [2, 2], [2, 5], [7, 9]])


def test_gold_passages_share_a_paragraph_with_the_provenance():
    assert gold_passages(SPANS_N2, Provenance("12", 2, 2)) == [0, 1, 2]
    assert gold_passages(SPANS_N2, Provenance("12", 1, 1)) == [0]
    assert gold_passages(SPANS_N2, Provenance("12", 4, 8)) == [2, 3]


def test_without_a_paragraph_or_with_one_that_has_no_words_the_first_passage_is_gold():
    for start in (None, 0, 6, 99):
        assert gold_passages(SPANS_N2, Provenance("12", start, start)) == [0]
