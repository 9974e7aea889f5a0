"""Encoders: T5 and BERT-like, pooling, similarity, saving and loading."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizer, RobertaConfig, RobertaModel

from taskspec.config import Config, parse_config, with_values
from taskspec.errors import ConfigError
from taskspec.model.contract import ContractTask
from taskspec.model.encoder import (
    Encoder,
    TextEncoder,
    build_encoder,
    contract_tasks,
    length_sorted,
    load_encoder,
    lone_threads,
    require_positions,
    save_encoder,
    train_tokenizer,
)
from taskspec.sections import Model

TEXTS = [f"the {a} of {b}" for a in ("king", "queen", "house", "river") for b in ("arden", "belmor", "casta")] * 20


def configure(**model) -> Config:
    scratch = {"vocabulary": 200, "width": 16, "layers": 1, "heads": 2}
    tree = {"name": "x", "artifacts": "a", "tasks": [{"name": "nq"}], "model": {"scratch": scratch} | model}
    return parse_config(tree, "test")


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> str:
    """A BERT-like encoder as a hub would hold it: a folder of transformers."""
    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(" ".join(TEXTS).split())), "nq"]
    BertTokenizer(vocab={word: number for number, word in enumerate(words)}).save_pretrained(folder)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(words), **shape)).save_pretrained(folder)
    return str(folder)


def text_encoder(config: Config, folder) -> TextEncoder:
    encoder, tokenizer = (
        load_encoder(config.model, config.model.source)
        if config.model.source
        else build_encoder(config.model, TEXTS, seed=0)
    )
    return TextEncoder(encoder, tokenizer, save_encoder(config, encoder, tokenizer, folder))


@pytest.mark.parametrize("pooling", ["first", "mean"])
@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize("family", ["t5", "bert"])
def test_a_saved_encoder_embeds_as_before(family, pooling, similarity, bert, tmp_path):
    config = configure(pooling=pooling, similarity=similarity, source=bert if family == "bert" else None)
    before = text_encoder(config, tmp_path)
    encoder, tokenizer = load_encoder(config.model, tmp_path)
    after = TextEncoder(encoder, tokenizer, before.contract)
    queries = ["the king", "queen of arden and house of belmor"]
    ours, theirs = before.embed_queries("nq", queries)[0], after.embed_queries("nq", queries)[0]
    np.testing.assert_array_equal(ours, theirs)
    assert ours.shape == (2, 16)
    assert np.abs(ours[0] - ours[1]).max() > 1e-4
    if similarity == "cosine":
        np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, rtol=1e-5)


def test_lengths_that_an_encoder_has_no_positions_for_are_refused(bert):
    def require(longest: int, encoder) -> None:
        config = configure(source=bert, max_passage_tokens=100)
        require_positions(encoder, with_values(config, {"tasks.nq.max_query_tokens": longest}))

    require(512, load_encoder(configure(source=bert).model, bert)[0])
    with pytest.raises(ConfigError, match=r"tasks\.nq\.max_query_tokens is 513, model\.source has positions for 512"):
        require(513, load_encoder(configure(source=bert).model, bert)[0])
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    roberta = RobertaModel(RobertaConfig(vocab_size=9, max_position_embeddings=130, pad_token_id=1, **shape))
    require(128, Encoder(roberta, "mean", "dot"))
    with pytest.raises(ConfigError, match="has positions for 128 tokens"):
        require(129, Encoder(roberta, "mean", "dot"))
    require(10_000, build_encoder(configure().model, TEXTS, seed=0)[0])


def test_first_of_t5_is_the_first_decoder_token_and_mean_needs_no_decoder():
    first, _ = build_encoder(configure(pooling="first").model, TEXTS, seed=0)
    mean, _ = build_encoder(configure(pooling="mean").model, TEXTS, seed=0)
    assert any("decoder" in name for name, _ in first.named_parameters())
    assert not any("decoder" in name for name, _ in mean.named_parameters())


def test_an_embedding_does_not_depend_on_its_neighbors_or_their_padding(tmp_path):
    encoder = text_encoder(configure(pooling="mean"), tmp_path)
    titles = ["a", "b", "c"]
    texts = ["the king of arden", "queen", " ".join(TEXTS[:12])]
    together = encoder.embed_passages(titles, texts)
    alone = np.concatenate([encoder.embed_passages([t], [x]) for t, x in zip(titles, texts, strict=True)])
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-6)


def test_the_seed_decides_the_weights_and_leaves_other_randomness_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one, _ = build_encoder(configure().model, TEXTS, seed=1)
    assert torch.equal(torch.rand(1), expected)
    same, _ = build_encoder(configure().model, TEXTS, seed=1)
    other, _ = build_encoder(configure().model, TEXTS, seed=2)
    weights = [next(iter(encoder.state_dict().values())) for encoder in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_dropout_of_the_configuration_reaches_a_loaded_model(bert):
    encoder, _ = load_encoder(Model(source=bert, dropout=0.37), bert)
    rates = {module.p for module in encoder.modules() if isinstance(module, torch.nn.Dropout)}
    assert rates == {0.37}


def test_a_folder_without_an_encoder_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.source .*: no T5 or BERT-like encoder with tokenizer"):
        load_encoder(Model(), tmp_path)


def test_weights_that_a_folder_does_not_have_are_not_made_up(bert, tmp_path):
    """A T5 encoder alone, as of sentence encoders, has no decoder to take a first token from."""
    encoder, tokenizer = build_encoder(configure(pooling="mean").model, TEXTS, seed=0)
    encoder.transformer.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    message = r"model\.source .*: has no weights for \d+ parts, first decoder\..*; set model\.pooling=mean, which"
    with pytest.raises(ConfigError, match=message):
        load_encoder(Model(pooling="first"), tmp_path)
    loaded, _ = load_encoder(Model(pooling="mean"), tmp_path)
    assert all(map(torch.equal, loaded.state_dict().values(), encoder.state_dict().values()))


def test_a_loaded_t5_keeps_no_keys_and_values_for_tokens_that_never_come(tmp_path):
    encoder, tokenizer = build_encoder(configure(pooling="first").model, TEXTS, seed=0)
    encoder.transformer.config.use_cache = True  # as hubs have it
    encoder.transformer.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, _ = load_encoder(Model(pooling="first"), tmp_path)
    ids_BL = torch.ones(2, 5, dtype=torch.int64)
    found = loaded.transformer(input_ids=ids_BL, decoder_input_ids=ids_BL[:, :1])
    assert found.past_key_values is None


def test_too_few_texts_for_a_tokenizer_are_refused():
    with pytest.raises(ConfigError, match=r"model\.scratch: no tokenizer could be trained on the passages"):
        train_tokenizer([], Model().scratch)


def test_several_threads_embed_as_one_does(tmp_path, threads_of_torch):
    encoder = text_encoder(configure(), tmp_path)
    texts = [" ".join(["arden"] * number) for number in range(1, 20)]
    found = []
    for threads in (1, 3, 2):
        threads_of_torch(threads)
        found.append(encoder.embed_passages(texts, texts))
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=1e-5)


def test_threads_that_embed_compute_alone_and_no_other_thread_does(threads_of_torch):
    threads_of_torch(3)
    pool = lone_threads.__wrapped__(3)
    met = threading.Barrier(3)

    def number_of_threads(_):
        torch.ones(100_000).exp()  # an operation that threads can share
        met.wait()  # so that each answers once
        return torch.get_num_threads()

    assert list(pool.map(number_of_threads, range(3))) == [1, 1, 1]
    assert torch.get_num_threads() == 3
    with ThreadPoolExecutor(1) as other:
        assert other.submit(torch.get_num_threads).result() == 3
    pool.shutdown()


@pytest.fixture
def threads_of_torch():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_groups_of_like_length_keep_to_the_token_budget():
    lengths = np.array([5, 100, 7, 7, 60, 1])
    groups = list(length_sorted(lengths, max_tokens=120, max_padding=1000))
    assert [group.tolist() for group in groups] == [[1], [4, 2], [3, 0, 5]]


def test_a_group_has_no_more_padding_than_another_forward_pass_costs():
    lengths = np.array([10, 9, 9, 8, 4, 4, 1])
    groups = list(length_sorted(lengths, max_tokens=1000, max_padding=4))
    assert [group.tolist() for group in groups] == [[0, 1, 2, 3], [4, 5, 6]]
    assert not list(length_sorted(lengths[:0], max_tokens=1000, max_padding=4))


def test_a_prompt_is_the_task_s_name_unless_it_says_otherwise():
    tree = {"name": "x", "artifacts": "a", "tasks": [{"name": "nq"}, {"name": "el", "prompt": ""}]}
    assert [task.prompt for task in contract_tasks(parse_config(tree, "test"))] == ["nq", ""]
    assert isinstance(contract_tasks(parse_config(tree, "test"))[0], ContractTask)
