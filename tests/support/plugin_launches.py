"""The plugins' own PTX launched through the CUDA driver's API, as TensorRT launches it.

TensorRT gives a kernel its inputs, the integers and the outputs, in that order, one address each,
and asks for nothing else: no attribute of the function is set. Here a node's kernel gets exactly
that, so a wrong order, a parameter too many, or shared memory that must be asked for is seen on a
GPU without TensorRT. `driver_fake` stands in for the driver where there is none.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from twotower_engines.kernels.node import Call, Node, NodeKernel, node_kernel
from twotower_engines.kernels.nodes import OPS
from twotower_engines.kernels.targets import Target

DTYPES = {
    **{torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32"},
    torch.float8_e4m3fn: "fp8",
}
TORCH = {name: dtype for dtype, name in DTYPES.items()}


def node_call(
    node: Node, inputs: Sequence[Tensor], attributes: Mapping[str, Any], tactic: int = 1
) -> Call:
    """Return what a node is told of tensors."""
    tensors = dict(zip(node.takes, inputs, strict=True))
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    dtypes = {name: DTYPES[tensor.dtype] for name, tensor in tensors.items()}
    chosen = {name: attributes[name] for name in node.attributes}
    return Call(shapes, shapes, dtypes, chosen, tactic=tactic)


def made_tensors(node: Node, call: Call, device: torch.device) -> list[Tensor]:
    """Return memory for a node's outputs, of exactly the sizes that the node says."""
    outputs = node.outputs(call)
    return [torch.empty(out.dims, dtype=TORCH[out.dtype], device=device) for out in outputs]


class ArgumentList:
    """The array of addresses that `cuLaunchKernel` takes, and what they point to."""

    def __init__(
        self, inputs: Sequence[Tensor], integers: Sequence[int], outputs: Sequence[Tensor]
    ) -> None:
        self.values = [
            *(ctypes.c_uint64(tensor.data_ptr()) for tensor in inputs),
            *(ctypes.c_int32(number) for number in integers),
            *(ctypes.c_uint64(tensor.data_ptr()) for tensor in outputs),
        ]
        addresses = [ctypes.addressof(value) for value in self.values]
        self.array = (ctypes.c_void_p * len(addresses))(*addresses)

    @property
    def address(self) -> int:
        return ctypes.addressof(self.array)


@dataclass
class Launcher:
    """Runs nodes on one GPU.

    Attributes:
        driver: NVIDIA's `cuda.bindings.driver`, or the fake.
        gpu: What kernels are compiled for.
        stream: The stream's handle.
    """

    driver: Any
    gpu: Target
    stream: int = 0
    _functions: dict[str, Any] = field(default_factory=dict)

    def run(
        self, node: Node, inputs: Sequence[Tensor], attributes: Mapping[str, Any], tactic: int = 1
    ) -> list[Tensor]:
        """Launch one node, and return its outputs."""
        call = node_call(node, inputs, attributes, tactic)
        made = made_tensors(node, call, inputs[0].device)
        self.launch(node_kernel(node, call, self.gpu), inputs, made)
        return made

    def run_chain(
        self, op: str, inputs: Sequence[Tensor], attributes: Mapping[str, Any], tactic: int = 1
    ) -> dict[str, Tensor]:
        """Launch an op's nodes one after another, and return every tensor by name."""
        tensors = dict(zip(OPS[op].inputs, inputs, strict=True))
        for node in OPS[op].chain:
            given = [tensors[name] for name in node.takes]
            made = self.run(node, given, attributes, min(tactic, node.tactics))
            tensors.update(zip(node.makes, made, strict=True))
        return tensors

    def launch(
        self, kernel: NodeKernel, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> None:
        """Launch a kernel with TensorRT's argument list."""
        arguments = ArgumentList(inputs, kernel.integers, outputs)
        function = self._function(kernel)
        block = (kernel.threads, 1, 1)
        self._done(
            self.driver.cuLaunchKernel(
                *(function, *kernel.grid, *block, kernel.shared_memory),
                *(self.stream, arguments.address, 0),
            )
        )

    def _function(self, kernel: NodeKernel) -> Any:
        """Return a handle of the PTX's entry; modules are kept."""
        if kernel.ptx not in self._functions:
            (module,) = self._done(self.driver.cuModuleLoadData(kernel.ptx.encode() + b"\0"))
            name = kernel.entry.encode()
            (handle,) = self._done(self.driver.cuModuleGetFunction(module, name))
            self._functions[kernel.ptx] = handle
        return self._functions[kernel.ptx]

    def _done(self, result: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return what a call returned, without its status."""
        status, *values = result
        if int(status) != 0:
            _, text = self.driver.cuGetErrorString(status)
            raise RuntimeError(f"the CUDA driver says {status!r}: {text.decode()}")
        return tuple(values)
