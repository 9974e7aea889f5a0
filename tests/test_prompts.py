"""Prompts, lengths and which part of a text stays."""

import numpy as np
import pytest

from taskspec.errors import ConfigError, RequestError
from taskspec.model.contract import ContractTask
from taskspec.model.encoder import train_tokenizer
from taskspec.model.prompts import TextTokenizer, passage_text, query_text
from taskspec.sections import Prompts, Scratch

WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu".split()
MENTION = "alpha beta gamma delta [START_ENT] kappa [END_ENT] epsilon zeta eta theta iota"


def task(name: str, keep: str = "beginning", length: int = 32) -> ContractTask:
    return ContractTask(name=name, prompt=name, max_query_tokens=length, keep=keep)


@pytest.fixture(scope="module")
def tokenizer():
    """Every word is one piece."""
    texts = [" ".join(WORDS), "nq el wow [START_ENT] [END_ENT] Title: Text:"] * 200
    return train_tokenizer(texts, Scratch(vocabulary=600))


def text_of(tokenizer, row: np.ndarray) -> str:
    return tokenizer.decode(row, skip_special_tokens=True)


def test_prompt_and_text_are_tokenized_as_one_string(tokenizer):
    prompts = Prompts()
    nq = task("nq")
    tokens = TextTokenizer(tokenizer, prompts, [nq], 32).queries("nq", ["beta gamma"])
    whole = query_text(prompts, nq, "beta gamma")
    assert whole == "nq <extra_id_1> beta gamma"
    assert tokens.ids_BL[0].tolist() == tokenizer(whole)["input_ids"]


def test_passage_prompt(tokenizer):
    assert passage_text(Prompts(), "Faust {x}", "a {text}") == "Title: Faust {x} Text: a {text}"
    cut = TextTokenizer(tokenizer, Prompts(), [task("nq")], 8).passages(["beta"], [" ".join(WORDS)])
    assert cut.ids_BL.shape == (1, 8)
    assert cut.truncated_B.tolist() == [True]
    assert cut.ids_BL[0, -1] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("keep", "text", "stays"),
    [
        ("beginning", " ".join(WORDS), "alpha beta"),
        ("end", " ".join(WORDS), "lambda mu"),
        ("mention", MENTION, "[START_ENT] kappa [END_ENT]"),
    ],
)
def test_the_configured_part_of_a_long_input_stays(tokenizer, keep, text, stays):
    whole = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    lengths = TextTokenizer(tokenizer, Prompts(), [task("el", keep, 64)], 32).queries("el", [""])
    room = len(tokenizer(stays, add_special_tokens=False)["input_ids"]) + 2
    assert room < whole
    limited = task("el", keep, lengths.ids_BL.shape[1] + room)
    tokens = TextTokenizer(tokenizer, Prompts(), [limited], 32).queries("el", [text, stays])
    assert tokens.ids_BL.shape[1] == limited.max_query_tokens
    assert stays in text_of(tokenizer, tokens.ids_BL[0])
    assert text_of(tokenizer, tokens.ids_BL[0]).startswith("el")
    assert tokens.truncated_B.tolist() == [True, False]


def test_a_mention_longer_than_the_window_keeps_its_beginning(tokenizer):
    text = "[START_ENT] " + " ".join(WORDS) + " [END_ENT]"
    room = TextTokenizer(tokenizer, Prompts(), [task("el")], 32).queries("el", [""]).ids_BL.shape[1] + 6
    tokens = TextTokenizer(tokenizer, Prompts(), [task("el", "mention", room)], 32).queries("el", [text])
    assert text_of(tokenizer, tokens.ids_BL[0]).startswith("el [START")


def test_shorter_rows_are_padded_on_the_right(tokenizer):
    tokens = TextTokenizer(tokenizer, Prompts(), [task("nq")], 32).queries("nq", ["beta", "beta gamma delta"])
    lengths = tokens.mask_BL.sum(1)
    assert lengths[0] < lengths[1] == tokens.ids_BL.shape[1]
    assert set(tokens.ids_BL[0, lengths[0] :]) == {tokenizer.pad_token_id}


def test_queries_of_several_tasks_are_those_of_each_by_itself(tokenizer):
    texts = TextTokenizer(tokenizer, Prompts(), [task("nq"), task("wow", "end", length=16)], 32)
    tasks, queries = ["wow", "nq", "wow"], [" ".join(WORDS), "beta", "gamma delta"]
    together = texts.queries_by_task(tasks, queries)
    assert together.truncated_B.tolist() == [True, False, False]
    for number, (own, query) in enumerate(zip(tasks, queries, strict=True)):
        alone = texts.queries(own, [query]).ids_BL[0]
        assert together.ids_BL[number, together.mask_BL[number] == 1].tolist() == alone.tolist()


def test_an_unknown_task_is_answered_with_the_known_ones(tokenizer):
    with pytest.raises(RequestError, match="unknown task 'qa'; known: nq, wow") as error:
        TextTokenizer(tokenizer, Prompts(), [task("nq"), task("wow")], 32).queries("qa", ["beta"])
    assert error.value.param == "task"


def test_a_prompt_that_leaves_no_room_is_refused(tokenizer):
    crowded = ContractTask(name="nq", prompt=" ".join(WORDS), max_query_tokens=6, keep="end")
    with pytest.raises(ConfigError, match=r"tasks\.nq\.max_query_tokens is 6 but prompt and special tokens take"):
        TextTokenizer(tokenizer, Prompts(), [crowded], 32)
