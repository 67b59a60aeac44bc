"""How far engines may be off, by their precision, and the comparison that decides it.

Every comparison of engines with others uses these tolerances and no others. Polygraphy compares; it
passes when one side lacks an output, so names and shapes are compared first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy.typing as npt

from twotower_contract.polygraphy import differences, largest, verdicts

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
    passing = verdicts(ours, theirs, tolerance.share)
    return [
        _share_that_differs(name, array, theirs[name], tolerance)
        if array.dtype.kind in "iu"
        else _difference(name, array, theirs[name], passing[name])
        for name, array in ours.items()
    ]


def _difference(name: str, ours: Array, theirs: Array, passed: bool) -> Difference:
    off = float(differences(ours, theirs).max())
    # any engines agree on an output that is 0 everywhere: weights that were never written
    is_proof = bool(theirs.any())
    return Difference(name, off, off / max(largest(theirs), 1e-12), passed and is_proof)


def _share_that_differs(name: str, ours: Array, theirs: Array, tolerance: Tolerance) -> Difference:
    other = float((ours != theirs).mean())
    return Difference(name, other, other, 1 - other >= tolerance.same)
