"""What preparing would make of the files of a configuration, and what is odd about them; nothing is published.

Path: preparation → [here] → a table for a person, or JSON.  Passes and rules are those of prepare; here is only what is
looked at on the way: lengths against limits, repeated inputs, gold coverage, leakage from train to dev.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from taskspec.config import Config
from taskspec.data.preparation import Preparation, PrepareSummary
from taskspec.data.prepare import require_cluster
from taskspec.data.reading import InputFiles

TOKENS_PER_WORD = 1.35
"""English in the vocabularies of T5 and BERT; for when there is no tokenizer to ask."""
PASSAGES_TOKENIZED = 10_000
"""At most this many passages are tokenized, evenly spaced; half as many at least, where there are that many."""


class Cut(Protocol):
    """Which of B texts were cut."""

    @property
    def truncated_B(self) -> np.ndarray: ...


class Tokenize(Protocol):
    """Cuts texts to the limits of the configuration (`model.prompts.TextTokenizer`)."""

    def queries(self, task: str, texts: Sequence[str]) -> Cut: ...
    def passages(self, titles: Sequence[str], texts: Sequence[str]) -> Cut: ...


@dataclass(frozen=True)
class SplitCheck:
    """One split of a task."""

    queries: int
    words_median: int
    words_max: int
    max_query_tokens: int
    cut: float
    """Share of the queries that are longer than that."""
    repeated: int
    """Queries whose input came before, with the same gold pages."""
    contradicting: int
    """Queries whose input came before, with other gold pages."""
    gold_pages: int
    evidence: int
    evidence_dropped: int
    """Evidence sets with a page that is not in the knowledge source."""


@dataclass(frozen=True)
class Leakage:
    """What dev has of train."""

    inputs: float
    """Share of dev queries whose input is a train input too, up to case and punctuation."""
    gold_pages: float
    """Share of dev's gold pages that are gold in train too."""


@dataclass(frozen=True)
class CheckReport:
    """What was found."""

    summary: PrepareSummary
    tokens_estimated: bool
    """Whether tokens were estimated from words, for want of a tokenizer."""
    passage_words_mean: float
    passage_words_max: int
    max_passage_tokens: int
    passages_cut: float
    """Share of the passages that are longer than that, title and prompt included."""
    splits: dict[str, dict[str, SplitCheck]]
    """Task → split → findings."""
    leakage: dict[str, Leakage]
    """Task → findings, for tasks with both splits."""
    over_limit: dict[str, float]
    """URI → share of bad records, for files that would stop preparing."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"summary": self.summary.to_facts()}

    def to_text(self) -> str:
        """A table for the console."""
        head = (
            "task",
            "split",
            "queries",
            "words",
            "longest",
            "limit",
            "cut",
            "repeated",
            "contradicting",
            "gold found",
        )
        rows = [head]
        for task, splits in self.splits.items():
            for split, one in splits.items():
                found = 1 - one.evidence_dropped / one.evidence if one.evidence else 0.0
                numbers = (f"{one.queries:,}", f"{one.words_median:,}", f"{one.words_max:,}", f"{one.max_query_tokens}")
                odd = (f"{one.cut:.1%}", f"{one.repeated:,}", f"{one.contradicting:,}", f"{found:.1%}")
                rows.append((task, split, *numbers, *odd))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        tokens = f"estimated as {TOKENS_PER_WORD} per word" if self.tokens_estimated else "of the model's tokenizer"
        lines += [f"words: of the median query; limit and cut: in tokens, {tokens}", ""]
        for task, leak in self.leakage.items():
            lines.append(f"{task}: train has {leak.inputs:.1%} of the dev inputs, {leak.gold_pages:.1%} of their pages")
        lines += [
            "",
            self.summary.to_text(),
            f"passages: {self.passage_words_mean:.0f} words on average, {self.passage_words_max:,} at most; "
            f"{self.passages_cut:.1%} are longer than {self.max_passage_tokens} tokens",
        ]
        for task, splits in self.splits.items():
            for split, one in splits.items():
                if not one.queries:
                    lines.append(f"{task}: its {split} files hold no query: prepare would stop")
        for uri, share in self.over_limit.items():
            lines.append(f"{uri}: {share:.1%} of its records are bad: prepare would stop, see data.max_bad_fraction")
        return "\n".join(lines)


def check(config: Config, tokenize: Tokenize | None = None) -> CheckReport:
    """Reads everything that the configuration names. Ray must be connected.

    Args: tokenize: the model's tokenizer; None estimates tokens from words.
    Raises: ConfigError, StoreError, PlacementError; DataError for a file that cannot be read on.
    """
    files = InputFiles.find(config)
    require_cluster(config)
    counter = tokenize or EstimatedTokens(config)
    passages = _Passages()
    looked_at: dict[str, dict[str, _Queries]] = {}
    with tempfile.TemporaryDirectory(prefix="taskspec-check-") as scratch:
        preparation = Preparation(config, files, Path(scratch), Path(scratch, "quarantine"))
        preparation.read_task_files()
        preparation.choose_pages()
        for _, some_passages in preparation.pages():
            passages.look_at(some_passages)
        for task, split in files.splits:
            queries = looked_at.setdefault(task, {})[split] = _Queries()
            for some_queries in preparation.queries(task, split):
                queries.look_at(some_queries, counter.queries(task, some_queries["text"].to_pylist()))
        summary = preparation.summary()
    return CheckReport(
        summary=summary,
        tokens_estimated=tokenize is None,
        passage_words_mean=passages.words / max(1, summary.passages),
        passage_words_max=passages.words_max,
        max_passage_tokens=config.model.max_passage_tokens,
        passages_cut=passages.cut(counter),
        splits={
            task: {
                split: queries.report(
                    config.task(task).max_query_tokens,
                    summary.evidence[task][split],
                    summary.evidence_dropped[task][split],
                )
                for split, queries in splits.items()
            }
            for task, splits in looked_at.items()
        },
        leakage={
            task: splits["dev"].leakage(splits["train"]) for task, splits in looked_at.items() if len(splits) == 2
        },
        over_limit={
            count.file: count.bad / count.records
            for count in summary.files
            if count.bad > config.data.max_bad_fraction * count.records
        },
    )


class EstimatedTokens:
    """Stands in for a tokenizer: a text has 1.35 tokens per word, prompt included, and one token at its end."""

    class Estimate(NamedTuple):
        truncated_B: np.ndarray

    def __init__(self, config: Config) -> None:
        self._config = config

    def queries(self, task: str, texts: Sequence[str]) -> Cut:
        settings, template = self._config.task(task), self._config.prompts.query
        whole = [template.format(prompt=settings.prompt_text, text=text) for text in texts]
        return self._cut(whole, settings.max_query_tokens)

    def passages(self, titles: Sequence[str], texts: Sequence[str]) -> Cut:
        template = self._config.prompts.passage
        whole = [template.format(title=title, text=text) for title, text in zip(titles, texts, strict=True)]
        return self._cut(whole, self._config.model.max_passage_tokens)

    def _cut(self, texts: Sequence[str], limit: int) -> Cut:
        words_B = np.array([len(text.split()) for text in texts])
        return self.Estimate(np.ceil(words_B * TOKENS_PER_WORD) + 1 > limit)


class _Passages:
    """What is looked at of passages while they go by."""

    def __init__(self) -> None:
        self.words = 0
        self.words_max = 0
        self._sample: list[tuple[int, str, str]] = []
        self._spacing = 1

    def look_at(self, passages: pa.Table) -> None:
        if not passages.num_rows:
            return
        words = pc.add(pc.count_substring(passages["text"], " "), 1)
        self.words += pc.sum(words).as_py()
        self.words_max = max(self.words_max, pc.max(words).as_py())
        spaced = passages.filter(pa.array(passages["row_id"].to_numpy() % self._spacing == 0))
        self._sample += zip(*(spaced[name].to_pylist() for name in ("row_id", "title", "text")), strict=True)
        while len(self._sample) > PASSAGES_TOKENIZED:
            self._spacing *= 2
            self._sample = [one for one in self._sample if one[0] % self._spacing == 0]

    def cut(self, tokenize: Tokenize) -> float:
        """Share of the evenly spaced passages that are longer than the limit."""
        if not self._sample:
            return 0.0
        _, titles, texts = zip(*self._sample, strict=True)
        return float(tokenize.passages(titles, texts).truncated_B.mean())


class _Queries:
    """What is looked at of one split's queries while they go by."""

    def __init__(self) -> None:
        self._words: list[int] = []
        self._cut = 0
        self._gold_of_input: dict[int, int] = {}
        """Hash of a normalised input → hash of the gold pages it was first seen with."""
        self._gold_pages: set[int] = set()
        self._inputs: list[int] = []
        self._repeated = 0
        self._contradicting = 0

    def look_at(self, queries: pa.Table, cut: Cut) -> None:
        self._cut += int(cut.truncated_B.sum())
        texts, pages = queries["text"].to_pylist(), queries["gold_page_rows"].to_pylist()
        for text, page_rows in zip(texts, pages, strict=True):
            self._words.append(len(text.split()))
            self._gold_pages.update(page_rows)
            key, gold = hash(" ".join(re.findall(r"\w+", text.casefold()))), hash(tuple(page_rows))
            self._inputs.append(key)
            if key not in self._gold_of_input:
                self._gold_of_input[key] = gold
            elif self._gold_of_input[key] == gold:
                self._repeated += 1
            else:
                self._contradicting += 1

    def report(self, max_query_tokens: int, evidence: int, evidence_dropped: int) -> SplitCheck:
        return SplitCheck(
            queries=len(self._words),
            words_median=int(np.median(self._words)) if self._words else 0,
            words_max=max(self._words, default=0),
            max_query_tokens=max_query_tokens,
            cut=self._cut / max(1, len(self._words)),
            repeated=self._repeated,
            contradicting=self._contradicting,
            gold_pages=len(self._gold_pages),
            evidence=evidence,
            evidence_dropped=evidence_dropped,
        )

    def leakage(self, train: _Queries) -> Leakage:
        """What this split has of train."""
        return Leakage(
            inputs=sum(key in train._gold_of_input for key in self._inputs) / max(1, len(self._inputs)),
            gold_pages=len(self._gold_pages & train._gold_pages) / max(1, len(self._gold_pages)),
        )
