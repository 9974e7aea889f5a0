"""Token ids to embeddings: T5 or BERT-like encoders by transformers, one for queries and passages.

Path: prompts → [here] → loss, index, retriever.  B texts, L tokens, D the embedding's dimension. `Encoder` is the
module that trains; `TextEncoder` adds the tokenizer and answers in numpy. Cosine models return normalised vectors, so
the dot product is the score everywhere.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from taskspec.config import Config
from taskspec.errors import ConfigError
from taskspec.model.contract import Contract, ContractTask
from taskspec.model.prompts import TextTokenizer, Tokens
from taskspec.sections import Model, Precision, Scratch, Task

EMBED_TOKENS = {"cpu": 4096, "cuda": 16_384}
"""Most tokens of one forward pass when texts are embedded, padding included."""
FORWARD_TOKENS = {"cpu": 40, "cuda": 4096}
"""A forward pass costs by itself, whatever it embeds, about as much as this many tokens: measured with MiniLM on 2
cores, guessed for a GPU."""


class Encoder(nn.Module):
    """A transformer and the rule by which its states become one embedding.

    `precision` is that of the transformer's matrix products; whoever runs the encoder sets it.
    """

    def __init__(
        self, transformer: nn.Module, pooling: Literal["first", "mean"], similarity: Literal["dot", "cosine"]
    ) -> None:
        super().__init__()
        self.precision: Precision = "fp32"
        self.transformer = transformer
        self.pooling = pooling
        self.similarity = similarity

    @property
    def dimension(self) -> int:
        config: Any = self.transformer.config
        return int(config.d_model if config.model_type == "t5" else config.hidden_size)

    def forward(
        self,
        ids_BL: Tensor,
        mask_BL: Tensor,  # 1 for a token, 0 for padding
    ) -> Tensor:  # (B, D)
        config: Any = self.transformer.config
        inputs = {"input_ids": ids_BL, "attention_mask": mask_BL}
        if config.model_type == "t5" and self.pooling == "first":
            inputs["decoder_input_ids"] = torch.full_like(ids_BL[:, :1], config.decoder_start_token_id)
        if self.precision == "bf16":
            with torch.autocast(ids_BL.device.type, torch.bfloat16):
                hidden_BLD: Tensor = self.transformer(**inputs).last_hidden_state.float()
        else:
            hidden_BLD = self.transformer(**inputs).last_hidden_state
        if self.pooling == "first":
            pooled_BD = hidden_BLD[:, 0]
        else:
            weight_BL1 = mask_BL.unsqueeze(-1).to(hidden_BLD.dtype)
            pooled_BD = (hidden_BLD * weight_BL1).sum(1) / weight_BL1.sum(1)
        return nn.functional.normalize(pooled_BD, dim=-1) if self.similarity == "cosine" else pooled_BD


def load_encoder(model: Model, folder: str | Path) -> tuple[Encoder, Any]:
    """An encoder and its tokenizer from a Hugging Face folder or hub id.

    Raises: ConfigError naming the source if it is no T5 or BERT-like encoder, cannot be loaded, or lacks weights.
    """
    from transformers import AutoConfig, AutoModel, AutoTokenizer, T5EncoderModel
    from transformers.utils import logging

    logging.set_verbosity_error()  # no report of heads that an encoder does not use
    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(folder)
        rates = {name: model.dropout for name in _DROPOUT_NAMES if hasattr(config, name)}
        kind = T5EncoderModel if config.model_type == "t5" and model.pooling == "mean" else AutoModel
        # A decoder's cache would hold keys and values of the whole batch, for a second token that never comes.
        parts = {"use_cache": False} if config.model_type == "t5" else {"add_pooling_layer": False}
        transformer, found = kind.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, **parts, **rates
        )
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, TypeError, KeyError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise ConfigError(f"model.source {folder}: no T5 or BERT-like encoder with tokenizer: {first_line}") from error
    if found["missing_keys"]:  # they were filled with random numbers
        missing = sorted(found["missing_keys"])
        way_out = "; set model.pooling=mean, which needs no decoder" if missing[0].startswith("decoder.") else ""
        raise ConfigError(
            f"model.source {folder}: has no weights for {len(missing)} parts, first {missing[0]}{way_out}"
        )
    return Encoder(transformer, model.pooling, model.similarity), tokenizer


_DROPOUT_NAMES = ("dropout_rate", "hidden_dropout_prob", "attention_probs_dropout_prob")


def build_encoder(model: Model, texts: Iterable[str], seed: int) -> tuple[Encoder, Any]:
    """A T5 with random weights and a SentencePiece tokenizer trained on the texts.

    Args: texts: passages and queries of the prepared data, read once. seed: of the weights.
    """
    from transformers import T5EncoderModel, T5Model

    tokenizer = train_tokenizer(texts, model.scratch)
    config = _scratch_config(model, len(tokenizer))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = T5Model(config) if model.pooling == "first" else T5EncoderModel(config)
    return Encoder(transformer, model.pooling, model.similarity), tokenizer


def _scratch_config(model: Model, vocabulary: int) -> Any:
    from transformers import T5Config

    scratch = model.scratch
    return T5Config(
        vocab_size=vocabulary,
        d_model=scratch.width,
        d_kv=scratch.width // scratch.heads,
        d_ff=4 * scratch.width,
        num_layers=scratch.layers,
        num_heads=scratch.heads,
        dropout_rate=model.dropout,
        decoder_start_token_id=0,
        use_cache=False,
    )


class Shapes(NamedTuple):
    """What an encoder's parameters are."""

    trained: list[tuple[int, ...]]
    """Shapes, in the order of the flat vector."""
    frozen: int
    """Elements that LoRA leaves as they are."""


def encoder_shapes(model: Model, source: str | Path | None) -> Shapes:
    """What an encoder's parameters will be, without making or reading them.

    Args: source: what `load_encoder` would load; None is an encoder from nothing.    Raises: ConfigError as it does.
    """
    from transformers import AutoConfig, AutoModel, T5EncoderModel, T5Model

    try:
        config = (
            _scratch_config(model, model.scratch.vocabulary) if source is None else AutoConfig.from_pretrained(source)
        )
        with torch.device("meta"):
            if config.model_type == "t5":
                transformer: Any = T5Model(config) if model.pooling == "first" else T5EncoderModel(config)
            else:
                transformer = AutoModel.from_config(config, add_pooling_layer=False)
            if model.lora is not None:
                from taskspec.model.lora import add_lora

                add_lora(Encoder(transformer, model.pooling, model.similarity), model.lora, seed=0)
    except (OSError, ValueError, TypeError, KeyError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise ConfigError(f"model.source {source}: no T5 or BERT-like encoder: {first_line}") from error
    parameters = list(transformer.parameters())
    return Shapes(
        [tuple(parameter.shape) for parameter in parameters if parameter.requires_grad],
        sum(parameter.numel() for parameter in parameters if not parameter.requires_grad),
    )


def require_positions(encoder: Encoder, config: Config) -> None:
    """Raises: ConfigError naming a length of the configuration for which the encoder has no positions; those of T5 are
    relative and do not end."""
    transformer: Any = encoder.transformer
    embeddings = getattr(transformer, "embeddings", None)
    table = getattr(embeddings, "position_embeddings", None)
    if table is None:
        return
    # RoBERTa and its like begin after the padding's.
    most = table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
    lengths = {f"tasks.{task.name}.max_query_tokens": task.max_query_tokens for task in config.trained_tasks}
    for name, length in {"model.max_passage_tokens": config.model.max_passage_tokens, **lengths}.items():
        if length > most:
            raise ConfigError(f"{name} is {length}, model.source has positions for {most} tokens; lower it")


def train_tokenizer(texts: Iterable[str], scratch: Scratch) -> Any:
    """A T5 tokenizer with at most `scratch.vocabulary` pieces, ten sentinels among them.

    Raises: ConfigError if the texts are too few for any vocabulary.
    """
    import sentencepiece
    from transformers import T5Tokenizer

    sentinels = 10
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer"
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts),
                model_prefix=str(path),
                vocab_size=scratch.vocabulary - sentinels,
                hard_vocab_limit=False,
                model_type="unigram",
                pad_id=0,
                eos_id=1,
                unk_id=2,
                bos_id=-1,
                num_threads=1,  # the pieces then depend on the texts alone
                minloglevel=2,
            )
        except RuntimeError as error:
            raise ConfigError(f"model.scratch: no tokenizer could be trained on the passages: {error}") from error
        pieces = sentencepiece.SentencePieceProcessor(model_file=f"{path}.model")
    vocabulary = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(pieces.get_piece_size())]
    vocabulary += [(f"<extra_id_{i}>", 0.0) for i in reversed(range(sentinels))]
    return T5Tokenizer(vocab=vocabulary, extra_ids=sentinels)


def text_tokenizer(config: Config, tokenizer: Any) -> TextTokenizer:
    """The tokenizer with the prompts and lengths of a configuration."""
    return TextTokenizer(tokenizer, config.prompts, contract_tasks(config), config.model.max_passage_tokens)


def contract_task(task: Task) -> ContractTask:
    """What of a configured task enters a contract."""
    return ContractTask(name=task.name, prompt=task.prompt_text, max_query_tokens=task.max_query_tokens, keep=task.keep)


def contract_tasks(config: Config) -> tuple[ContractTask, ...]:
    """Those that a configuration trains."""
    return tuple(map(contract_task, config.trained_tasks))


def make_contract(config: Config, encoder: Encoder, folder: Path) -> Contract:
    """The contract of an encoder saved in a Hugging Face folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        digest.update(path.name.encode() + b"\0")
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return Contract(
        name=config.name,
        weights=digest.hexdigest(),
        tasks=contract_tasks(config),
        prompts=config.prompts,
        pooling=config.model.pooling,
        similarity=config.model.similarity,
        max_passage_tokens=config.model.max_passage_tokens,
        dimension=encoder.dimension,
    )


def save_encoder(config: Config, encoder: Encoder, tokenizer: Any, folder: Path) -> Contract:
    """Writes a Hugging Face folder and, beside its files, `taskspec.json`. Returns: the contract in it."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    transformer: Any = encoder.transformer
    transformer.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    contract = make_contract(config, encoder, folder)
    text = json.dumps(contract.model_dump(mode="json"), indent=1, ensure_ascii=False)
    (folder / "taskspec.json").write_text(text, encoding="utf-8")
    return contract


class TextEncoder:
    """An encoder with its tokenizer: texts in, numpy embeddings out; no gradients, no dropout.

    Example:
        embeddings_BD, truncated_B = encoder.embed_queries("nq", ["who wrote Faust"])
    """

    def __init__(self, encoder: Encoder, tokenizer: Any, contract: Contract, device: str = "cpu") -> None:
        self.encoder = encoder.to(device).eval()
        self.contract = contract
        self.device = device
        self.tokenizer = TextTokenizer(tokenizer, contract.prompts, contract.tasks, contract.max_passage_tokens)

    @property
    def dimension(self) -> int:
        return self.contract.dimension

    def with_tasks(self, tasks: Sequence[ContractTask]) -> TextEncoder:
        """The same weights answering these tasks instead, trained on them or not.

        Raises: ConfigError if a prompt leaves no room for a task's text.
        """
        contract = self.contract.model_copy(update={"tasks": tuple(tasks)})
        return TextEncoder(self.encoder, self.tokenizer.tokenizer, contract, self.device)

    def embed_queries(self, task: str, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Returns: (B, D) float32 and (B,) bool, which queries were cut. Raises: RequestError for an unknown task."""
        tokens = self.tokenizer.queries(task, texts)
        return self.embed_tokens(tokens), tokens.truncated_B

    def embed_passages(self, titles: Sequence[str], texts: Sequence[str]) -> np.ndarray:
        """Returns: (N, D) float32."""
        return self.embed_tokens(self.tokenizer.passages(titles, texts))

    def embed_tokens(self, tokens: Tokens) -> np.ndarray:
        """Returns: (B, D) float32, by the model alone."""
        result_BD = np.empty((len(tokens.ids_BL), self.dimension), dtype=np.float32)
        lengths_B = tokens.mask_BL.sum(1)
        kind = torch.device(self.device).type
        threads = torch.get_num_threads() if kind == "cpu" else 1
        longest = int(lengths_B.max(initial=1))
        share = math.ceil(lengths_B.sum() / threads / longest) * longest  # of a thread, if all texts were as long
        groups = list(length_sorted(lengths_B, min(share, EMBED_TOKENS[kind]), FORWARD_TOKENS[kind]))

        @torch.inference_mode()
        def embed(rows: np.ndarray) -> None:
            longest = int(lengths_B[rows].max())
            ids_BL = torch.from_numpy(tokens.ids_BL[rows, :longest]).to(self.device)
            mask_BL = torch.from_numpy(tokens.mask_BL[rows, :longest]).to(self.device)
            result_BD[rows] = self.encoder(ids_BL, mask_BL).float().cpu().numpy()

        if threads == 1 or len(groups) == 1:
            for rows in groups:
                embed(rows)
        else:
            deque(lone_threads(threads).map(embed, groups), maxlen=0)
        return result_BD


@cache
def lone_threads(count: int) -> ThreadPoolExecutor:
    """Threads of which each computes by itself.

    Several that share one matrix product wait for the slowest at each step, which is slow indeed where other processes
    take time from one of the cores.
    """
    pool = ThreadPoolExecutor(count, "embed", _compute_alone)
    started = threading.Barrier(count)
    for waited in [pool.submit(started.wait) for _ in range(count)]:
        waited.result()
    torch.set_num_threads(count)  # the number that threads to come begin with was set to 1 too
    return pool


def _compute_alone() -> None:
    torch.get_num_threads()  # a thread that has not asked yet takes the process's number at its first operation
    torch.set_num_threads(1)


def length_sorted(lengths_B: np.ndarray, max_tokens: int, max_padding: int) -> Iterator[np.ndarray]:
    """Row numbers in groups of like length, longest first.

    Args: max_tokens: of a group padded to its longest. max_padding: of these, those that are padding: where a group
        would have more, another one costs less.
    """
    order_B = np.argsort(-lengths_B, kind="stable")
    start = padding = 0
    for number, length in enumerate(lengths_B[order_B].tolist()):
        longest = int(lengths_B[order_B[start]])
        padding += longest - length
        if number > start and (padding > max_padding or (number + 1 - start) * longest > max_tokens):
            yield order_B[start:number]
            start, padding = number, 0
    if len(order_B):
        yield order_B[start:]
