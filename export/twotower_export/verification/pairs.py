"""The two sides of each comparison: a whole graph or one of its parts, and the same in PyTorch.

In float32, which small models run whole; and in the checkpoint's dtype, always part by part: where
every value is rounded to eight bits, rounding alone can flip a router decision deep in a tower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal

import onnx

from twotower_contract.layout import Tower
from twotower_export.checkpoint import Checkpoint
from twotower_export.reference.mapped import NamedTensors
from twotower_export.reference.towers import DTYPES
from twotower_export.verification.comparison import Side
from twotower_export.verification.emulation import emulated
from twotower_export.verification.graphs import (
    BFLOAT16,
    FLOAT,
    GraphPart,
    GraphSide,
    ManifestWeights,
    Part,
    graph_part,
    whole_graph,
)
from twotower_export.verification.target import Target
from twotower_export.verification.towers import TowerPartSide, TowerSide

Kind = Literal["float32", "native"]
"""The two graphs that a bundle has of a tower."""

CHUNK: Final = 256
"""Prefill chunk of a tower: the scan's body is quadratic in it."""

PART_CHUNK: Final = 24
"""Prefill chunk for one MoE layer on its own: the graphs' reference body computes all experts."""


@dataclass(frozen=True)
class Planned:
    """A comparison that is to be made.

    Attributes:
        part: Its name in reports.
        precision: The precision of both sides.
        chunk: Tokens of its prefill chunk.
        layers: Layers whose states both sides take.
        wants_hidden: Whether they start from hidden states.
        make: Returns the graph's side and the reference's.
    """

    part: str
    tower: Tower
    precision: str
    chunk: int
    layers: Sequence[int]
    wants_hidden: bool
    make: Callable[[], tuple[Side, TowerSide | TowerPartSide]]


def whole(
    target: Target, checkpoint: Checkpoint, tower: Tower, layers: Sequence[int]
) -> Iterator[Planned]:
    """Return a tower's whole float32 graph, with the hidden states after some layers."""

    def make() -> tuple[Side, TowerSide]:
        part = whole_graph(onnx.load(str(target.graphs[tower])), tower, layers)
        tensors = NamedTensors(checkpoint.path)
        reference = TowerSide(checkpoint.config, tower, tensors, layers)
        return _graph_side(target, checkpoint, tower, part), reference

    chunk = min(CHUNK, target.manifest.max_tokens_per_call)
    every = range(checkpoint.config.num_layers)
    yield Planned(tower, tower, "float32", chunk, every, wants_hidden=False, make=make)


def by_part(
    target: Target, checkpoint: Checkpoint, tower: Tower, kind: Kind, parts: Sequence[Part]
) -> Iterator[Planned]:
    """Parts of a tower's graph, all of them where none is named."""
    config = checkpoint.config
    precision = "float32" if kind == "float32" else config.dtype
    model = onnx.load(str((target.graphs if kind == "float32" else target.native)[tower]))

    def make(part: Part) -> tuple[Side, TowerPartSide]:
        cut = graph_part(model, tower, part, FLOAT if precision == "float32" else BFLOAT16)
        if kind == "native":
            weights = ManifestWeights(target.manifest, checkpoint.path, tower)
            cut = emulated(cut, weights.inputs.keys() | weights.parts.keys())
        dtype = DTYPES[precision]
        tensors = NamedTensors(checkpoint.path, dtype)
        reference = TowerPartSide(config, tower, tensors, part, dtype)
        return _graph_side(target, checkpoint, tower, cut), reference

    chunk = min(CHUNK, target.manifest.max_tokens_per_call)
    every: list[Part] = ["embeddings", *range(config.num_layers), "head"]
    for part in parts or every:
        dense = part in config.layers_of_kind["E"]
        own = [part] if isinstance(part, int) else []
        name = f"{tower}.layers.{part}" if own else f"{tower}.{part}"
        tokens = min(PART_CHUNK, chunk) if dense else chunk
        hidden = part != "embeddings"
        yield Planned(name, tower, precision, tokens, own, hidden, partial(make, part))


def _graph_side(target: Target, checkpoint: Checkpoint, tower: Tower, part: GraphPart) -> GraphSide:
    weights = ManifestWeights(target.manifest, checkpoint.path, tower)
    return GraphSide("onnxruntime", part, weights)
