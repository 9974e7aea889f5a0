"""What an index says about itself: the model that embedded it, its shards, and whether a checkpoint may search it.

Path: build → [here] → retriever, serving.  A typed view of the facts in the artifact's manifest; no file of a shard is
opened here.
"""

from __future__ import annotations

from typing import Self

from pydantic import ValidationError, model_validator

from taskspec import artifacts
from taskspec.errors import ArtifactError
from taskspec.index.recall import MeasuredRecall
from taskspec.model.contract import Contract
from taskspec.sections import KindName, Precision, Section

KIND = "index"
PASSAGES_FILE = "passages.arrow"
"""The text store: a RowStore whose row numbers are the shards' rows."""
LEXICAL_FOLDER = "lexical"
PASSAGE_COLUMNS = ("passage_id", "page_row", "wikipedia_id", "title", "text")


class ShardFile(Section):
    """One shard: the embeddings of rows row_start … row_start + rows − 1."""

    file: str
    """Path inside the artifact."""
    row_start: int
    rows: int
    max_norm: float
    """Length of its longest embedding, which bounds the rounding of its scores."""


class IndexManifest(Section):
    """The facts of an index artifact."""

    contract: Contract
    """Of the checkpoint that embedded the passages, in full, so that a difference can be named."""
    fingerprint: str
    """The contract's."""
    prepared: str
    """Id of the prepared data that the passages came from."""
    precision: Precision
    """Of the passages' embedding."""
    kind: KindName
    factory: str
    """FAISS's name of the first shard's kind; lists of an IVF shard go with its rows."""
    dimension: int
    passages: int
    shards: tuple[ShardFile, ...]
    recall: MeasuredRecall
    lexical: bool
    """Whether there is a lexical index beside the shards."""
    recall_queries: int
    """Dev queries per task that recall was to be measured with; a task may have fewer."""

    @model_validator(mode="after")
    def _shards_hold_every_row_once(self) -> Self:
        row = 0
        for number, shard in enumerate(self.shards):
            if shard.row_start != row:
                raise ValueError(f"shard {number} begins at row {shard.row_start}, but those before it end at {row}")
            row += shard.rows
        if row != self.passages:
            raise ValueError(f"its shards hold {row} rows, but it has {self.passages} passages")
        return self

    @classmethod
    def of(cls, uri: str, manifest: artifacts.Manifest) -> Self:
        """Raises: ArtifactError naming the fact that is not as it should be."""
        try:
            return cls.model_validate(manifest.facts)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"]) or "shards"
            message = first["msg"].removeprefix("Value error, ")
            raise ArtifactError(f"{uri}: fact {name} of the index: {message}; build the index again") from error

    def require_built_by(self, contract: Contract, checkpoint: str, index: str) -> None:
        """Raises: ContractError naming the first field in which the checkpoint's contract differs from the index's."""
        contract.require_same(
            self.contract,
            f"checkpoint {checkpoint}",
            f"index {index}",
            f"name the index that was built from this checkpoint, or build one in a new folder with: "
            f"python -m jobs.index --config … --checkpoint {checkpoint} --out …",
        )
