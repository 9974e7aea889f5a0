"""The passages of an index: from the rows that shards find to hits, pages and texts, among all pages or some.

Path: shards, text store → [here] → retriever, serving.  B queries, D the embedding's dimension, K results, N passages.
Shards come in as an argument: in this process, or behind a network.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from taskspec.data.rows import RowStore
from taskspec.errors import ArtifactError
from taskspec.index.lexical import Lexical, best_rows
from taskspec.index.manifest import LEXICAL_FOLDER, PASSAGES_FILE, IndexManifest, ShardFile
from taskspec.index.page_ids import PageIds
from taskspec.index.recall import MeasuredRecall
from taskspec.index.shard import Results, Shard, load_shard, merge_top_k
from taskspec.retrieve.fusion import FUSED_DEPTH, fuse
from taskspec.retrieve.hits import Hit, Level
from taskspec.retrieve.pages import Ranking, best_per_page, search_until_full


class Shards(Protocol):
    """All shards of an index, asked as one."""

    def search(self, queries_BD: np.ndarray, top_k: int, effort: int | None) -> Results:
        """The best passages of each query; row −1 where fewer were reached."""
        ...

    def rank(self, queries_BD: np.ndarray, rows: np.ndarray, top_k: int) -> Results:
        """The best of these rows, ascending: each is scored, so none is missed."""
        ...


class LocalShards:
    """Shards in this process."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        """Args: shards: disjoint; none is allowed."""
        self._shards = shards

    @classmethod
    def open(cls, folder: Path, manifest: IndexManifest, some: Sequence[ShardFile] | None = None) -> LocalShards:
        """Args: some: of the manifest's shards; None is all.

        Raises: ArtifactError for a file that is not the shard it should be.
        """
        opened = []
        for file in manifest.shards if some is None else some:
            shard = load_shard(folder / file.file, manifest.kind, file.row_start, file.max_norm)
            if shard.rows != file.rows:
                raise ArtifactError(
                    f"{folder / file.file}: holds {shard.rows} embeddings, the manifest says {file.rows}; "
                    f"build the index again"
                )
            opened.append(shard)
        return cls(opened)

    def __len__(self) -> int:
        return len(self._shards)

    def search(self, queries_BD: np.ndarray, top_k: int, effort: int | None) -> Results:
        return self._merged((shard.search(queries_BD, top_k, effort) for shard in self._shards), queries_BD, top_k)

    def rank(self, queries_BD: np.ndarray, rows: np.ndarray, top_k: int) -> Results:
        return self._merged((shard.rank(queries_BD, rows, top_k) for shard in self._shards), queries_BD, top_k)

    def _merged(self, parts: Iterable[Results], queries_BD: np.ndarray, top_k: int) -> Results:
        """A deployment may have no shard of a version."""
        return merge_top_k([*parts, Results.none(len(queries_BD))], top_k)


class PageChoice(NamedTuple):
    """Which pages may be found, by number."""

    only: np.ndarray | None
    """None is all but those `without`, which are left out here already."""
    without: np.ndarray


EVERY_PAGE = PageChoice(None, np.empty(0, np.int64))


class Catalog:
    """What the rows of an index stand for.

    Attributes: version: of the index.
    """

    def __init__(
        self,
        passages: RowStore,
        version: str,
        recall: MeasuredRecall | None = None,
        page_ids: PageIds | None = None,
        lexical: Lexical | None = None,
    ) -> None:
        """Args: recall: as measured when the index was built, for how hard each task's searches try. page_ids: of
        `passages`; made when they are needed if None. lexical: of `passages`, for fused searches.
        """
        self._passages = passages
        self._page_of_row_N = passages.column("page_row")
        self._recall = recall
        self._page_ids = page_ids
        self._lexical = lexical
        self.version = version

    @classmethod
    def open(cls, folder: Path, manifest: IndexManifest, version: str) -> Catalog:
        """Raises: ArtifactError for a file that is not what it should be."""
        lexical = Lexical.open(folder / LEXICAL_FOLDER) if manifest.lexical else None
        passages = RowStore(folder / PASSAGES_FILE)
        if len(passages) != manifest.passages:
            raise ArtifactError(
                f"{folder / PASSAGES_FILE}: holds {len(passages)} passages, the manifest says {manifest.passages}; "
                f"build the index again"
            )
        return cls(passages, version, manifest.recall, PageIds.open(folder), lexical)

    @property
    def fuses(self) -> bool:
        """Whether there is a lexical index to fuse with."""
        return self._lexical is not None

    def effort(self, task: str) -> int | None:
        """How hard a search for this task tries, as its recall was measured; None where there is no choice."""
        return self._recall.effort(task) if self._recall else None

    def choose_pages(self, only: Sequence[str] | None, without: Sequence[str]) -> PageChoice:
        """Which pages may be found.    Args: only, without: wikipedia ids, unknown ones match nothing; None is all."""
        if only is None and not without:
            return EVERY_PAGE
        excluded = self._ids.find(without)
        return PageChoice(None if only is None else np.setdiff1d(self._ids.find(only), excluded), excluded)

    def count(self, level: Level, pages: PageChoice) -> int:
        """How many pages, or passages of them, may be found."""
        if level == "page":
            return len(self._ids.ids) - len(pages.without) if pages.only is None else len(pages.only)
        if pages.only is None:
            return len(self._page_of_row_N) - len(self._rows_of(pages.without))
        return len(self._rows_of(pages.only))

    def search(
        self,
        shards: Shards,
        queries_BD: np.ndarray,
        top_k: int,
        level: Level,
        with_text: bool,
        effort: int | None = None,
        pages: PageChoice = EVERY_PAGE,
        fused_texts: Sequence[str] | None = None,
    ) -> list[list[Hit]]:
        """The hits of each query, best first, equal scores by lower passage row.

        Args: fused_texts: of the queries, to fuse their lexical ranking with the dense one; scores are the fusion's.
        """
        if fused_texts is None:
            return self.hits(self._rank(shards, queries_BD, top_k, level, effort, pages), level, with_text)
        depth = max(top_k, FUSED_DEPTH)
        dense = self._rank(shards, queries_BD, depth, level, effort, pages)
        lexical = self.rank_lexical(fused_texts, depth, level, pages)
        unit_of_row_N = self._page_of_row_N if level == "page" else None
        fused = [fuse(pair, unit_of_row_N, top_k) for pair in zip(dense, lexical, strict=True)]
        return self.hits(fused, level, with_text)

    def rank_lexical(
        self, texts: Sequence[str], top_k: int, level: Level, pages: PageChoice = EVERY_PAGE
    ) -> list[Ranking]:
        """By shared words. Fewer than `top_k` where fewer passages share one."""
        assert self._lexical is not None, "asked for only where `fuses`"
        lexical = self._lexical
        chosen = None if pages.only is None else self._rows_of(pages.only)
        excluded = self._rows_of(pages.without)

        def rank(words: Sequence[int]) -> Ranking:
            scores_N = lexical.scores(words)
            scores_N[excluded] = 0
            scores_R = scores_N if chosen is None else scores_N[chosen]

            def search(_: np.ndarray, passages: int) -> list[Ranking]:
                best_K = best_rows(scores_R, passages)
                return [Ranking(scores_R[best_K], best_K if chosen is None else chosen[best_K])]

            one = np.zeros(1)
            if level == "passage":
                return search(one, top_k)[0]
            return search_until_full(search, self._best_per_page, one, top_k, len(scores_R))[0]

        # One query after the other: each has as many scores as there are passages.
        return [rank(words) for words in lexical.words(texts)]

    def _best_per_page(self, ranking: Ranking) -> Ranking:
        return best_per_page(ranking, self._page_of_row_N)

    def _rank(
        self,
        shards: Shards,
        queries_BD: np.ndarray,
        top_k: int,
        level: Level,
        effort: int | None,
        pages: PageChoice,
    ) -> list[Ranking]:
        if pages.only is None:
            rows = len(self._page_of_row_N)
            # Where candidates are refined they are a multiple of what is asked for: no fewer than were measured.
            least = self._recall.at if self._recall and effort is not None else 1

            def search(queries_BD: np.ndarray, passages: int) -> list[Ranking]:
                return _rankings(shards.search(queries_BD, max(passages, least), effort), passages)

        else:
            chosen = self._rows_of(pages.only)
            rows = len(chosen)

            def search(queries_BD: np.ndarray, passages: int) -> list[Ranking]:
                return _rankings(shards.rank(queries_BD, chosen, passages), passages)

        def keep(ranking: Ranking) -> Ranking:
            kept_K = ~np.isin(self._page_of_row_N[ranking.rows_K], pages.without)
            ranking = Ranking(ranking.scores_K[kept_K], ranking.rows_K[kept_K])
            return self._best_per_page(ranking) if level == "page" else ranking

        if level == "page" or len(pages.without):
            return search_until_full(search, keep, queries_BD, top_k, rows)
        return search(queries_BD, top_k)

    def passage(self, passage_id: str) -> dict[str, str] | None:
        """passage_id, wikipedia_id, title and text of one passage; None if there is none of that id."""
        wikipedia_id, _, number = passage_id.rpartition(":")
        rows = self._rows_of(self._ids.find([wikipedia_id]))
        # Python reads no number of thousands of digits.
        if not number.isdecimal() or len(number) > len(str(len(rows))) or int(number) >= len(rows):
            return None
        found = self._passages.take([rows[int(number)]], ["passage_id", "wikipedia_id", "title", "text"])
        return {name: values[0] for name, values in found.items()} if found["passage_id"] == [passage_id] else None

    @property
    def _ids(self) -> PageIds:
        if self._page_ids is None:
            self._page_ids = PageIds.of(self._passages)
        return self._page_ids

    def _rows_of(self, pages: np.ndarray) -> np.ndarray:
        """The rows of these pages, ascending."""
        starts, stops = (np.searchsorted(self._page_of_row_N, pages, side) for side in ("left", "right"))
        return np.concatenate([np.empty(0, np.int64), *map(np.arange, starts, stops)])

    def hits(self, rankings: Sequence[Ranking], level: Level, with_text: bool) -> list[list[Hit]]:
        """What ranked rows stand for."""
        columns = ["passage_id", "wikipedia_id", "title", *(["text"] if with_text else [])]
        passages = self._passages.take(np.concatenate([ranking.rows_K for ranking in rankings]), columns)
        ids = passages["wikipedia_id" if level == "page" else "passage_id"]
        texts: Sequence[str | None] = passages["text"] if with_text else [None] * len(ids)
        result, start = [], 0
        for ranking in rankings:
            result.append(
                [
                    Hit(rank, ids[i], score, passages["wikipedia_id"][i], passages["title"][i], texts[i])
                    for rank, (i, score) in enumerate(enumerate(ranking.scores_K.tolist(), start), start=1)
                ]
            )
            start += len(ranking.rows_K)
        return result


def _rankings(results: Results, top_k: int) -> list[Ranking]:
    """Without the rows that were not reached."""
    rankings = (Ranking(scores_K[rows_K >= 0], rows_K[rows_K >= 0]) for scores_K, rows_K in zip(*results, strict=True))
    return [Ranking(one.scores_K[:top_k], one.rows_K[:top_k]) for one in rankings]


def index_version(artifact_id: str) -> str:
    """The name of an index's content in answers: the first 12 characters of its artifact's id."""
    return artifact_id[:12]
