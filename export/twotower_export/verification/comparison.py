"""Two sides that should compute the same, run and compared by Polygraphy.

Polygraphy passes when one side lacks an output (its comparison looks up what the first side has and
matches names loosely), so the sets of names are compared first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import Comparator, SimpleCompareFunc
from polygraphy.logger import G_LOGGER

from twotower_export.verification.calls import Feed, cleared

Array = npt.NDArray[Any]

TOLERANCE: Final = 1e-4
"""float32 against float32: an element fails when it is off by more than this share both of the
tensor's largest magnitude and of itself. Orders of summation differ; nothing else may. Whole
numbers must be equal."""


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
        part: which graph, or which part of it.
        call: shape of the call.
        tensor: the output.
        max_abs: largest absolute difference.
        max_rel: the same, as a share of the largest magnitude in the reference.
        passed: whether every element is within the tolerance.
    """

    part: str
    call: str
    tensor: str
    max_abs: float
    max_rel: float
    passed: bool

    @property
    def severity(self) -> tuple[bool, float]:
        """Sorts the worst last: what failed, then what is furthest off; no number is worst."""
        return (not self.passed, np.inf if np.isnan(self.max_rel) else self.max_rel)

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.part}, call `{self.call}`: {self.tensor} is off by {self.max_abs:.2e} at most, "
            f"{self.max_rel:.1e} of its largest value"
        )


@dataclass
class Comparison:
    """The outcome of one or more comparisons.

    Attributes:
        tensors: every output of every call that both sides have.
        problems: why it failed, beside tensors that differ: outputs that a side lacks, shapes.
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
    tolerance: float = TOLERANCE,
) -> Comparison:
    """Run both sides on the same calls, one side after the other, and compare every output.

    Args:
        part: what is compared, for reports.
        graph: the side under test.
        reference: the side that is right.
        feeds: inputs by name of the call.
        complete: further reference outputs; see `Completion`.
        tolerance: see `TOLERANCE`.
    """
    calls = list(feeds.values())
    with _quiet():
        results = Comparator.run([_Runner(graph, calls), _Runner(reference, calls)], calls)
    (_, ours), (_, theirs) = results
    comparison = Comparison()
    for call, feed, our, their in zip(feeds, calls, ours, theirs, strict=True):
        expected = dict(their)
        if complete is not None:
            expected |= complete(feed, our)
        where = f"{part}, call `{call}`"
        problems = _name_problems(where, our, expected) or _shape_problems(where, our, expected)
        comparison.problems += problems
        if not problems:
            our_cleared, expected = cleared(feed, our), cleared(feed, expected)
            verdicts = _verdicts(our_cleared, expected, tolerance)
            comparison.tensors += [
                _difference(part, call, name, our_cleared[name], expected[name], verdicts[name])
                for name in expected
            ]
    return comparison


def _name_problems(
    where: str, ours: Mapping[str, Array], expected: Mapping[str, Array]
) -> list[str]:
    missing, extra = sorted(expected.keys() - ours), sorted(ours.keys() - expected)
    problems = [f"{where}: the graph has no output {name}" for name in missing]
    return problems + [f"{where}: the reference has no output {name}" for name in extra]


def _shape_problems(
    where: str, ours: Mapping[str, Array], expected: Mapping[str, Array]
) -> list[str]:
    return [
        f"{where}: {name} has shape {list(ours[name].shape)} in the graph, "
        f"{list(value.shape)} in the reference"
        for name, value in expected.items()
        if ours[name].shape != value.shape
    ]


def _verdicts(
    ours: Mapping[str, Array], expected: Mapping[str, Array], tolerance: float
) -> dict[str, bool]:
    """Polygraphy's verdict on each output."""
    from polygraphy.comparator import IterationResult, RunResults

    results = RunResults()
    for name, outputs in (("graph", ours), ("reference", expected)):
        results.append(
            (name, [IterationResult(outputs=dict(outputs), runtime=0, runner_name=name)])
        )
    whole = [name for name, value in expected.items() if value.dtype.kind in "iub"]
    relative = {"": tolerance, **dict.fromkeys(whole, 0.0)}
    absolute = {name: relative.get(name, tolerance) * _largest(expected[name]) for name in expected}
    function = SimpleCompareFunc(atol=absolute, rtol=relative, infinities_compare_equal=True)
    with _quiet(), np.errstate(all="ignore"):  # infinities are subtracted, zeros divided by
        (accuracy,) = Comparator.compare_accuracy(results, compare_func=function)
    ((_, (iteration,)),) = accuracy.items()
    return {name: bool(iteration[name]) for name in expected}


def _difference(
    part: str, call: str, name: str, ours: Array, expected: Array, passed: bool
) -> TensorDifference:
    a, b = ours.astype(np.float64), expected.astype(np.float64)
    with np.errstate(invalid="ignore"):
        off = np.where(a == b, 0.0, np.abs(a - b))  # equal infinities do not differ
    max_abs = float(off.max(initial=0.0))
    max_rel = max_abs / max(_largest(expected), 1e-12)
    return TensorDifference(part, call, name, max_abs, max_rel, passed)


def _largest(values: Array) -> float:
    """Largest magnitude of a tensor, infinities aside."""
    numbers = np.abs(values[np.isfinite(values)].astype(np.float64))
    return float(numbers.max(initial=0.0))


@contextmanager
def _quiet() -> Iterator[None]:
    """Polygraphy narrates on stdout, where only results belong."""
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        yield


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
