"""The precisions: bits per weight of what a quantized checkpoint makes narrow, scales included.

Everything else has 16 bits: the time conditioning, whose angles are t x 1000, and what NVIDIA keeps
in its quantized files of Nemotron-3-Nano (`is_narrow_by_default`). A checkpoint that is quantized
already has its own sizes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from twotower_contract.config import ModelConfig
from twotower_contract.layout import Tower
from twotower_contract.sizes import narrow_parameters, parts_of_tower
from twotower_contract.skus import Sku
from twotower_engines.planning.model_size import ModelSize

WIDE, NATIVE = 32.0, 16.0


@dataclass(frozen=True, slots=True)
class Precision:
    """Bits per weight.

    Attributes:
        name: Value of `--precision`.
        narrow: Bits of the matrices that become narrow: experts, and most of Mamba's projections.
        wide: Bits of everything else.
        summary: One line for people.
    """

    name: str
    narrow: float
    wide: float
    summary: str

    def sizes(self, config: ModelConfig, tower: Tower) -> dict[str, int]:
        """Return the bytes of each part of a tower, rounded up."""
        narrow = narrow_parameters(config, tower)
        sizes = {}
        for part, count in parts_of_tower(config, tower).items():
            bits = narrow[part] * self.narrow + (count - narrow[part]) * self.wide
            sizes[part] = math.ceil(bits / 8)  # exact: all are multiples of 1/4
        return sizes


PRECISIONS: dict[str, Precision] = {
    one.name: one
    for one in (
        Precision("float32", WIDE, WIDE, "all in fp32: the CPU, or an fp32 checkpoint"),
        Precision("bf16", NATIVE, NATIVE, "the weights as released"),
        Precision("fp8", 8.0, NATIVE, "E4M3 experts and Mamba, one scale per matrix"),
        Precision("nvfp4", 4 + 8 / 16, NATIVE, "E2M1 experts and Mamba, an E4M3 scale per 16"),
        Precision("int4", 4 + 16 / 64, NATIVE, "INT4 experts and Mamba, a bf16 scale per 64"),
    )
}
"""The precisions by name, from widest to narrowest."""

BUILT: Mapping[str, tuple[str, ...]] = {
    "onnxruntime": tuple(PRECISIONS),
    "tensorrt": tuple(PRECISIONS),
    "tensorrt-rtx": ("float32", "bf16", "fp8"),
}
"""Precisions that `twotower build` can make, by flavour.

The compiler reads FP8 inputs inside of its products. For inputs of 4 bits, which have a scale per
block, it writes a copy in bf16 at every call: these need our kernels, which TensorRT-RTX does not
take.
"""

KERNELS_NEEDED = ("nvfp4", "int4")
"""Precisions that a GPU runs by our kernels alone."""


def is_built(flavour: str, precision: str, kernels: bool = True) -> bool:
    """Whether `twotower build` can make a precision for a flavour.

    Args:
        kernels: Whether our kernels are there, for `tensorrt`.
    """
    lacks_kernels = flavour == "tensorrt" and not kernels and precision in KERNELS_NEEDED
    return precision in BUILT[flavour] and not lacks_kernels


def flavour_for(sku: Sku, precision: str) -> str:
    """Return the first of a SKU's flavours that can be built in a precision; else its default."""
    return next((one for one in sku.flavours if is_built(one, precision)), sku.flavour)


def weight_sizes(model: ModelSize, tower: Tower, precision: str) -> dict[str, int]:
    """Return the bytes of each part of a tower; as stored, where it is quantized already."""
    if precision == model.precision:
        return dict(model.stored[tower])
    return PRECISIONS[precision].sizes(model.config, tower)
