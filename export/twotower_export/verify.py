"""Compares exported graphs with the PyTorch towers, output by output.

A small model is verified whole: every output of both graphs for a prefill chunk, a block and a
single token. A model that does not fit into memory in float32 is verified part by part (embeddings,
each layer, head with refinement): the nodes of one part are cut out of the exported file, and both
sides get the same random hidden states.

What runs here is the float32 graphs. Of the graphs in the checkpoint's own dtype, which ONNX
Runtime cannot run on a CPU, it is checked that they are the same nodes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx

from twotower_export.agreement import check_agreement
from twotower_export.checkpoint import Checkpoint, open_checkpoint
from twotower_export.config import ModelConfig
from twotower_export.errors import ExportError
from twotower_export.layout import Tower, graph_weights
from twotower_export.mapped import NamedTensors
from twotower_export.refinement import POLICIES, Rule, refine
from twotower_export.verification.calls import (
    CallShape,
    Feed,
    call_shapes,
    random_feed,
    random_hidden,
)
from twotower_export.verification.comparison import Comparison, Side, compare
from twotower_export.verification.graphs import (
    HIDDEN,
    GraphPart,
    GraphSide,
    ManifestWeights,
    Part,
    graph_part,
    whole_graph,
)
from twotower_export.verification.target import Target, native_problems, structure_problems
from twotower_export.verification.towers import TowerPartSide, TowerSide

Array = npt.NDArray[Any]
Progress = Callable[[str], None]

WHOLE_BYTES: Final = 2_000_000_000
"""A tower of at most so many bytes in float32 is verified whole."""

PART_CHUNK: Final = 24
"""Prefill chunk for one MoE layer on its own: the graphs' reference body computes all experts."""

CLEAR_MARGIN: Final = 1e-5
"""Router scores closer than this may be ordered differently by sums in another order."""

ATTEMPTS: Final = 4


@dataclass
class Report:
    """What was verified.

    Attributes:
        target, checkpoint: what was compared with what.
        by_part: whether it was done part by part.
        outcome: every tensor that was compared, and what failed.
        notes: what was not verified, and why.
    """

    target: Path
    checkpoint: Path
    by_part: bool
    outcome: Comparison = field(default_factory=Comparison)
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        worst = self.outcome.worst
        return {
            "target": str(self.target),
            "checkpoint": str(self.checkpoint),
            "reference": "torch",
            "passed": self.outcome.passed,
            "by_part": self.by_part,
            "worst": None if worst is None else worst.as_json(),
            "problems": self.outcome.problems,
            "notes": self.notes,
            "tensors": [tensor.as_json() for tensor in self.outcome.tensors],
        }


def verify(
    target: Target,
    checkpoint: Path,
    *,
    layers: Sequence[int] = (),
    whole_bytes: int = WHOLE_BYTES,
    progress: Progress = lambda line: None,
) -> Report:
    """Compare a bundle's or engine set's graphs with the PyTorch towers of a checkpoint.

    Args:
        target: from `open_target`.
        checkpoint: folder or hub id.
        layers: whose hidden states to compare as well. Of a model that is verified part by part,
            only these layers are then verified.
        whole_bytes: see `WHOLE_BYTES`.
        progress: told what is being compared.

    Raises:
        ExportError: the checkpoint is another one than was exported, or there is no such layer.
    """
    towers = list(target.graphs)
    opened = open_checkpoint(
        checkpoint, mask_token_id=target.manifest["mask_token_id"], towers=towers
    )
    check_agreement(target.manifest, opened)
    for layer in layers:
        if not 0 <= layer < opened.config.num_layers:
            raise ExportError(
                f"there is no layer {layer}: the model has {opened.config.num_layers}, from 0"
            )
    largest = max(_float32_bytes(opened.config, tower) for tower in towers)
    report = Report(target.folder, opened.path, by_part=largest > whole_bytes)
    for tower in towers:
        model = onnx.load(str(target.graphs[tower]))
        problems = structure_problems(target, tower, model, opened.config)
        report.outcome.problems += problems + native_problems(target, tower, model)
        if problems:
            continue
        sides = _by_part if report.by_part else _whole
        for part, chunk, make in sides(target, opened, tower, model, layers):
            progress(f"{part}")
            _compare_clearly(report.outcome, part, opened.config, tower, chunk, make)
    report.notes += _notes(target, layers, report.by_part)
    return report


@dataclass(frozen=True)
class _Pair:
    """The two sides of a comparison.

    Attributes:
        graph, reference: the sides.
        layers: whose states they take.
        wants_hidden: whether they start from hidden states.
    """

    graph: Side
    reference: TowerSide | TowerPartSide
    layers: Sequence[int]
    wants_hidden: bool


_Comparisons = Iterator[tuple[str, int, Callable[[], _Pair]]]
"""Name of the part, tokens of its prefill chunk, and what makes its two sides."""


def _whole(
    target: Target,
    checkpoint: Checkpoint,
    tower: Tower,
    model: onnx.ModelProto,
    layers: Sequence[int],
) -> _Comparisons:
    def make() -> _Pair:
        part = whole_graph(model, tower, layers)
        tensors = NamedTensors(checkpoint.path)
        reference = TowerSide("torch", checkpoint.config, tower, tensors, layers)
        graph = _graph_side(target, checkpoint, tower, part)
        return _Pair(graph, reference, range(checkpoint.config.num_layers), wants_hidden=False)

    yield tower, int(target.manifest["max_tokens_per_call"]), make


def _by_part(
    target: Target,
    checkpoint: Checkpoint,
    tower: Tower,
    model: onnx.ModelProto,
    layers: Sequence[int],
) -> _Comparisons:
    def make(part: Part) -> _Pair:
        cut = graph_part(model, tower, part)
        tensors = NamedTensors(checkpoint.path)
        reference = TowerPartSide("torch", checkpoint.config, tower, tensors, part)
        graph = _graph_side(target, checkpoint, tower, cut)
        own = [part] if isinstance(part, int) else []
        return _Pair(graph, reference, own, wants_hidden=part != "embeddings")

    chunk = int(target.manifest["max_tokens_per_call"])
    parts: list[Part] = ["embeddings", *range(checkpoint.config.num_layers), "head"]
    for part in layers or parts:
        dense = part in checkpoint.config.layers_of_kind["E"]
        name = f"{tower}.layers.{part}" if isinstance(part, int) else f"{tower}.{part}"
        yield name, min(PART_CHUNK, chunk) if dense else chunk, partial(make, part)


def _graph_side(target: Target, checkpoint: Checkpoint, tower: Tower, part: GraphPart) -> GraphSide:
    weights = ManifestWeights(target.manifest, checkpoint.path, tower)
    return GraphSide("onnxruntime", part, weights)


def _compare_clearly(
    outcome: Comparison,
    part: str,
    config: ModelConfig,
    tower: Tower,
    chunk: int,
    make: Callable[[], _Pair],
) -> None:
    """Compare on random inputs; on others where a mismatch could be a tie in the router.

    A token whose sixth and seventh expert score the same but for rounding is a coin toss in any
    implementation: a mismatch on such inputs proves nothing.
    """
    for attempt in range(ATTEMPTS):
        pair = make()
        feeds: dict[str, Feed] = {}
        for shape in call_shapes(tower, chunk):
            feeds[shape.name] = _feed(config, tower, shape, attempt, pair)
        complete = partial(_refined, config) if tower == "denoiser" else None
        found = compare(part, pair.graph, pair.reference, feeds, complete)
        if found.passed or min(pair.reference.margins, default=math.inf) > CLEAR_MARGIN:
            break
    outcome.add(found)


def _feed(config: ModelConfig, tower: Tower, shape: CallShape, seed: int, pair: _Pair) -> Feed:
    feed = random_feed(config, tower, shape, seed, pair.layers)
    if pair.wants_hidden:
        feed[HIDDEN] = random_hidden(config, shape, seed)
    return feed


def _refined(
    config: ModelConfig, feed: Mapping[str, Array], ours: Mapping[str, Array]
) -> dict[str, Array]:
    """What refinement makes of the graph's own logits, by the rules; nothing without logits."""
    if "logits" not in ours or "confidence" not in ours:
        return {}
    made: list[tuple[Any, ...]] = []
    for row, logits in enumerate(ours["logits"]):
        rule = Rule(
            threshold=float(feed["threshold"][row]),
            steps_left=int(feed["steps_left"][row]),
            temperature=float(feed["temperature"][row]),
            policy=POLICIES[int(feed["policy"][row])],
            seed=int(feed["seed"][row]),
        )
        refined = refine(
            logits,
            feed["ids"][row],
            rule,
            mask_id=config.mask_token_id,
            length=int(feed["lengths"][row]),
            confidence=ours["confidence"][row],
        )
        made.append((refined.ids, refined.confidence, refined.committed, refined.still_masked))
    ids, confidence, committed, still = (np.stack(column) for column in zip(*made, strict=True))
    return {
        "new_ids": ids.astype(np.int32),
        "confidence": confidence.astype(np.float32),
        "committed": committed.astype(np.int32),
        "still_masked": still.astype(np.int32),
    }


def _notes(target: Target, layers: Sequence[int], by_part: bool) -> list[str]:
    notes = []
    if target.native:
        dtype = target.manifest["dtype"]
        notes.append(
            f"the {dtype} graphs were not run (ONNX Runtime has no {dtype} on a CPU); they have "
            "the same nodes as the float32 graphs, which were"
        )
    if by_part and layers:
        notes.append(f"only layers {', '.join(map(str, layers))} of each tower were verified")
    elif by_part:
        notes.append("verified part by part, each on random hidden states: never end to end")
    return notes


def _float32_bytes(config: ModelConfig, tower: Tower) -> int:
    return 4 * sum(math.prod(weight.shape) for weight in graph_weights(config, tower).values())
