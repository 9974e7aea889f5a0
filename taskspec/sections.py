"""The sections of the configuration: every key with its default, its unit and what its ends mean.

Every value has one default, here; `config.py` puts the sections together and reads them from YAML.
"""

from __future__ import annotations

import string
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Section(BaseModel):
    """A group of keys: unknown ones refused, values frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Task(Section):
    """One retrieval job."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """Identifies the task everywhere: files, batches, HTTP. Lower-case letters, digits, - and _."""
    prompt: str | None = None
    """What `{prompt}` becomes in `prompts.query`; None is the task's name, "" is no prompt."""
    train: tuple[str, ...] = ()
    """KILT-format files to train on: .jsonl or .jsonl.gz, local or s3://."""
    dev: tuple[str, ...] = ()
    """KILT-format files to choose checkpoints by and to evaluate on."""
    max_query_tokens: int = Field(32, ge=4)
    """Longest query in tokens, prompt and special tokens included; what is over is cut."""
    keep: Literal["beginning", "end", "mention"] = "beginning"
    """Which part of a longer input stays: dialogues their `end`, entity linking a window round the
    `mention` ([START_ENT] … [END_ENT]), all else the `beginning`."""

    @property
    def prompt_text(self) -> str:
        return self.name if self.prompt is None else self.prompt


class Data(Section):
    """From KILT files to prepared data."""

    folder: str = "."
    """Where relative paths of files begin, those of tasks too: a local folder or s3://…."""
    knowledge_source: tuple[str, ...] = ()
    """Page files in KILT's format: .jsonl or .jsonl.gz, local or s3://; `*` is expanded."""
    passage_words: int = Field(100, ge=10)
    """Pages are cut into passages of about this many words."""
    other_pages: int | None = Field(None, ge=0)
    """How many pages beside the gold ones enter the index; None is all of them."""
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """Share of records of one file that may go to quarantine before the job stops."""


class Prompts(Section):
    """The text around queries and passages, the same in training, mining, evaluating and serving."""

    query: str = "{prompt} <extra_id_1> {text}"
    """`{prompt}` is the task's prompt, `{text}` its input. The paper: task name and a sentinel."""
    passage: str = "Title: {title} Text: {text}"

    @model_validator(mode="after")
    def _fields_are_known(self) -> Self:
        _require_fields("prompts.query", self.query, required={"text"}, allowed={"text", "prompt"})
        _require_fields("prompts.passage", self.passage, required={"title", "text"}, allowed={"title", "text"})
        if not self.query.endswith("{text}"):
            raise ValueError(f"prompts.query must end with {{text}} (only the text is cut) but is {self.query!r}")
        return self


def _require_fields(key: str, template: str, *, required: set[str], allowed: set[str]) -> None:
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(f"{key} is no template ({error}): {template!r}") from error
    if not required <= set(names) <= allowed or len(names) != len(set(names)):
        fields = ", ".join(f"{{{name}}}" for name in sorted(required))
        optional = ", ".join(f"{{{name}}}" for name in sorted(allowed - required))
        hint = f" and at most once {optional}" if optional else ""
        raise ValueError(f"{key} must contain exactly once {fields}{hint} but is {template!r}")


Precision = Literal["fp32", "bf16"]
"""Of a transformer's matrix products; weights, sums, losses and updates stay fp32 with either."""


KindName = Literal["flat", "fp16", "sq8", "ivf", "hnsw", "pq"]
"""A kind of index; `taskspec/index/kinds.py` describes each."""


class Scratch(Section):
    """A T5 trained from nothing, with a SentencePiece tokenizer trained on the prepared passages."""

    vocabulary: int = Field(4000, ge=200)
    width: int = Field(128, ge=8)
    """Width of the embedding and of the residual stream (d_model)."""
    layers: int = Field(2, ge=1)
    heads: int = Field(4, ge=1)


class Model(Section):
    """The encoder, tied for queries and passages."""

    source: str | None = None
    """Folder or hub id of a T5 or BERT-like encoder; None builds one from `scratch`."""
    scratch: Scratch = Scratch()
    pooling: Literal["first", "mean"] = "first"
    """`first`: T5's first decoder token, BERT's first token. `mean`: over the encoder's tokens."""
    similarity: Literal["dot", "cosine"] = "dot"
    dropout: float = Field(0.1, ge=0, lt=1)
    lora: int | None = Field(None, ge=1)
    """Rank of LoRA matrices that train instead of the encoder itself, which stays frozen; None trains all of it. They
    want a learning rate some ten times as high."""
    max_passage_tokens: int = Field(160, ge=8)
    """Longest passage in tokens, prompt and special tokens included; its beginning stays."""


class Contrastive(Section):
    """The loss of one task's batch."""

    temperature: float = Field(1.0, gt=0)
    """Scores are divided by it before the softmax. Cosine lies in [−1, 1] and needs about 0.05."""
    negatives: int = Field(2, ge=0)
    """Given negatives per query beside the positive: the paper's 3 passages per query are 2 here."""


class Mixing(Section):
    """How many queries of each task are in a step."""

    queries_per_step: int = Field(64, ge=2)
    """Queries of all tasks and all workers together in one step."""
    temperature: float = Field(4.0, gt=0)
    """Shares follow n^(1/temperature) of the tasks' sizes; 1 is proportional, large is equal."""


class Specialization(Section):
    """How task gradients become one update."""

    method: Literal["mean", "taco", "single", "pcgrad", "cgd", "gradnorm"] = "taco"
    """`mean`: plain multitask. `taco`: weights per row. `single`: exactly one task. `pcgrad`: task gradients
    projected off each other. `cgd`, `gradnorm`: one weight per task, by how tasks help each other or by how far each
    has come."""
    strength: float = Field(1.0, ge=0)
    """1/τ. 0 is plain multitask training; larger specializes more."""
    decay: float = Field(0.0, ge=0, lt=1)
    """β of the moving average of sensitivities; 0 takes this step's alone. The paper's code has 0.999, which was not
    shown to help (benchmarks/README.md)."""
    shrinkage: bool = False
    """Draw each task's sensitivities to the tasks' mean, by how much of them is noise from step to step in that layer:
    for tasks with few queries a step."""
    warmup: float = Field(0.1, ge=0, le=1)
    """Share of the steps with equal weights; then strength grows from 0 over as many steps again."""
    min_warmup_steps: int = Field(100, ge=0)
    """Warm-up lasts at least this many steps, but no more than a quarter of the run because of it."""
    cgd_step: float = Field(5e-4, gt=0)
    """Step size of `cgd`'s task weights, which grow by its exponential at every step: at 0.05 a few tasks have nearly
    all after some hundred of them (benchmarks/README.md)."""
    gradnorm_step: float = Field(0.025, gt=0)
    """Step size of `gradnorm`'s task weights."""
    gradnorm_restoring: float = Field(1.5, ge=0)
    """`gradnorm`'s α: how strongly tasks that have learned less are favoured."""


class Train(Section):
    """One training run."""

    tasks: tuple[str, ...] | None = None
    """Train only these; None is all. Queries per step of a task are those of the full mixing."""
    steps: int = Field(1000, ge=0)
    """Updates; 0 publishes the untrained encoder as a checkpoint."""
    learning_rate: float = Field(1e-5, gt=0)
    lr_warmup: float = Field(0.1, ge=0, le=1)
    """Share of the steps over which the learning rate grows linearly; it then falls linearly to 0."""
    clip_norm: float = Field(1.0, gt=0)
    workers: int = Field(1, ge=1)
    """Ray Train processes."""
    distribution: Literal["replicated", "sharded", "task_parallel"] = "sharded"
    """`replicated`: every worker has its part of every task's queries and does the whole update. `sharded`: the same
    parts, and each worker updates its share of the parameters: half the bytes on the wire, 1/workers of the state.
    `task_parallel`: every worker has whole tasks, and updates its share."""
    chunk_texts: int | None = Field(None, ge=1)
    """Texts embedded at a time. Activations of earlier ones are not kept but made again, so memory does not grow with
    queries per step, for one more forward pass. None embeds a task's queries, and its passages, at once."""
    gradient_checkpointing: bool = False
    """Keep activations between the transformer's layers only: less memory for one more forward pass."""
    max_bad_steps: int = Field(10, ge=0)
    """A step whose gradient is not finite is skipped by all workers; the run stops at one more than so many."""
    compare_every: int = Field(100, ge=1)
    """Steps between two comparisons of the workers' parameters, and of what their method keeps, by checksums."""
    threads: int | None = Field(None, ge=1)
    """Intra-op threads per worker; None is the CPUs that the node may use / workers."""
    precision: Precision = "fp32"
    """bf16 takes about half the time where the processor multiplies it (AVX512-BF16, AMX, GPUs from Ampere on)."""
    gpu: bool = False
    """One GPU per worker and NCCL; otherwise CPU and gloo."""
    checkpoint_every: int = Field(100, ge=1)
    log_every: int = Field(10, ge=1)
    dev_queries: int = Field(64, ge=2)
    """Dev queries per task that in-batch accuracy is measured on, at every checkpoint. The newest checkpoint that is
    within a standard error of the highest is the run's best."""
    max_failures: int = Field(3, ge=0)
    """How often the workers are restarted from the last checkpoint before the run gives up."""


class Negatives(Section):
    """Lexical negatives."""

    depth: int = Field(50, ge=1)
    """BM25 hits per query that negatives are taken from."""
    per_query: int = Field(10, ge=1)
    """Negatives kept per query, best first, gold pages excluded."""


class Index(Section):
    """From a checkpoint to FAISS shards."""

    kind: KindName = "flat"
    """`flat` is exact. `fp16` and `sq8` take a half and a quarter of its memory; `ivf` and `hnsw` visit a part of the
    passages; `pq` finds candidates by four bits for eight dimensions. `jobs.index --plan` compares them."""
    recall: float = Field(0.95, gt=0, le=1)
    """Share of the exact best passages that each task's searches are to find: of kinds that can try harder, each task
    takes the least effort that reaches it; an index that does not reach it is not published."""
    recall_at: int = Field(10, ge=1)
    """How many best passages that is measured on."""
    recall_queries: int = Field(200, ge=1)
    """Dev queries per task that it is measured with; where searches can try harder, half of them choose how hard and
    the others measure."""
    shards: int = Field(1, ge=1)
    actors: int = Field(1, ge=1)
    """Embedding processes."""
    batch_size: int = Field(256, ge=1)
    """Passages that an actor embeds per call; it sorts them by length into smaller batches."""
    precision: Precision = "fp32"
    """Of the passages' embedding, as `train.precision`."""
    gpu: bool = False
    """One GPU per actor; FAISS stays on CPUs."""
    lexical: bool = False
    """Also a BM25 index of the passages, so that searches can fuse both rankings."""


class Evaluate(Section):
    """What is measured on the dev files."""

    top_k: int = Field(100, ge=1)
    """Pages retrieved per query."""
    at: tuple[int, ...] = (1, 5, 20)
    """The k of precision@k, recall@k and success_rate@k."""

    @field_validator("at")
    @classmethod
    def _positive(cls, at: tuple[int, ...]) -> tuple[int, ...]:
        if not at or min(at) < 1:
            raise ValueError(f"needs numbers ≥ 1 but got {list(at)}")
        return at

    @model_validator(mode="after")
    def _reaches(self) -> Self:
        if self.top_k < max(self.at):
            raise ValueError(f"top_k is {self.top_k} but at asks for recall@{max(self.at)}; set top_k to that or more")
        return self


class Cluster(Section):
    """The Ray cluster."""

    local_cpus: int = Field(4, ge=1)
    """Logical CPUs of the Ray that a job starts when it is not submitted to a cluster. Training
    takes one per worker, Ray Data needs some beside them."""
    wait_s: float = Field(1200, ge=0)
    """How long a job waits for an autoscaler to bring what it needs before it says so and ends: a node with a GPU takes
    minutes to start and to fetch its image."""


class Sweep(Section):
    """Comparison of arms over seeds, on Ray Tune."""

    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field((0, 1, 2), min_length=1)
    concurrent: int = Field(1, ge=1)
    """Trials at the same time."""
    keep_indexes: bool = False
    """Indexes are removed once their checkpoint is measured; true keeps them."""
