"""Who owns which element: the probe on tiny real encoders with planted specialization, and the shares by hand."""

import math
from collections.abc import Sequence
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import BertConfig, BertModel, T5Config, T5EncoderModel, T5Model

from taskspec.data.batches import StepBatches, TaskBatch
from taskspec.model.encoder import Encoder
from taskspec.specialize.analysis import Probe, owned_most, ownership, probe, random_mask
from taskspec.specialize.gradients import FlatParameters, Piece
from taskspec.specialize.names import kind_of, layer_of

T5 = {"vocab_size": 20, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2, "use_cache": False}
BERT = {
    "vocab_size": 20,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 8,
}
COLORS, MOONS = (3, 4, 5), (6, 7, 8)
"""Token ids that only one task's texts hold; 2 is in all texts."""


def t5(*, pooling: str = "mean", **changes) -> Encoder:
    torch.manual_seed(0)
    config = T5Config(**T5 | {"decoder_start_token_id": 0} | changes)
    return Encoder(T5EncoderModel(config) if pooling == "mean" else T5Model(config), pooling, "cosine")


def bert() -> Encoder:
    torch.manual_seed(0)
    return Encoder(BertModel(BertConfig(**BERT), add_pooling_layer=False), "mean", "cosine")


def batch(*words: int) -> TaskBatch:
    """One query per word; its positive says the word twice."""
    rows = len(words)
    query_BL = torch.tensor([[2, word] for word in words])
    passage_NL = torch.tensor([[word, 2, word] for word in words])
    return TaskBatch(
        query_ids_BL=query_BL,
        query_mask_BL=torch.ones_like(query_BL),
        query_weight_B=torch.full((rows,), 1 / rows),
        gold_page_BG=torch.arange(rows)[:, None],
        passage_ids_NL=passage_NL,
        passage_mask_NL=torch.ones_like(passage_NL),
        passage_page_N=torch.arange(rows),
    )


def step(*, swap: bool = False) -> StepBatches:
    return {"colors": batch(*COLORS[swap:]), "moons": batch(*MOONS[: 3 - swap])}


def by_hand(tasks: Sequence[str], sizes: dict[str, int], rows: Sequence[Sequence[float]]) -> Probe:
    """Sensitivities of parameters of one dimension."""
    pieces, start = [], 0
    for name, size in sizes.items():
        pieces.append(Piece(name, (size,), start))
        start += size
    return Probe(tuple(tasks), tuple(pieces), torch.tensor(rows))


# --- the probe --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [t5, partial(t5, pooling="first"), bert], ids=["t5 mean", "t5 first", "bert"])
def test_embeddings_of_words_that_one_task_has_are_owned_by_it(make):
    found = probe(make(), 0.1, [step(), step(swap=True)])
    words = next(piece for piece in found.pieces if piece.name.split(".")[-2] in ("shared", "word_embeddings"))
    rows_TVD = found.sensitivity_TP[:, words.elements].unflatten(1, words.shape)
    assert (rows_TVD[0, COLORS] > 0).all()
    assert (rows_TVD[1, MOONS] > 0).all()
    assert not rows_TVD[0, MOONS].any()
    assert not rows_TVD[1, COLORS].any()
    assert (rows_TVD[:, 2] > 0).all()
    assert not rows_TVD[:, 9:].any()

    mask_VD = owned_most(found, "colors", 0.01, embeddings=True)[words.elements].view(words.shape)
    assert mask_VD[list(COLORS)].any()
    assert not mask_VD[list(MOONS)].any()


def test_a_probe_of_one_step_is_the_gradient_times_the_weight_in_units_of_its_median():
    encoder = t5().double()
    found = probe(encoder, 0.1, [step()])
    for task, row_P in zip(found.tasks, found.sensitivity_TP, strict=True):
        encoder.zero_grad()
        one = step()[task]
        query_BD = encoder(one.query_ids_BL, one.query_mask_BL)
        passage_ND = encoder(one.passage_ids_NL, one.passage_mask_NL)
        torch.nn.functional.cross_entropy(query_BD @ passage_ND.T / 0.1, torch.arange(3)).backward()
        raw_P = torch.cat([(p * p.grad).abs().reshape(-1) for p in encoder.parameters()]).detach()
        torch.testing.assert_close(row_P, raw_P / raw_P[raw_P > 0].median(), rtol=1e-4, atol=1e-4)


def test_several_steps_are_averaged():
    encoder = t5()
    one, other = (probe(encoder, 0.1, [batches]).sensitivity_TP for batches in (step(), step(swap=True)))
    assert not torch.allclose(one, other)
    both = probe(encoder, 0.1, [step(), step(swap=True)])
    assert both.tasks == ("colors", "moons")
    torch.testing.assert_close(both.sensitivity_TP, (one + other) / 2)


def test_a_probe_drops_nothing_out_and_leaves_weights_and_no_gradients_behind():
    encoder = t5(dropout_rate=0.5).train()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    one, other = (probe(encoder, 0.1, [step()]).sensitivity_TP for _ in range(2))
    assert torch.equal(one, other)
    assert not encoder.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    assert all(parameter.grad is None for parameter in encoder.parameters())


# --- layers and kinds -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "layers"),
    [
        (t5, ["embedding", "encoder 0", "encoder 1", "final"]),
        (
            partial(t5, pooling="first", feed_forward_proj="gated-gelu"),
            ["embedding", "encoder 0", "encoder 1", "decoder 0", "decoder 1", "final"],
        ),
        (bert, ["embedding", "encoder 0", "encoder 1"]),
    ],
    ids=["t5 mean", "t5 first", "bert"],
)
def test_every_parameter_of_a_real_encoder_has_a_layer_and_a_kind(make, layers):
    pieces = FlatParameters(make()).pieces
    found = Probe(("a", "b"), pieces, torch.rand(2, pieces[-1].elements.stop))
    shares = ownership(found)
    assert list(shares.by_layer) == layers
    assert sorted(shares.by_kind) == ["attention", "embedding", "feed-forward", "norm"]


@pytest.mark.parametrize(
    ("name", "layer", "kind"),
    [
        ("shared.weight", "embedding", "embedding"),
        ("encoder.block.11.layer.0.SelfAttention.relative_attention_bias.weight", "encoder 11", "attention"),
        ("encoder.block.0.layer.1.layer_norm.weight", "encoder 0", "norm"),
        ("encoder.final_layer_norm.weight", "final", "norm"),
        ("decoder.block.3.layer.1.EncDecAttention.k.weight", "decoder 3", "attention"),
        ("decoder.block.3.layer.2.DenseReluDense.wi_1.weight", "decoder 3", "feed-forward"),
        ("embeddings.token_type_embeddings.weight", "embedding", "embedding"),
        ("embeddings.LayerNorm.bias", "embedding", "norm"),
        ("encoder.layer.5.attention.output.dense.weight", "encoder 5", "attention"),
        ("encoder.layer.5.attention.output.LayerNorm.weight", "encoder 5", "norm"),
        ("encoder.layer.5.intermediate.dense.bias", "encoder 5", "feed-forward"),
        ("encoder.layer.5.output.dense.weight", "encoder 5", "feed-forward"),
        ("pooler.dense.weight", "other", "other"),
    ],
)
def test_names_tell_layer_and_kind(name, layer, kind):
    assert (layer_of(name), kind_of(name)) == (layer, kind)


# --- shares -----------------------------------------------------------------------------------------------------------

SIZES = {
    "encoder.final_layer_norm.weight": 1,
    "shared.weight": 4,
    "decoder.block.0.layer.0.SelfAttention.q.weight": 2,
    "decoder.block.0.layer.0.SelfAttention.k.weight": 1,
}


def test_shares_are_those_counted_by_hand_over_touched_elements():
    found = by_hand(
        "ab",
        SIZES,
        [
            [0.0, 3.0, 0.0, 0.0, 9.0, 1.0, 1.0, 0.0],
            [2.0, 1.0, 0.0, 2.0, 3.0, 3.0, 0.0, 0.0],
        ],
    )
    shares = ownership(found)
    assert shares.owned == {"a": pytest.approx(3 / 6), "b": pytest.approx(3 / 6)}
    assert {layer: list(part.values()) for layer, part in shares.by_layer.items()} == {
        "embedding": pytest.approx([2 / 3, 1 / 3]),
        "decoder 0": [0.5, 0.5],
        "final": [0, 1],
    }
    assert list(shares.by_layer) == ["embedding", "decoder 0", "final"]
    assert shares.by_kind["attention"] == {"a": 0.5, "b": 0.5}
    quarter = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
    assert shares.entropy == pytest.approx(3 * quarter / 6)


def test_a_kind_that_nobody_touches_is_nobodys():
    found = by_hand("ab", {"shared.weight": 1, "encoder.final_layer_norm.weight": 1}, [[1.0, 0.0], [2.0, 0.0]])
    assert ownership(found).by_kind == {"embedding": {"a": 0, "b": 1}, "norm": {"a": 0, "b": 0}}


@given(tasks=st.integers(2, 5), scale=st.floats(1e-3, 1e3))
def test_equal_sensitivities_have_entropy_one_and_sensitivities_of_one_task_zero(tasks, scale):
    names = [f"t{number}" for number in range(tasks)]
    alike_TP = torch.full((tasks, 8), scale)
    alike_TP[:, 5:] = 0
    assert ownership(by_hand(names, SIZES, alike_TP.tolist())).entropy == pytest.approx(1)
    alone_TP = torch.zeros(tasks, 8)
    alone_TP[torch.arange(8) % tasks, torch.arange(8)] = scale
    assert ownership(by_hand(names, SIZES, alone_TP.tolist())).entropy == 0


# --- masks ------------------------------------------------------------------------------------------------------------


def test_owned_most_is_by_the_margin_not_by_sensitivity_or_ratio():
    # Of a: the largest sensitivity is the first, the largest margin the second, the largest ratio the last two.
    found = by_hand("abc", {"shared.weight": 4}, [[9.0, 5.0, 1.0, 0.2], [8.0, 1.0, 0.0, 0.0], [0.0, 0.5, 0.0, 0.0]])
    assert owned_most(found, "a", 0.25, embeddings=True).tolist() == [False, True, False, False]
    assert owned_most(found, "a", 0.01, embeddings=True).sum() == 1


def test_a_task_that_owns_too_little_gets_what_it_nearly_owns_and_nothing_untouched():
    found = by_hand("ab", {"shared.weight": 4}, [[1.0, 1.0, 0.0, 0.0], [2.0, 3.0, 0.0, 0.0]])
    assert owned_most(found, "a", 0.5, embeddings=True).tolist() == [True, False, False, False]
    assert owned_most(found, "a", 1.0, embeddings=True).tolist() == [True, True, False, False]


def test_owned_most_bends_the_tail():
    # By the plain margin the first is owned most: 100 over 80. Next to nobody else needs the second.
    found = by_hand("ab", {"shared.weight": 3}, [[100.0, 9.0, 0.0], [80.0, 0.0, 1.0]])
    assert owned_most(found, "a", 0.3, embeddings=True).tolist() == [False, True, False]


def test_embeddings_can_be_left_out_of_what_is_owned():
    found = by_hand("ab", {"shared.weight": 2, "encoder.final_layer_norm.weight": 2}, [[9.0, 9.0, 1.0, 2.0], [0.0] * 4])
    assert owned_most(found, "a", 0.5, embeddings=False).tolist() == [False, False, False, True]
    assert owned_most(found, "a", 0.5, embeddings=True).tolist() == [True, True, False, False]
    assert found.touched_P.all()


sensitivities = st.lists(
    st.lists(st.sampled_from([0.0, 1.0, 2.0, 5.0]), min_size=8, max_size=8), min_size=2, max_size=3
)


@given(rows=sensitivities, share=st.floats(0.1, 1), seed=st.integers(0, 99))
def test_a_random_mask_has_as_many_touched_elements_of_each_tensor(rows, share, seed):
    rows[0][0] = 1.0  # something is touched
    found = by_hand("abc"[: len(rows)], SIZES, rows)
    mask_P = owned_most(found, "a", share, embeddings=True)
    other_P = random_mask(found, mask_P, torch.Generator().manual_seed(seed))
    assert counts(found, other_P) == counts(found, mask_P)
    assert not (other_P & ~found.touched_P).any()


def counts(found: Probe, mask_P: Tensor) -> list[int]:
    return [int(mask_P[piece.elements].sum()) for piece in found.pieces]


def test_a_random_mask_may_take_every_touched_element_those_of_the_mask_among_them():
    found = by_hand("ab", {"shared.weight": 5}, [[1.0, 0.0, 2.0, 0.0, 3.0], [0.0] * 5])
    mask_P = torch.tensor([True, False, False, False, False])
    taken = {int(random_mask(found, mask_P, torch.Generator().manual_seed(seed)).nonzero()) for seed in range(40)}
    assert taken == {0, 2, 4}
