"""Two sides that should compute the same, run and compared by Polygraphy.

Polygraphy passes when one side lacks an output (its comparison looks up what the first side has and
matches names loosely), so the sets of names are compared first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import Comparator

from twotower_contract.polygraphy import differences, largest, quiet_polygraphy, verdicts
from twotower_export.verification.calls import Feed, cleared

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Tolerance:
    """How far a tensor may be from the reference. Whole numbers must be equal.

    Attributes:
        element: Share of an element that it may be off by, and as much of the tensor's largest
            magnitude beside it.
        rms: Root mean square of what all elements are off by, as a share of the tensor's own.
    """

    element: float
    rms: float


TOLERANCES: Final = {
    # Orders of summation differ; nothing else may.
    "float32": Tolerance(element=1e-4, rms=1e-4),
    # A sum in another order may round to the next number; attention rounds its weights and two
    # parts of its result, where the modules round once. The spread depends on the CPU and on the
    # inputs: of the trained checkpoint's parts, 27 draws of the inputs with three sets of vector
    # instructions gave 8.4e-3 and 2.2e-3 at worst on one CPU, and up to 1.3e-2 was seen on another.
    # An element may be off by six units in the last of eight bits, not quite twice the worst that
    # was seen; what is wrong everywhere shows in the mean, which is held to one unit.
    "bfloat16": Tolerance(element=2.4e-2, rms=4e-3),
}
"""By what the graph computes in; both sides compute in it."""


class Side(Protocol):
    """One implementation of a graph or of a part of it."""

    name: str

    def open(self) -> None:
        """Load it."""

    def run(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        """Run one call."""

    def close(self) -> None:
        """Free it."""


Completion = Callable[[Mapping[str, Array], Mapping[str, Array]], dict[str, Array]]
"""Reference outputs that follow from a call's inputs and the graph's own other outputs."""


@dataclass(frozen=True)
class TensorDifference:
    """How far one output of one call is from the reference.

    Attributes:
        part: The graph, or a part of it.
        precision: The precision that it computes in.
        call: Shape of the call.
        tensor: The output.
        max_abs: Largest absolute difference.
        max_rel: The same, as a share of the largest magnitude in the reference.
        rms: Root mean square of all differences, as a share of the reference's.
        passed: Whether every element is within the tolerance.
    """

    part: str
    precision: str
    call: str
    tensor: str
    max_abs: float
    max_rel: float
    rms: float
    passed: bool

    @property
    def severity(self) -> tuple[bool, float]:
        """Sort the worst last: what failed, then what is furthest off for its tolerance.

        No number is worst.
        """
        tolerance = TOLERANCES[self.precision]
        share = max(self.max_rel / tolerance.element, self.rms / tolerance.rms)
        return (not self.passed, np.inf if np.isnan(share) else share)

    def __str__(self) -> str:
        return (
            f"{self.part} in {self.precision}, call `{self.call}`: {self.tensor} is off by "
            f"{self.max_abs:.2e} at most, {self.max_rel:.1e} of its largest value, and by "
            f"{self.rms:.1e} in the mean"
        )


@dataclass
class Comparison:
    """The outcome of one or more comparisons.

    Attributes:
        tensors: Every output of every call that both sides have.
        problems: Why it failed, beside tensors that differ: outputs that a side lacks, shapes.
    """

    tensors: list[TensorDifference] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether something was compared and nothing differs."""
        return bool(self.tensors) and not self.problems and all(t.passed for t in self.tensors)

    @property
    def worst(self) -> TensorDifference | None:
        """The tensor that is furthest off."""
        return max(self.tensors, key=lambda tensor: tensor.severity, default=None)

    def add(self, other: Comparison) -> None:
        """Take over another's outcome."""
        self.tensors += other.tensors
        self.problems += other.problems


def compare(
    part: str,
    graph: Side,
    reference: Side,
    feeds: Mapping[str, Feed],
    complete: Completion | None = None,
    precision: str = "float32",
) -> Comparison:
    """Run both sides on the same calls, one side after the other, and compare every output.

    Args:
        part: Name of the part, for reports.
        complete: Further reference outputs; see `Completion`.
        precision: The precision of both sides, a key of `TOLERANCES`.
    """
    calls = list(feeds.values())
    with quiet_polygraphy():
        results = Comparator.run([_Runner(graph, calls), _Runner(reference, calls)], calls)
    (_, ours), (_, theirs) = results
    comparison = Comparison()
    for call, feed, our, their in zip(feeds, calls, ours, theirs, strict=True):
        expected = dict(their)
        if complete is not None:
            expected |= complete(feed, our)
        where = f"{part}, call `{call}`"
        problems = _shape_problems(where, our, expected) or _zero_problems(where, expected)
        comparison.problems += problems
        if not problems:
            our_cleared, expected = cleared(feed, our), cleared(feed, expected)
            tolerance = TOLERANCES[precision]
            passing = verdicts(our_cleared, expected, tolerance.element)
            for name, value in expected.items():
                max_abs, rms = _distance(our_cleared[name], value)
                max_rel = max_abs / max(largest(value), 1e-12)
                passed = passing[name] and rms <= tolerance.rms
                comparison.tensors.append(
                    TensorDifference(part, precision, call, name, max_abs, max_rel, rms, passed)
                )
    return comparison


def _shape_problems(
    where: str, ours: Mapping[str, Array], expected: Mapping[str, Array]
) -> list[str]:
    """Return outputs that one side lacks; else those of different shapes."""
    missing, extra = sorted(expected.keys() - ours), sorted(ours.keys() - expected)
    problems = [f"{where}: the graph has no output {name}" for name in missing]
    problems += [f"{where}: the reference has no output {name}" for name in extra]
    return problems or [
        f"{where}: {name} has shape {list(ours[name].shape)} in the graph, "
        f"{list(value.shape)} in the reference"
        for name, value in expected.items()
        if ours[name].shape != value.shape
    ]


def _zero_problems(where: str, expected: Mapping[str, Array]) -> list[str]:
    """Return outputs that are all 0, on which any two sides agree."""
    floats = {name: value for name, value in expected.items() if value.dtype.kind == "f"}
    return [
        f"{where}: {name} is 0 everywhere, which proves nothing; does the checkpoint have weights?"
        for name, value in floats.items()
        if value.size and not value.any()
    ]


def _distance(ours: Array, expected: Array) -> tuple[float, float]:
    """Largest difference, and the root of the sum of their squares over that of the reference."""
    off = differences(ours, expected)
    size = np.linalg.norm(expected[np.isfinite(expected)].astype(np.float64))
    return float(off.max(initial=0.0)), float(np.linalg.norm(off)) / max(float(size), 1e-12)


class _Runner(BaseRunner):  # type: ignore[misc]  # Polygraphy has no types
    """A side as Polygraphy runs it: loaded for its own turn only."""

    def __init__(self, side: Side, calls: list[Feed]) -> None:
        super().__init__(name=side.name)
        self._side, self._calls = side, calls

    def activate_impl(self) -> None:
        self._side.open()

    def deactivate_impl(self) -> None:
        self._side.close()

    def get_input_metadata_impl(self) -> Any:
        metadata = TensorMetadata()
        for name, value in self._calls[0].items():
            metadata.add(name, value.dtype, [None] * value.ndim)
        return metadata

    def infer_impl(self, feed_dict: Mapping[str, Array]) -> dict[str, Array]:
        self.inference_time = 0.0
        return self._side.run(feed_dict)
