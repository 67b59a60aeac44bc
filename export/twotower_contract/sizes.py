"""Sizes of a model: the parts of a tower, their parameters, and the states of a context."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from typing import Final

from twotower_contract.config import ModelConfig
from twotower_contract.layout import BASE_PREFIX, HEADS, Tower, expected_tensors
from twotower_contract.quantized import is_quantizable

PARTS: Final = (
    "embeddings",
    "mamba",
    "attention",
    "router",
    "shared experts",
    "routed experts",
    "norms",
    "head",
    "time conditioning",
)
"""Parts of a tower, in the order in which they are listed."""

MIXER_PARTS: Final = {"M": "mamba", "*": "attention"}
EXPERT_PARTS: Final = {
    ".experts.": "routed experts",
    ".shared_experts.": "shared experts",
    ".gate.": "router",
}
"""Text in a tensor's name -> the part of a layer of experts."""

SSM_ITEM: Final = 4  # the SSM state is float32 whatever the weights are


def part_of(config: ModelConfig, name: str, *, base: bool = False) -> tuple[Tower, str]:
    """Return tower and part of a tensor; `base` for names of the single-tower base checkpoint."""
    if name == HEADS["context"] or (base and name == HEADS["denoiser"]):
        return "context", "head"
    if name == HEADS["denoiser"]:
        return "denoiser", "head"
    prefix, _, rest = name.partition(".")
    if prefix not in ("context_tower", "denoiser_tower", BASE_PREFIX):
        return "denoiser", "time conditioning"
    tower: Tower = "denoiser" if prefix == "denoiser_tower" else "context"
    if rest.startswith("embeddings."):
        return tower, "embeddings"
    layer = re.match(r"layers\.(\d+)\.mixer\.", rest)
    if layer is None:
        return tower, "norms"
    kind = config.pattern[int(layer[1])]
    if kind in MIXER_PARTS:
        return tower, MIXER_PARTS[kind]
    return tower, next(part for mark, part in EXPERT_PARTS.items() if mark in name)


def is_narrow_by_default(config: ModelConfig, name: str, *, base: bool = False) -> bool:
    """Whether a tensor becomes narrow where a recipe says nothing else.

    NVIDIA's FP8 and NVFP4 files of Nemotron-3-Nano keep attention, the Mamba layer before each
    attention, and heads in 16 bits; what is no matrix of a product is never narrow.
    """
    part = part_of(config, name, base=base)[1]
    if not is_quantizable(name) or part in ("attention", "head"):
        return False
    guarded = [index - 1 for index in config.layers_of_kind["*"] if index]
    return part != "mamba" or not any(f".layers.{index}.mixer." in name for index in guarded)


@functools.cache
def parts_of_tower(config: ModelConfig, tower: Tower) -> Mapping[str, int]:
    """Return the parameters of each part of a tower; embeddings and head are its own."""
    sizes = dict.fromkeys(PARTS, 0)
    for name, shape in expected_tensors(config, (tower,)).items():
        sizes[part_of(config, name)[1]] += math.prod(shape)
    return sizes


@functools.cache
def narrow_parameters(config: ModelConfig, tower: Tower) -> Mapping[str, int]:
    """Return the parameters of each part of a tower that become narrow by default."""
    sizes = dict.fromkeys(PARTS, 0)
    for name, shape in expected_tensors(config, (tower,)).items():
        if is_narrow_by_default(config, name):
            sizes[part_of(config, name)[1]] += math.prod(shape)
    return sizes


def uniform_experts(tokens: float, experts: int, chosen: int) -> float:
    """Return the expected number of distinct experts if each token chose at random.

    All tokens miss an expert with probability (1 - chosen / experts)^tokens. Real routing is more
    concentrated.
    """
    return experts * (1.0 - math.pow(1.0 - chosen / experts, tokens)) if experts else 0.0


def kv_bytes_per_token(config: ModelConfig, item: int) -> int:
    """Return the bytes of keys and values that one context token leaves, all layers together."""
    return len(config.layers_of_kind["*"]) * 2 * config.kv_width * item


def ssm_bytes(config: ModelConfig) -> int:
    """Return the bytes of the SSM states of one sequence, in float32."""
    return len(config.layers_of_kind["M"]) * config.d_inner * config.ssm_state_size * SSM_ITEM


def conv_bytes(config: ModelConfig, item: int) -> int:
    """Return the bytes of the convolution histories of one sequence: the newest raw columns."""
    return len(config.layers_of_kind["M"]) * (config.conv_kernel - 1) * config.conv_dim * item
