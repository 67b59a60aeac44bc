"""The decorator of every kernel here, and what a kernel may assume about its launch.

A kernel's parameters stand in the order that TensorRT's ahead-of-time plugins prescribe: input
tensors, integers, output tensors, then compile-time constants: sizes of the model, then tiles. A
long list has lines for each of these. Triton's compiler reads the functions: annotations are for
people, `tl.constexpr` is for both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import triton

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether kernels run on the CPU, in Triton's interpreter."""

SHARED_MEMORY_LIMIT = 48 * 1024
"""Bytes of shared memory that a program gets without asking the driver for more.

TensorRT launches a plugin's kernel, and nothing says that it asks.
"""

FP_FUSION = False
"""Whether the compiler may contract a product and a sum into one rounding.

Off, so that a kernel rounds where its ONNX function does, on every target and in the interpreter.
Matrix products contract anyway.
"""


class Kernel(Protocol):
    """A function that the Triton compiler, or its interpreter, has wrapped."""

    __name__: str
    arg_names: list[str]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        """Return the launcher for a grid of up to three dimensions."""
        ...

    def __call__(self, *args: Any) -> Any:
        """Inline the kernel into another one that calls it."""
        ...


def kernel(function: Callable[..., Any]) -> Kernel:
    """Decorate with `triton.jit`, and keep a type that type checkers see."""
    return cast(Kernel, triton.jit(function))


@dataclass(frozen=True)
class Launch:
    """Tile sizes and resources of a kernel's programs.

    Attributes:
        constants: Compile-time sizes of tiles, by parameter name.
        num_warps: Warps of 32 threads per program.
        num_stages: Tiles in flight in a software-pipelined loop.
        max_registers: Registers of a thread; None leaves it to the assembler.
    """

    constants: Mapping[str, int]
    num_warps: int = 4
    num_stages: int = 1
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The compiler's options."""
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "maxnreg": self.max_registers,
            "enable_fp_fusion": FP_FUSION,
        }
