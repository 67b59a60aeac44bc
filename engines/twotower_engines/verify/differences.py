"""How far engines may be off, by their precision, and the comparison that decides it.

Every comparison of engines with others uses these tolerances and no others. Polygraphy compares; it
passes when one side lacks an output, so names and shapes are compared first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from twotower_contract.polygraphy import quiet_polygraphy

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Tolerance:
    """The allowed differences of one precision.

    Attributes:
        share: How far a number may be off, as a share of the largest one of its tensor.
        same: The least share of whole numbers (ids, flags, counts) that must be the same.
    """

    share: float
    same: float


TOLERANCES: Final[Mapping[str, Tolerance]] = {
    "float32": Tolerance(1e-4, 1.0),
    # bf16 keeps eight bits: 0.4% at each rounding, over dozens of layers. Where the best two logits
    # of a random prompt are close, rounding decides. Chosen before any engine was run.
    "bf16": Tolerance(5e-2, 0.5),
}


@dataclass(frozen=True, slots=True)
class Difference:
    """One output of both sides.

    Attributes:
        tensor: Name of the tensor.
        max_abs: Largest absolute difference; of whole numbers, the share that differs.
        max_rel: The same as a share of the largest magnitude.
        passed: True where it is within the tolerance.
    """

    tensor: str
    max_abs: float
    max_rel: float
    passed: bool

    def __str__(self) -> str:
        if not (self.passed or self.max_abs):
            return f"{self.tensor} is 0 everywhere on both sides, which proves nothing"
        return (
            f"{self.tensor} is off by {self.max_abs:.2e} at most, {self.max_rel:.1e} of its "
            "largest value"
        )


def compare_arrays(
    ours: Mapping[str, Array], theirs: Mapping[str, Array], precision: str
) -> list[Difference]:
    """Compare outputs by name.

    Args:
        ours: Outputs of the engines under test: floats in float32, whole numbers in int32.
        theirs: Outputs of the reference.
        precision: Precision of the engines under test, a key of `TOLERANCES`.

    Raises:
        ValueError: One side lacks an output of the other, or a shape differs.
    """
    if ours.keys() != theirs.keys():
        raise ValueError(f"outputs {sorted(ours.keys() ^ theirs.keys())} are on one side only")
    for name, array in ours.items():
        if array.shape != theirs[name].shape:
            raise ValueError(f"{name} has shapes {array.shape} and {theirs[name].shape}")
    tolerance = TOLERANCES[precision]
    whole = [name for name, array in ours.items() if array.dtype.kind in "iu"]
    pairs = {
        name: _without_shared_infinities(ours[name], theirs[name])
        for name in ours
        if name not in whole
    }
    passed = _verdicts(
        {name: mine for name, (mine, _) in pairs.items()},
        {name: other for name, (_, other) in pairs.items()},
        tolerance,
    )
    # any engines agree on outputs that are 0 everywhere: weights that were never written
    passed = {name: verdict and bool(theirs[name].any()) for name, verdict in passed.items()}
    return [
        _share_that_differs(name, ours[name], theirs[name], tolerance)
        if name in whole
        else _difference(name, *pairs[name], passed[name])
        for name in ours
    ]


def _without_shared_infinities(ours: Array, theirs: Array) -> tuple[Array, Array]:
    """Return both with 0 where they hold the same infinity, as confidences of given tokens do."""
    same = np.isinf(theirs) & (ours == theirs)
    return np.where(same, np.float32(0), ours), np.where(same, np.float32(0), theirs)


def _verdicts(
    ours: Mapping[str, Array], theirs: Mapping[str, Array], tolerance: Tolerance
) -> dict[str, bool]:
    from polygraphy.comparator import Comparator, IterationResult, RunResults, SimpleCompareFunc

    if not ours:
        return {}
    results = RunResults()
    for name, outputs in (("engines", ours), ("reference", theirs)):
        results.append(
            (name, [IterationResult(outputs=dict(outputs), runtime=0, runner_name=name)])
        )
    limits = {n: tolerance.share * float(np.abs(value).max()) for n, value in theirs.items()}
    function = SimpleCompareFunc(atol=limits, rtol=tolerance.share)
    with quiet_polygraphy(), np.errstate(all="ignore"):
        (accuracy,) = Comparator.compare_accuracy(results, compare_func=function)
    ((_, (iteration,)),) = accuracy.items()
    # a tolerance that is a share of an infinity would let anything pass
    return {
        name: bool(iteration[name] and np.isfinite(ours[name]).all() and np.isfinite(value).all())
        for name, value in theirs.items()
    }


def _difference(name: str, ours: Array, theirs: Array, passed: bool) -> Difference:
    with np.errstate(invalid="ignore"):
        off = float(np.abs(ours.astype(np.float64) - theirs).max())
    return Difference(name, off, off / max(float(np.abs(theirs).max()), 1e-12), passed)


def _share_that_differs(name: str, ours: Array, theirs: Array, tolerance: Tolerance) -> Difference:
    other = float((ours != theirs).mean())
    return Difference(name, other, other, 1 - other >= tolerance.same)
