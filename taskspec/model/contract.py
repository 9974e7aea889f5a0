"""What a checkpoint, the index built from it and the requests to both must agree on.

Path: configuration, saved encoder → [here] → checkpoint, index, retriever, HTTP.
"""

from __future__ import annotations

from typing import Literal

from taskspec.config import canonical_sha256
from taskspec.errors import ContractError
from taskspec.sections import Prompts, Section


class ContractTask(Section):
    """What of a task decides its queries' embeddings."""

    name: str
    prompt: str
    max_query_tokens: int
    keep: Literal["beginning", "end", "mention"]


class Contract(Section):
    """What checkpoint, index and requests must agree on for scores to mean anything.

    Saved as `taskspec.json` in a checkpoint and, by fingerprint and in full, in the index built from it.
    """

    name: str
    """Name of the model, as answers carry it."""
    weights: str
    """sha256 over the encoder's weights and tokenizer files."""
    tasks: tuple[ContractTask, ...]
    prompts: Prompts
    pooling: Literal["first", "mean"]
    similarity: Literal["dot", "cosine"]
    max_passage_tokens: int
    dimension: int
    """D of the embeddings."""

    @property
    def fingerprint(self) -> str:
        """sha256 (hex, 64 characters) of the canonical JSON of all fields."""
        return canonical_sha256(self.model_dump(mode="json"))

    def require_same(self, other: Contract, mine: str, theirs: str, way_out: str) -> None:
        """Raises: ContractError naming the first field that differs, both owners and the way out."""
        for field in type(self).model_fields:
            a, b = getattr(self, field), getattr(other, field)
            if a == b:
                continue
            if field == "tasks":
                names_a, names_b = {t.name: t for t in a}, {t.name: t for t in b}
                other_names = [n for n in [*names_a, *names_b] if names_a.get(n) != names_b.get(n)]
                if other_names:
                    name = other_names[0]
                    field, a, b = f"tasks.{name}", names_a.get(name), names_b.get(name)
                else:
                    field, a, b = "order of tasks", ", ".join(names_a), ", ".join(names_b)
            raise ContractError(
                f"{mine} has contract {self.fingerprint[:12]}, {theirs} has {other.fingerprint[:12]}: "
                f"{field} differs ({_short(a)} against {_short(b)}); {way_out}"
            )


def _short(value: object) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 80 else text[:77] + "…"
