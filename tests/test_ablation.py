"""Zeroing what a task owns, on a bag of words: two tasks whose texts share no word, so who owns what is known."""

from contextlib import suppress
from pathlib import Path
from statistics import fmean

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import BertTokenizer, T5Config, T5EncoderModel

from taskspec import artifacts
from taskspec.config import Config, parse_config
from taskspec.data.batches import dev_batches
from taskspec.data.prepared import KIND, PASSAGE_SCHEMA, QUERY_SCHEMA, PreparedData
from taskspec.evaluate.ablation import ablate, zeroed
from taskspec.model.encoder import Encoder, TextEncoder, save_encoder
from taskspec.sections import Evaluate
from taskspec.specialize.analysis import Probe, probe

TEXTS = {
    "sky": ("moon ice", "ice ring ring", "ring dust", "dust moon moon"),
    "colors": ("red green", "green blue blue", "blue gold", "gold red red"),
}
"""Each is a page, and the query that asks for it."""
WORDS = sorted({word for texts in TEXTS.values() for text in texts for word in text.split()})
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SETTINGS = Evaluate(top_k=4, at=(1,))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    uri = str(tmp_path_factory.mktemp("data") / "prepared")
    pages = [text for texts in TEXTS.values() for text in texts]
    passages = [(row, f"{row}:0", row, str(row), "", text, 0, 0) for row, text in enumerate(pages)]
    facts = {"queries": {task: {"dev": len(texts)} for task, texts in TEXTS.items()}}
    with artifacts.publishing(uri, KIND, inputs={}, config={}, facts=facts) as folder:
        write(folder / "passages" / "0.parquet", passages, PASSAGE_SCHEMA)
        for task, texts in TEXTS.items():
            queries = [(text, text, [[str(row)]], [row], [row]) for row, text in enumerate(pages) if text in texts]
            write(folder / "queries" / task / "dev" / "0.parquet", queries, QUERY_SCHEMA)
    return PreparedData.open(uri)


def write(path: Path, rows: list[tuple], schema: pa.Schema) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([dict(zip(schema.names, row, strict=True)) for row in rows], schema), path)


@pytest.fixture
def bag_of_words(tmp_path: Path) -> TextEncoder:
    """A T5 whose attention and feed-forward add nothing: the mean of the words' embeddings, normed. A word has a
    dimension of its own, and one that all words share."""
    shape = {"d_model": 16, "d_kv": 4, "d_ff": 4, "num_layers": 1, "num_heads": 1, "dropout_rate": 0.0}
    transformer = T5EncoderModel(T5Config(vocab_size=len(SPECIAL) + len(WORDS), **shape))
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if name.endswith(("SelfAttention.o.weight", "wo.weight", "shared.weight")):
                parameter.zero_()
        for number in range(len(WORDS)):
            transformer.shared.weight[len(SPECIAL) + number, [number, 15]] = torch.tensor([2.0, 1.0])
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate([*SPECIAL, *WORDS])})
    encoder = Encoder(transformer, "mean", "cosine")
    return TextEncoder(encoder, tokenizer, save_encoder(config(), encoder, tokenizer, tmp_path))


def config() -> Config:
    return parse_config(
        {
            "name": "words",
            "artifacts": "nowhere",
            "tasks": [{"name": name} for name in TEXTS],
            "prompts": {"query": "{text}", "passage": "{title} {text}"},
            "model": {"pooling": "mean", "similarity": "cosine"},
        },
        "test",
    )


def probed(encoder: TextEncoder, prepared: PreparedData) -> Probe:
    return probe(encoder.encoder, 0.2, [dev_batches(prepared, encoder.tokenizer, tuple(TEXTS), queries=4, seed=0)])


def bits(encoder: TextEncoder) -> dict[str, torch.Tensor]:
    return {name: tensor.clone().view(torch.int32) for name, tensor in encoder.encoder.state_dict().items()}


def test_a_task_without_its_elements_falls_and_the_other_stays(bag_of_words, prepared):
    found = probed(bag_of_words, prepared)
    # Each task owns its 8 numbers of the embedding and 4 of the final norm; both need the norm of what words share.
    assert int(found.touched_P.sum()) == 25
    fallen = ablate(bag_of_words, prepared, found, SETTINGS, share=12 / 25, seed=0)["all elements"]
    # Its texts are then zero, so all pages tie and the first one is answered: a page of the sky.
    assert fallen.owned == {"sky": {"sky": 0.75, "colors": 0.0}, "colors": {"sky": 0.0, "colors": 1.0}}
    assert fallen.share == 12 / 25
    assert fallen.own == {"sky": (0.0, 1.0, 1.0, 1.0), "colors": (1.0, 1.0, 1.0, 1.0)}


def test_without_embeddings_only_the_rest_is_zeroed(bag_of_words, prepared):
    found = probed(bag_of_words, prepared)
    with_words, without = ablate(bag_of_words, prepared, found, SETTINGS, share=1.0, seed=0).values()
    # The norm alone silences all, as everything passes through it; the 4 numbers of one task's words, that task: its
    # queries then only have what all words share, and its pages tie, the first in front of the 3 others.
    assert with_words == without
    part = ablate(bag_of_words, prepared, found, SETTINGS, share=4 / 9, seed=0)["without embeddings"]
    assert part.owned == {"sky": {"sky": 0.75, "colors": 0.0}, "colors": {"sky": 0.0, "colors": 0.75}}


def test_the_random_elements_are_those_of_the_seed_and_all_of_them_where_all_are_zeroed(bag_of_words, prepared):
    found = probed(bag_of_words, prepared)
    one, again, other = (ablate(bag_of_words, prepared, found, SETTINGS, share=0.3, seed=seed) for seed in (0, 0, 1))
    assert one == again
    for part in one:
        assert one[part].owned == other[part].owned
        assert one[part].random != other[part].random
    whole = ablate(bag_of_words, prepared, found, SETTINGS, share=1.0, seed=0)["all elements"]
    assert whole.random == whole.owned == {task: {"sky": 0.75, "colors": 1.0} for task in TEXTS}
    assert whole.own_random == whole.own
    part = other["all elements"]
    for of_queries, grid in ((part.own, part.owned), (part.own_random, part.random)):
        assert {task: fmean(falls) for task, falls in of_queries.items()} == {task: grid[task][task] for task in TEXTS}


def test_passages_embedded_in_parts_keep_their_rows(bag_of_words, prepared, monkeypatch):
    found = probed(bag_of_words, prepared)
    at_once = ablate(bag_of_words, prepared, found, SETTINGS, share=0.3, seed=0)
    monkeypatch.setattr("taskspec.evaluate.ablation.PASSAGES_PER_CALL", 3)
    assert ablate(bag_of_words, prepared, found, SETTINGS, share=0.3, seed=0) == at_once


def test_the_weights_are_bit_by_bit_what_they_were(bag_of_words, prepared):
    with torch.no_grad():
        bag_of_words.encoder.transformer.shared.weight[:3] = torch.tensor([-0.0, 1e-42, 1 / 3])[:, None]
    before = bits(bag_of_words)
    found = probed(bag_of_words, prepared)
    ablate(bag_of_words, prepared, found, SETTINGS, share=0.5, seed=0)
    after = bits(bag_of_words)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_zeroed_elements_come_back_after_an_error():
    theta_P = torch.tensor([1.0, 2.0, 3.0])
    inside = []
    with suppress(RuntimeError), zeroed(theta_P, torch.tensor([True, False, True])):
        inside = theta_P.tolist()
        raise RuntimeError
    assert inside == [0, 2, 0]
    assert theta_P.tolist() == [1, 2, 3]
