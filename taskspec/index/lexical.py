"""BM25 over passages: which share the rarest words with a query.

Path: passages → [here] → BM25 negatives and baseline, searches that fuse it with the dense one.  N passages, K results.
Built in memory, which is right for up to a few million passages; opened from disk it is memory-mapped.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator, Sequence
from pathlib import Path

import bm25s
import numpy as np
import Stemmer
from bm25s.tokenization import Tokenizer

from taskspec.data.rows import RowStore
from taskspec.errors import ArtifactError

K1, B = 0.9, 0.4
"""Pyserini's values, with which KILT's BM25 figures are computed."""
CHUNK = 1024
"""Rows whose texts are in memory at once."""


class Lexical:
    """Ranks passages by the stemmed English words that they share with a query; their title counts as part of them.

    A passage that shares no word is no hit, so there may be fewer than were asked for.
    """

    def __init__(self, tokenizer: Tokenizer, index: bm25s.BM25) -> None:
        self._tokenizer, self._index = tokenizer, index

    @classmethod
    def build(cls, passages: RowStore) -> Lexical:
        """Indexes all passages."""
        tokenizer = _tokenizer()
        ids: list[list[int]] = []
        for rows in chunks(len(passages)):
            taken = passages.take(rows, ["title", "text"])
            texts = [f"{title} {text}" for title, text in zip(taken["title"], taken["text"], strict=True)]
            ids += tokenizer.tokenize(texts, update_vocab=True, show_progress=False, allow_empty=False)
        index = bm25s.BM25(k1=K1, b=B)
        index.index((ids, tokenizer.get_vocab_dict()), show_progress=False)
        return cls(tokenizer, index)

    def save(self, folder: Path) -> None:
        """Into a new folder."""
        self._index.save(str(folder), show_progress=False)
        self._tokenizer.save_vocab(str(folder))

    @classmethod
    def open(cls, folder: Path) -> Lexical:
        """Raises: ArtifactError if the folder holds no index of this kind."""
        try:
            index = bm25s.BM25.load(str(folder), mmap=True, show_progress=False)
            tokenizer = _tokenizer()
            tokenizer.load_vocab(str(folder))
        except (OSError, ValueError, KeyError) as error:
            raise ArtifactError(f"{folder}: cannot be read as a lexical index ({error}); build it again") from error
        return cls(tokenizer, index)

    def words(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text's words that some passage has. Safe from threads."""
        known, once = self._tokenizer, _tokenizer()
        # bm25s keeps every new word that it meets: here only until the words are found.
        once.stem_to_sid, once.word_to_id = known.stem_to_sid, ChainMap({}, known.word_to_id)
        found: list[list[int]] = once.tokenize(list(texts), update_vocab=False, show_progress=False, allow_empty=False)
        return found

    def scores(self, words: Sequence[int]) -> np.ndarray:
        """(N,) float32, the caller's own; 0 where a passage shares none of the words."""
        if not words:
            return np.zeros(self._index.scores["num_docs"], dtype=np.float32)
        return np.asarray(self._index.get_scores_from_ids(list(words)))


def best_rows(scores_N: np.ndarray, top_k: int) -> np.ndarray:
    """The rows (K,) of the highest scores above 0, best first, equal scores by lower row."""
    least = 0.0
    if top_k < len(scores_N):
        least = np.partition(scores_N, -top_k)[-top_k]
    # All that tie with the last one are sorted too, so that the lower row wins.
    rows = np.flatnonzero((scores_N >= least) & (scores_N > 0))
    return rows[np.argsort(-scores_N[rows], kind="stable")][:top_k]


def _tokenizer() -> Tokenizer:
    return Tokenizer(stopwords="english", stemmer=Stemmer.Stemmer("english"))


def chunks(count: int) -> Iterator[range]:
    """The numbers from 0 on, so many at a time that their texts fit in memory."""
    for start in range(0, count, CHUNK):
        yield range(start, min(start + CHUNK, count))
