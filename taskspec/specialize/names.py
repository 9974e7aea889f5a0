"""What the name of a parameter says: its layer, and the kind of parameter that it is.

Path: [beside] gradients, analysis, stability.  Names are those of T5 and BERT, as `Piece.name` has them.
"""

from __future__ import annotations

import re


def layer_of(name: str) -> str:
    """Where in the model a parameter stands: `embedding`, `encoder 0` …, `decoder 0` …, `final`, or `other`.

    The final norms of T5's encoder and decoder are both `final`.
    """
    if block := re.match(r"(encoder|decoder)\.(?:block|layer)\.(\d+)\.", name):
        return f"{block[1]} {block[2]}"
    if re.match(r"(shared|embeddings)\.", name):
        return "embedding"
    return "final" if "final_layer_norm" in name else "other"


def kind_of(name: str) -> str:
    """`embedding`, `attention` (its biases by distance too), `feed-forward`, `norm`, or `other`."""
    return next((kind for kind, pattern in _KINDS.items() if re.search(pattern, name)), "other")


# The first that matches: norms stand inside embeddings and attention, and BERT's attention has an `output.dense`.
_KINDS = {
    "norm": r"layer_norm|LayerNorm",
    "attention": r"[aA]ttention",
    "embedding": r"^(shared|embeddings)\.",
    "feed-forward": r"DenseReluDense|(intermediate|output)\.dense",
}
