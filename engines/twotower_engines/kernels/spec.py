"""Specifications of kernels: the types of their arguments and the sizes compiled into them.

This module knows no kernel and imports no compiler.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from twotower_engines.kernels.jit import Kernel, Launch


@dataclass(frozen=True)
class Sizes:
    """Sizes that the kernels of one model are compiled for; the defaults are the released model's.

    Attributes:
        dtype: Type of logits, activations and large weights: "bf16" or "fp32".
        small_dtype: Type of the weights that stay as they were trained (biases, A_log, D, norms).
        experts_format: Format of the experts' banks: "plain" (T), "fp8", "int4" or "nvfp4".
        scaling: Factor of the routed experts' weights.
        block: Positions of a block.
    """

    vocab_size: int = 131072
    mask_id: int = 3
    hidden: int = 2688
    experts: int = 128
    experts_per_token: int = 6
    inner: int = 1856
    scaling: float = 2.5
    heads: int = 64
    head_dim: int = 64
    state: int = 128
    groups: int = 8
    epsilon: float = 1e-5
    dtype: str = "bf16"
    small_dtype: str = "bf16"
    experts_format: str = "plain"
    block: int = 16


@dataclass(frozen=True)
class KernelSpec:
    """One kernel for one set of types and sizes.

    Attributes:
        name: Unique among the specifications of a model; ends in the type where there are two.
        function: The kernel.
        types: Every run-time parameter's type in Triton's spelling, `*bf16` for a pointer, `i32`
            for an integer; in the kernel's order.
        constants: Every compile-time parameter that `launch` does not give.
        launch: Tiles, warps and stages.
    """

    name: str
    function: Kernel
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    launch: Launch

    @classmethod
    def of(
        cls,
        name: str,
        function: Kernel,
        types: Mapping[str, str],
        constants: Mapping[str, Any],
        launch: Launch,
    ) -> KernelSpec:
        """Return a specification of what the function takes.

        Args:
            types: Type of every run-time parameter; a constant of the same name goes before.
            constants: Every compile-time parameter. Both may hold those of other kernels, too.
        """
        taken = [one for one in function.arg_names if one not in launch.constants]
        fixed = {one: constants[one] for one in taken if one in constants}
        return cls(name, function, {n: types[n] for n in taken if n not in fixed}, fixed, launch)

    @property
    def all_constants(self) -> dict[str, Any]:
        """Every compile-time parameter."""
        return {**self.constants, **self.launch.constants}
