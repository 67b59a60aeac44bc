"""Compare exported graphs with the PyTorch towers, output by output.

The float32 graphs of a small model are verified whole: every output of both for a prefill chunk, a
block and a single token. Those of a model that does not fit into memory in float32, and the graphs
in the checkpoint's own dtype of any model, are verified part by part (embeddings, each layer, head
with refinement): the nodes of one part are cut out of the exported file, and both sides get the
same random hidden states. How the parts are joined, and that the graphs in both precisions are the
same but for casts, is read from the files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx

from twotower_contract.config import ModelConfig
from twotower_contract.errors import BundleError, TwoTowerError
from twotower_contract.layout import Tower, graph_weights
from twotower_contract.policies import POLICY_NAMES
from twotower_export.agreement import check_agreement
from twotower_export.checkpoint import Checkpoint, open_checkpoint
from twotower_export.reference.refinement import Rule, refine
from twotower_export.verification.calls import Feed, call_shapes, random_feed, random_hidden
from twotower_export.verification.comparison import Comparison, compare
from twotower_export.verification.graphs import HIDDEN, Part
from twotower_export.verification.pairs import Planned, by_part, whole
from twotower_export.verification.structure import undecoded
from twotower_export.verification.target import Target, native_problems, structure_problems
from twotower_export.verification.wiring import wiring_problems

Array = npt.NDArray[Any]
Progress = Callable[[str], None]

WHOLE_BYTES: Final = 2_000_000_000
"""A tower of at most so many bytes in float32 is verified whole."""

CLEAR_MARGINS: Final = {"float32": 1e-5, "bfloat16": 1e-4}
"""Router scores closer than this may be ordered differently by sums in another order, and in
bfloat16 by an input that was rounded the other way."""

ATTEMPTS: Final = 4


@dataclass(frozen=True)
class Redraw:
    """A part that was compared on other inputs, because the first ones differed near a tie.

    Attributes:
        part: The part's name.
        precision: The precision that it computes in.
        draws: How often inputs were drawn; the last ones count.
        margin: Least distance of a chosen expert to a refused one in the draws before.
    """

    part: str
    precision: str
    draws: int
    margin: float

    def __str__(self) -> str:
        return (
            f"{self.part} in {self.precision}: the router was within {self.margin:.0e} of another "
            f"choice where something differed; draw {self.draws} of the inputs counts"
        )


@dataclass
class Report:
    """The outcome of a verification.

    Attributes:
        target, checkpoint: The two sides that were compared.
        by_part: Whether the float32 graphs were done part by part.
        outcome: Every tensor that was compared, and what failed.
        redraws: Parts for which other inputs were drawn.
        notes: Parts that were not verified, and why.
    """

    target: Path
    checkpoint: Path
    by_part: bool
    outcome: Comparison = field(default_factory=Comparison)
    redraws: list[Redraw] = field(default_factory=list)
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
            "worst": None if worst is None else asdict(worst),
            "problems": self.outcome.problems,
            "redraws": [asdict(redraw) for redraw in self.redraws],
            "notes": self.notes,
            "tensors": [asdict(tensor) for tensor in self.outcome.tensors],
        }


def verify(
    target: Target,
    checkpoint: Path,
    *,
    layers: Sequence[int] = (),
    parts: Sequence[Part] = (),
    whole_bytes: int = WHOLE_BYTES,
    progress: Progress = lambda line: None,
) -> Report:
    """Compare a bundle's or engine set's graphs with the PyTorch towers of a checkpoint.

    Args:
        layers: Layers whose hidden states to compare as well. In a model verified part by part,
            only these layers are then verified.
        parts: The only parts to verify, whatever the size of the model.

    Raises:
        TwoTowerError: The checkpoint is another one than was exported, or there is no such layer.
    """
    towers = list(target.graphs)
    opened = open_checkpoint(
        checkpoint, mask_token_id=target.manifest.model.mask_token_id, towers=towers
    )
    check_agreement(target.manifest, opened)
    for layer in (*layers, *(part for part in parts if isinstance(part, int))):
        if not 0 <= layer < opened.config.num_layers:
            raise TwoTowerError(
                f"there is no layer {layer}: the model has {opened.config.num_layers}, from 0"
            )
    largest = max(
        4 * sum(math.prod(weight.shape) for weight in graph_weights(opened.config, tower).values())
        for tower in towers
    )
    report = Report(target.folder, opened.path, by_part=bool(parts) or largest > whole_bytes)
    for tower in towers:
        for planned in _plan(report, target, opened, tower, layers, parts):
            progress(f"{planned.part} in {planned.precision}")
            _compare_clearly(report, opened.config, planned)
    report.notes += _notes(target, [*parts, *layers], report)
    return report


def _plan(
    report: Report,
    target: Target,
    checkpoint: Checkpoint,
    tower: Tower,
    layers: Sequence[int],
    parts: Sequence[Part],
) -> list[Planned]:
    """Return the runs for a tower; findings that need no run go into the report.

    A graph with another interface, or whose parts are joined wrongly, is not run: its parts are not
    those of the reference.
    """
    problems, planned = report.outcome.problems, list[Planned]()
    selected: list[Part] = list(dict.fromkeys([*parts, *layers]))
    model = onnx.load(str(target.graphs[tower]))
    found = structure_problems(target, tower, model, checkpoint.config)
    if not found:
        wrong = wiring_problems(model, tower, checkpoint.config)
        found = [f"{tower} graph in float32: {problem}" for problem in wrong]
    problems += found
    if not found and report.by_part:
        planned += by_part(target, checkpoint, tower, "float32", selected)
    elif not found:
        planned += whole(target, checkpoint, tower, layers)
    if tower in target.native:
        native = onnx.load(str(target.native[tower]))
        where = f"{tower} graph in {checkpoint.config.dtype}"
        wrong = wiring_problems(undecoded(native), tower, checkpoint.config)
        problems += [f"{where}: {p}" for p in native_problems(target, tower, native, model)]
        problems += [f"{where}: {problem}" for problem in wrong]
        if not wrong:
            only = selected if report.by_part else []
            planned += by_part(target, checkpoint, tower, "native", only)
    return planned


def _compare_clearly(report: Report, config: ModelConfig, planned: Planned) -> None:
    """Compare on random inputs; on others where a mismatch could be a tie in the router.

    A token whose sixth and seventh expert score the same but for rounding is a coin toss in any
    implementation: a mismatch on such inputs proves nothing.
    """
    unclear: list[float] = []
    for attempt in range(ATTEMPTS):
        try:
            found, margin = _compare(config, planned, attempt)
        except BundleError as error:
            what = f"{planned.part} in {planned.precision}"
            report.outcome.problems.append(f"{what} cannot be run: {error}")
            return
        if found.passed or margin > CLEAR_MARGINS[planned.precision]:
            break
        unclear.append(margin)
    report.outcome.add(found)
    if unclear:
        draws = attempt + 1
        report.redraws.append(Redraw(planned.part, planned.precision, draws, min(unclear)))


def _compare(config: ModelConfig, planned: Planned, seed: int) -> tuple[Comparison, float]:
    """Compare on inputs of a seed; returns also how near the router came to another choice."""
    graph, reference = planned.make()
    feeds: dict[str, Feed] = {}
    for shape in call_shapes(planned.tower, planned.chunk):
        feeds[shape.name] = random_feed(config, planned.tower, shape, seed, planned.layers)
        if planned.wants_hidden:
            feeds[shape.name][HIDDEN] = random_hidden(config, shape, seed)
    complete = partial(_refined, config) if planned.tower == "denoiser" else None
    found = compare(planned.part, graph, reference, feeds, complete, planned.precision)
    return found, min(reference.margins, default=math.inf)


def _refined(
    config: ModelConfig, feed: Mapping[str, Array], ours: Mapping[str, Array]
) -> dict[str, Array]:
    """Refine the graph's own logits by the rules; return nothing without logits."""
    if "logits" not in ours or "confidence" not in ours:
        return {}
    made: list[tuple[Any, ...]] = []
    for row, logits in enumerate(ours["logits"]):
        rule = Rule(
            threshold=float(feed["threshold"][row]),
            steps_left=int(feed["steps_left"][row]),
            temperature=float(feed["temperature"][row]),
            policy=POLICY_NAMES[int(feed["policy"][row])],
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


def _notes(target: Target, selected: Sequence[Part], report: Report) -> list[str]:
    notes = [str(redraw) for redraw in report.redraws]
    if target.native:
        dtype = target.manifest.model.dtype
        notes.append(
            f"the {dtype} graphs were run part by part, on a CPU: every operator in float32, every "
            f"{dtype} value rounded; what a GPU's kernels do beside that is not known here"
        )
    if report.by_part and selected:
        notes.append(f"only {', '.join(map(str, selected))} of each tower were verified")
    elif report.by_part:
        notes.append("verified part by part, each on random hidden states: never end to end")
    return notes
