"""Checkpoints: everything needed to resume or to serve, published whole with a manifest.

Path: worker → [here] → index, mine, evaluate, serve.  A checkpoint folder is a Hugging Face folder (weights, tokenizer)
with `taskspec.json` (the contract) and `training.safetensors` (optimizer, sensitivities). Step and dropout need no
state: data and randomness are functions of (seed, step, worker).

A run folder holds `step-00000100/` checkpoints and `run.json`, which names the last and the best one.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from taskspec import artifacts, store
from taskspec.config import Config, canonical_sha256, parse_config
from taskspec.errors import TrainingError
from taskspec.model.contract import Contract
from taskspec.model.encoder import Encoder, TextEncoder, load_encoder, save_encoder
from taskspec.model.lora import adapters, add_lora, load_adapters, merged
from taskspec.sections import Precision
from taskspec.specialize.methods import carried

KIND = "checkpoint"
STATE_FILE = "training.safetensors"
ADAPTER = "adapter."
"""What names of LoRA matrices begin with in the state file."""
BASE = "base"
"""Folder of a run with LoRA: the frozen encoder, as a checkpoint."""


def publish_checkpoint(
    uri: str,
    config: Config,
    encoder: Encoder,
    tokenizer: Any,
    *,
    step: int,
    state: Mapping[str, Tensor],
    inputs: Mapping[str, str],
    dev_accuracy: Mapping[str, float],
    begun_by: str = "",
) -> Contract:
    """Writes one checkpoint.

    Args: inputs: ids of prepared data and negatives. begun_by: `Manifest.code` of the one that this start went on from.
    Returns: its contract.
    """
    facts: dict[str, Any] = {"step": step, "dev_accuracy": dict(dev_accuracy)}
    tree = config.model_dump(mode="json")
    with artifacts.publishing(uri, KIND, inputs=inputs, config=tree, facts=facts, begun_by=begun_by) as folder:
        trains = {f"{ADAPTER}{name}": value for name, value in adapters(encoder).items()} if _has_lora(encoder) else {}
        contract = save_encoder(config, merged(encoder) if trains else encoder, tokenizer, folder)
        tensors = {name: value.detach().cpu().contiguous() for name, value in {**state, **trains}.items()}
        safetensors.torch.save_file(tensors, folder / STATE_FILE)
        facts["contract"] = contract.model_dump(mode="json")
        facts["fingerprint"] = contract.fingerprint
    return contract


def _has_lora(encoder: Encoder) -> bool:
    return not all(parameter.requires_grad for parameter in encoder.parameters())


def read_contract(uri: str) -> Contract:
    """The contract of a checkpoint, without loading the model."""
    return Contract.model_validate(artifacts.read_manifest(uri, KIND).facts["contract"])


def open_encoder(uri: str, device: str = "cpu", precision: Precision = "fp32") -> TextEncoder:
    """A checkpoint's encoder, ready to embed. Raises: ArtifactError if the checkpoint is incomplete or altered."""
    artifact = artifacts.open_artifact(uri, KIND, verify=True)
    config = parse_config(artifact.manifest.config, uri)
    encoder, tokenizer = load_encoder(config.model, artifact.folder)
    encoder.precision = precision
    return TextEncoder(encoder, tokenizer, Contract.model_validate(artifact.manifest.facts["contract"]), device)


@dataclass(frozen=True)
class TrainingState:
    """A checkpoint opened to go on training from."""

    step: int
    encoder: Encoder
    tokenizer: Any
    tensors: dict[str, Tensor]


def open_training(uri: str, config: Config) -> TrainingState:
    """Opens a checkpoint to resume. Raises: TrainingError if it was trained under another configuration."""
    artifact = artifacts.open_artifact(uri, KIND, verify=True)
    theirs = parse_config(artifact.manifest.config, uri)
    changed = _differences(theirs, config)
    if changed:
        raise TrainingError(
            f"{uri}: was trained with other values of {', '.join(changed)}; "
            f"take them back, or start in a new folder with --out"
        )
    tensors = safetensors.torch.load_file(artifact.folder / STATE_FILE)
    trained = {name: tensors.pop(name) for name in list(tensors) if name.startswith(ADAPTER)}
    if config.model.lora is None:
        encoder, tokenizer = load_encoder(config.model, artifact.folder)
    else:
        base = artifacts.open_artifact(store.join(uri.rstrip("/").rpartition("/")[0], BASE), KIND, verify=True)
        encoder, tokenizer = load_encoder(config.model, base.folder)
        add_lora(encoder, config.model.lora, config.seed)
        if trained:
            load_adapters(encoder, {name.removeprefix(ADAPTER): value for name, value in trained.items()})
    return TrainingState(artifact.manifest.facts["step"], encoder, tokenizer, tensors)


def open_start(uri: str, config: Config) -> TrainingState:
    """Opens a checkpoint to train other tasks from: its weights and, with `taco`, the sensitivities of the tasks that
    both have; not where either trains LoRA's matrices, which are others each time.

    The optimizer, the schedule and the warm-up begin anew.
    Raises: TrainingError if it makes its embeddings in another way.
    """
    artifact = artifacts.open_artifact(uri, KIND, verify=True)
    contract = Contract.model_validate(artifact.manifest.facts["contract"])
    for name in ("pooling", "similarity"):
        theirs, mine = getattr(contract, name), getattr(config.model, name)
        if theirs != mine:
            raise TrainingError(f"{uri}: was trained with model.{name} {theirs}, this run has {mine}; take {theirs}")
    encoder, tokenizer = load_encoder(config.model, artifact.folder)
    theirs = parse_config(artifact.manifest.config, uri)
    tensors: dict[str, Tensor] = {}
    # Other methods' weights are about the tasks that were, and sensitivities of LoRA's matrices about those matrices.
    adapted = theirs.model.lora is not None or config.model.lora is not None
    if theirs.specialization.method == config.specialization.method == "taco" and not adapted:
        kept = safetensors.torch.load_file(artifact.folder / STATE_FILE)
        state = {name: value for name, value in kept.items() if name.startswith("method.")}
        tasks = [task.name for task in config.trained_tasks]
        tensors = carried(state, [task.name for task in contract.tasks], tasks)
    return TrainingState(0, encoder, tokenizer, tensors)


_DECIDES_TRAINING = ("seed", "tasks", "prompts", "model", "contrastive", "mixing", "specialization")
_MAY_CHANGE_IN_TRAIN = {
    "workers", "threads", "gpu", "distribution", "chunk_texts", "gradient_checkpointing", "max_bad_steps",
    "compare_every", "checkpoint_every", "log_every", "max_failures",
}  # fmt: skip
"""What decides rounding, memory or what is watched, but not what is learned."""


def training_identity(config: Config) -> dict[str, Any]:
    """The part of a configuration that decides a run's weights: a checkpoint resumes only under the same."""
    tree = config.model_dump(mode="json", include=set(_DECIDES_TRAINING))
    for task in tree["tasks"]:
        del task["train"], task["dev"]  # files reach training as prepared data, which has its own id
    del tree["model"]["source"]  # as does the encoder: `encoder_id`
    tree["train"] = config.train.model_dump(mode="json", exclude=_MAY_CHANGE_IN_TRAIN)
    return tree


def run_identity(config: Config) -> dict[str, Any]:
    """The part of a configuration that decides which weights are a run's best: also how often there is a checkpoint."""
    return {**training_identity(config), "checkpoint_every": config.train.checkpoint_every}


def encoder_id(config: Config) -> str:
    """What tells the encoder that training starts from: sha256 (hex) of a local folder's files, a hub id as it is, and
    "" for one from scratch, which the configuration describes."""
    source = config.model.source
    return _folder_sha256(source) if source and Path(source).is_dir() else source or ""


@functools.cache  # a sweep asks for each of its trials
def _folder_sha256(folder: str) -> str:
    return canonical_sha256({path.name: store.file_sha256(path) for path in Path(folder).iterdir() if path.is_file()})


def _differences(a: Config, b: Config) -> list[str]:
    mine, theirs = training_identity(a), training_identity(b)
    return [
        f"{section}.{key}" if key else section
        for section in mine
        for key in (mine[section] if isinstance(mine[section], dict) else [""])
        if (mine[section][key] != theirs[section][key] if key else mine[section] != theirs[section])
    ]


UNMEASURED = -1.0
"""Below every accuracy."""


@dataclass(frozen=True)
class Run:
    """The state of a run folder, as `run.json` has it."""

    uri: str
    last: str
    """Folder name of the newest checkpoint."""
    best: str
    """Folder name of the newest one whose mean dev accuracy is within a standard error of the highest: what dev queries
    cannot tell apart, more training may. The newest where there are none."""
    best_accuracy: float
    """Of `best`; UNMEASURED for one without."""
    highest_accuracy: float
    """Of all there were; UNMEASURED where none has any."""
    finished: bool

    @property
    def last_uri(self) -> str:
        return store.join(self.uri, self.last)

    @property
    def best_uri(self) -> str:
        return store.join(self.uri, self.best)


def read_run(uri: str) -> Run | None:
    """The run in a folder, or None if none has published a checkpoint there."""
    name = store.join(uri, "run.json")
    return Run(uri=uri, **json.loads(store.read_bytes(name))) if store.exists(name) else None


def add_to_run(
    run: Run | None, uri: str, folder: str, accuracy: float | None, error: float = 0.0, *, finished: bool
) -> Run:
    """Names a newly published checkpoint in `run.json` and removes the one that is now neither last nor best.

    Args: accuracy: mean dev accuracy; None where there are no dev queries, and of the untrained encoder. error: its
        standard error.
    """
    highest = max(UNMEASURED if run is None else run.highest_accuracy, UNMEASURED if accuracy is None else accuracy)
    best, best_accuracy = folder, UNMEASURED if accuracy is None else accuracy
    if run is not None and accuracy is not None and accuracy + error < highest:
        best, best_accuracy = run.best, run.best_accuracy
    new = Run(uri, folder, best, best_accuracy, highest, finished)
    write_run(new)
    for old in {run.last, run.best} - {new.last, new.best} if run else ():
        artifacts.remove(store.join(uri, old))
    return new


def write_run(run: Run) -> None:
    values = {name: value for name, value in asdict(run).items() if name != "uri"}
    store.write_bytes(store.join(run.uri, "run.json"), json.dumps(values, indent=1).encode())
