"""Figures of compiled engines: kernels, bytes beside weights and states, and scratch memory.

`data/compiled.json` is made by `benchmarks/compiled_tables.py` of what TensorRT-RTX's compiler says
of towers of the released width: as they are (`bodies`), with FP8 weights (`codes`), and cut at our
plugins (`kernels`). A model of another width is scaled by what its layers hold, and another dtype
by its size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from twotower_contract.config import ModelConfig
from twotower_contract.json_file import read_json
from twotower_contract.quantized import FORMATS
from twotower_contract.traffic import ENDS
from twotower_engines.errors import PlanError

TABLE_FILE: Final = Path(__file__).with_name("data") / "compiled.json"
FORMAT: Final = "twotower-compiled"
FORMAT_VERSION: Final = 1
ITEM: Final = 2
"""Bytes of an activation in the compiled towers."""

COPYING: Final = frozenset({"8.0", "8.6"})
"""Compute capabilities whose attention reads copies of the caches, made anew in every call."""

Way = Literal["bodies", "codes", "kernels"]
"""Function bodies alone, the same on quantized weights, or our kernels in place of three bodies."""


@dataclass(frozen=True, slots=True)
class CompiledTower:
    """A tower's figures for one model.

    Attributes:
        kernels: Kind of layer, or `ends`, to kernels of one such layer.
        moved: Kind to terms, and these to bytes: what a layer moves beside weights and states.
        scratch: Terms of the scratch memory, in bytes.
        scales: Kind, or `scratch`, to the model's share of the compiled width.
    """

    kernels: Mapping[str, float]
    moved: Mapping[str, Mapping[str, float]]
    scratch: Mapping[str, float]
    scales: Mapping[str, float]

    def call_kernels(self, pattern: str) -> float:
        """Return the kernels of a call of a tower with these layers."""
        return self.kernels[ENDS] + sum(self.kernels[kind] for kind in pattern)

    def moved_bytes(self, pattern: str, rows: int, tokens: int, context: int) -> float:
        """Return what a call moves beside weights and states."""
        kinds = {**{kind: pattern.count(kind) for kind in set(pattern)}, ENDS: 1}
        return sum(
            count * self.scales[kind] * value_of_terms(self.moved[kind], rows, tokens, context)
            for kind, count in kinds.items()
        )

    def scratch_bytes(self, rows: int, tokens: int, context: int) -> int:
        """Return the scratch memory of an engine whose largest call has these sizes."""
        terms = value_of_terms(self.scratch, rows, tokens, context)
        return math.ceil(self.scales["scratch"] * terms)


def way_of(has_kernels: bool, precision: str) -> Way:
    """Return what engines run.

    Args:
        has_kernels: Whether our kernels take the place of the ops' function bodies.
        precision: Precision of the weights.
    """
    if has_kernels:
        return "kernels"
    return "codes" if precision in FORMATS else "bodies"


def compiled_tower(config: ModelConfig, tower: str, way: Way, item: int) -> CompiledTower:
    """Return the figures of a tower of a model.

    Args:
        item: Bytes of an activation.
    """
    values, units = read_table()[tower][way], units_of(config, tower, way)
    scales = {
        kind: item / ITEM * units[kind] / compiled for kind, compiled in values["units"].items()
    }
    kernels = {kind: one["kernels"] for kind, one in values["kinds"].items()}
    moved = {kind: one["bytes"] for kind, one in values["kinds"].items()}
    return CompiledTower(kernels, moved, values["scratch"], scales)


@functools.cache
def read_table() -> Mapping[str, Mapping[str, Mapping[str, Any]]]:
    """Return the table: tower, way, then its figures."""
    document = read_json(TABLE_FILE, PlanError)
    document.check_format(FORMAT, FORMAT_VERSION)
    return document.values_of("towers")


@functools.cache
def table_source() -> str:
    """Return what made the table, and when."""
    return read_json(TABLE_FILE, PlanError).text("source")


def units_of(config: ModelConfig, tower: str, way: Way) -> dict[str, float]:
    """Return what figures grow with, from one width of model to another: elements of a token."""
    c = config
    each = c.num_experts_per_tok if way == "kernels" else c.num_experts
    experts = each * (c.moe_intermediate_size + c.hidden_size)
    vocabulary = c.vocab_size if tower == "denoiser" else 0
    return {
        "M": c.d_inner + c.conv_dim,
        "E": experts or 1,
        "*": c.query_width + c.kv_width,
        ENDS: vocabulary + c.hidden_size,
        "scratch": experts + c.d_inner + vocabulary,
    }


def value_of_terms(terms: Mapping[str, float], rows: int, tokens: int, context: int) -> float:
    """Return the sum of terms for a call."""
    sizes = {"1": 1, "rows": rows, "tokens": tokens, "context": context}
    return sum(
        factor * math.prod(sizes[name] for name in term.split(" * "))
        for term, factor in terms.items()
    )
