"""The report of a quantization: bytes and errors per part."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from twotower_contract.config import ModelConfig
from twotower_contract.sizes import PARTS, part_of


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix that became narrow.

    Attributes:
        name: Its name before.
        format: Its format.
        bytes_before, bytes_after: Bytes of all its tensors.
        error: Sum of squared differences.
        energy: Sum of squared weights.
    """

    name: str
    format: str
    bytes_before: int
    bytes_after: int
    error: float
    energy: float

    @property
    def relative_rms(self) -> float:
        """Root mean square of the error, as a share of that of the weights."""
        return math.sqrt(self.error / self.energy) if self.energy else 0.0


def parts_of_report(
    config: ModelConfig, base: bool, matrices: Iterable[Matrix]
) -> list[dict[str, Any]]:
    """Return one record per tower, part and format, in the order of the parts."""
    groups: dict[tuple[str, str, str], list[Matrix]] = {}
    for matrix in matrices:
        tower, part = part_of(config, matrix.name, base=base)
        groups.setdefault((tower, part, matrix.format), []).append(matrix)
    ordered = sorted(groups, key=lambda key: (key[0], PARTS.index(key[1]), key[2]))
    return [_record(*key, groups[key]) for key in ordered]


def _record(tower: str, part: str, format_: str, matrices: list[Matrix]) -> dict[str, Any]:
    worst = max(matrices, key=lambda matrix: matrix.relative_rms)
    energy = math.fsum(matrix.energy for matrix in matrices)
    error = math.fsum(matrix.error for matrix in matrices)
    return {
        "tower": tower,
        "part": part,
        "format": format_,
        "matrices": len(matrices),
        "bytes_before": sum(matrix.bytes_before for matrix in matrices),
        "bytes_after": sum(matrix.bytes_after for matrix in matrices),
        "relative_rms": math.sqrt(error / energy) if energy else 0.0,
        "worst": worst.name,
        "worst_relative_rms": worst.relative_rms,
    }
