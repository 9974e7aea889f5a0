"""Texts to token ids, prompts included: the only place where prompts are applied and texts are cut.

Path: records → [here] → encoder.  B queries or passages, L tokens. Training, mining, evaluation and serving all come
through `TextTokenizer`, so a query is the same sequence of tokens everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from taskspec.errors import ConfigError, RequestError
from taskspec.model.contract import ContractTask
from taskspec.sections import Prompts

MENTION_START, MENTION_END = "[START_ENT]", "[END_ENT]"


def query_text(prompts: Prompts, task: ContractTask, text: str) -> str:
    """The query that a task's input becomes, uncut. The text stands last (`Prompts` sees to it)."""
    return prompts.query.format(prompt=task.prompt, text=text)


def passage_text(prompts: Prompts, title: str, text: str) -> str:
    """The text that a passage is embedded as, uncut."""
    return prompts.passage.format(title=title, text=text)


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids of several texts, padded on the right to the longest."""

    ids_BL: np.ndarray
    """int64."""
    mask_BL: np.ndarray
    """int64: 1 for a token, 0 for padding."""
    truncated_B: np.ndarray
    """bool: something was cut."""


class TextTokenizer:
    """A Hugging Face tokenizer with the prompts and lengths of the tasks.

    Example:
        tokens = TextTokenizer(tokenizer, prompts, tasks, max_passage_tokens=160).queries("nq", ["who wrote Faust"])
    """

    def __init__(
        self, tokenizer: Any, prompts: Prompts, tasks: Sequence[ContractTask], max_passage_tokens: int
    ) -> None:
        """Raises: ConfigError if a prompt leaves no room for a task's text."""
        self.tokenizer = tokenizer
        self.prompts = prompts
        self.tasks = {task.name: task for task in tasks}
        self.max_passage_tokens = max_passage_tokens
        self._head, self._tail = _special_tokens(tokenizer)
        # What stands before the text is never cut, so it is tokenized by itself.
        self._prefixes = {task.name: self._plain(query_text(prompts, task, "")) for task in tasks}
        for task in tasks:
            room = task.max_query_tokens - self._overhead(task.name)
            if room < 1:
                raise ConfigError(
                    f"tasks.{task.name}.max_query_tokens is {task.max_query_tokens} but prompt and special tokens "
                    f"take {self._overhead(task.name)}; raise it or shorten the prompt"
                )

    def queries(self, task: str, texts: Sequence[str]) -> Tokens:
        """Raises: RequestError for an unknown task, listing the known ones."""
        return self.queries_by_task([task] * len(texts), texts)

    def queries_by_task(self, tasks: Sequence[str], texts: Sequence[str]) -> Tokens:
        """Args: tasks: of each text.    Raises: RequestError for an unknown task, listing the known ones."""
        rows: list[list[int]] = [[]] * len(texts)
        truncated = [False] * len(texts)
        for task in dict.fromkeys(tasks):
            numbers = [number for number, own in enumerate(tasks) if own == task]
            for number, (row, cut) in zip(numbers, self._cut(task, [texts[n] for n in numbers]), strict=True):
                rows[number], truncated[number] = row, cut
        return self._pad(rows, truncated)

    def _cut(self, task: str, texts: Sequence[str]) -> Iterator[tuple[list[int], bool]]:
        """The whole query of each text, and whether something was cut."""
        if task not in self.tasks:
            raise RequestError(f"unknown task {task!r}; known: {', '.join(self.tasks)}", param="task")
        room = self.tasks[task].max_query_tokens - self._overhead(task)
        keep = self.tasks[task].keep
        lead = self._head + self._prefixes[task]
        encoded = self.tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=keep == "mention")
        for number, ids in enumerate(encoded["input_ids"]):
            start = 0
            if len(ids) > room and keep == "end":
                start = len(ids) - room
            elif len(ids) > room and keep == "mention":
                start = _mention_window(texts[number], encoded["offset_mapping"][number], room)
            yield lead + ids[start : start + room] + self._tail, len(ids) > room

    def passages(self, titles: Sequence[str], texts: Sequence[str]) -> Tokens:
        """Passages keep their beginning."""
        room = self.max_passage_tokens - len(self._head) - len(self._tail)
        whole = [passage_text(self.prompts, title, text) for title, text in zip(titles, texts, strict=True)]
        encoded = self.tokenizer(whole, add_special_tokens=False)["input_ids"]
        rows = [self._head + ids[:room] + self._tail for ids in encoded]
        return self._pad(rows, [len(ids) > room for ids in encoded])

    def _overhead(self, task: str) -> int:
        return len(self._head) + len(self._prefixes[task]) + len(self._tail)

    def _plain(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _pad(self, rows: list[list[int]], truncated: list[bool]) -> Tokens:
        longest = max(map(len, rows), default=0)
        ids_BL = np.full((len(rows), longest), self.tokenizer.pad_token_id, dtype=np.int64)
        mask_BL = np.zeros_like(ids_BL)
        for number, row in enumerate(rows):
            ids_BL[number, : len(row)] = row
            mask_BL[number, : len(row)] = 1
        return Tokens(ids_BL, mask_BL, np.array(truncated, dtype=bool))


def _special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and behind a text: BERT [CLS] … [SEP], T5 … </s>."""
    plain: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole: list[int] = tokenizer("a")["input_ids"]
    start = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return whole[:start], whole[start + len(plain) :]


def _mention_window(text: str, offsets: Sequence[tuple[int, int]], room: int) -> int:
    """First token of a window of `room` tokens with the mention in its middle; 0 without a mention."""
    begin, end = text.find(MENTION_START), text.find(MENTION_END)
    if begin < 0 or end < begin:
        return 0
    end += len(MENTION_END)
    inside = [i for i, (first, last) in enumerate(offsets) if first < end and last > begin]
    middle = (inside[0] + inside[-1] + 1) // 2
    start = min(max(0, middle - room // 2), len(offsets) - room)
    return min(start, inside[0])  # a mention longer than the window keeps its beginning
