"""LoRA by peft: train a small part of an encoder, and serve it whole.

Path: encoder → [here] → step, checkpoint.  The frozen encoder gets two thin matrices beside each linear layer; only
these train, so task gradients and what the method and the optimizer keep are a hundredth or less. A checkpoint holds
the merged encoder, which knows nothing of LoRA, and the matrices, from which training goes on.
Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from taskspec.errors import ConfigError
from taskspec.model.encoder import Encoder


def add_lora(encoder: Encoder, rank: int, seed: int) -> Encoder:
    """Freezes the encoder and puts matrices of that rank beside its linear layers, in place; its embeddings stay.

    Args: seed: of the first matrix; the second is 0, so the encoder still gives what it gave.
    Raises: ConfigError if peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError("model.lora needs peft, which is not installed: pip install 'taskspec[lora]'") from error
    settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(settings, encoder.transformer)
    for name, parameter in encoder.transformer.named_parameters():
        parameter.requires_grad = "lora_" in name
    return encoder


def adapters(encoder: Encoder) -> dict[str, Tensor]:
    """The matrices that train, by name."""
    return {name: value for name, value in encoder.transformer.named_parameters() if value.requires_grad}


@torch.no_grad()
def load_adapters(encoder: Encoder, tensors: Mapping[str, Tensor]) -> None:
    for name, value in adapters(encoder).items():
        value.copy_(tensors[name])


def merged(encoder: Encoder) -> Encoder:
    """A copy with the matrices added to the layers they stand beside: an encoder as it was before `add_lora`."""
    from peft.tuners.lora import LoraLayer

    transformer = copy.deepcopy(encoder.transformer)
    for name, layer in list(transformer.named_modules()):
        if isinstance(layer, LoraLayer):
            layer.merge()
            transformer.set_submodule(name, layer.get_base_layer())
    return Encoder(transformer, encoder.pooling, encoder.similarity)
