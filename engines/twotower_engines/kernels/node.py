"""The parts of an op's chain: nodes with one kernel launch each, as TensorRT's plugins must be.

A node knows the shapes of its outputs and how its kernel is launched, as arithmetic on the
dimensions of its inputs. The arithmetic works on integers, for tests and for launches through the
driver, and on TensorRT's symbolic dimensions, in `plugins`; nothing here imports TensorRT.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from twotower_engines.errors import BuildError
from twotower_engines.kernels.compile import compile_kernel
from twotower_engines.kernels.jit import SHARED_MEMORY_LIMIT
from twotower_engines.kernels.spec import KernelSpec
from twotower_engines.kernels.targets import Target

NAMESPACE = "twotower"
"""ONNX domain of the ops and nodes, and TensorRT's namespace of the plugins."""

Dim = Any
"""A dimension: an integer, or a symbolic expression with + - * // whose size is known later."""

POINTERS = {"bf16": "*bf16", "fp32": "*fp32", "i32": "*i32", "fp8": "*u8"}
"""How a kernel sees a tensor; FP8 comes as bytes, for 8.0 has no such type."""


def integer_cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


@dataclass(frozen=True)
class Call:
    """One node's inputs, while it is put into a network.

    Attributes:
        dims: Input name to its dimensions.
        largest: Input name to its largest dimensions in the profile, as integers; empty while
            TensorRT only asks for shapes.
        dtypes: Input name to "bf16", "fp32", "i32" or "fp8".
        attributes: Attribute name to its value.
        cdiv: Division of dimensions, rounded up.
        minimum: The smaller of two dimensions.
        tactic: Which of the node's tactics, from 1.
    """

    dims: Mapping[str, Sequence[Dim]]
    largest: Mapping[str, Sequence[int]]
    dtypes: Mapping[str, str]
    attributes: Mapping[str, Any]
    cdiv: Callable[[Dim, Any], Dim] = integer_cdiv
    minimum: Callable[[Dim, Any], Dim] = min
    tactic: int = 1

    def size(self, name: str, axis: int) -> int:
        """Return an input's largest size along an axis.

        Raises:
            BuildError: TensorRT does not know it.
        """
        size = int(self.largest[name][axis])
        if size < 0:
            raise BuildError(f"the plugin's input {name} has no bound along axis {axis}")
        return size


@dataclass(frozen=True)
class Output:
    """An output's type and dimensions."""

    dtype: str
    dims: tuple[Dim, ...]


@dataclass(frozen=True)
class Launching:
    """A kernel, its grid and its integer arguments by name."""

    spec: KernelSpec
    grid: tuple[Dim, ...]
    integers: Mapping[str, Dim]


@dataclass(frozen=True)
class Node:
    """One plugin: one kernel launch of an op's chain.

    Attributes:
        name: Name of the plugin.
        takes: Tensors of the op, or of earlier nodes, in the order of the node's inputs. A tensor
            that the kernel has no parameter for is passed all the same, and ignored: it tells
            sizes, or is for the node's function.
        makes: Tensors that the node computes, in order.
        attributes: Attribute name to its type.
        outputs: Returns the types and dimensions of what a call makes.
        launching: Returns the launch of a call whose largest sizes are known. Its kernel may depend
            on sizes that are the same in every profile, and on the tactic: TensorRT keeps one
            kernel of a plugin for each tactic, whatever the profile.
        function: Body for an engine without the plugin. "op": the op itself, on
            the node's first inputs; "same": the second input; "nothing": a constant, because the
            nodes that follow do not look at it.
        tactics: Kernels to choose from. TensorRT times each in each profile.
    """

    name: str
    takes: tuple[str, ...]
    makes: tuple[str, ...]
    attributes: Mapping[str, type]
    outputs: Callable[[Call], tuple[Output, ...]]
    launching: Callable[[Call], Launching]
    function: str
    tactics: int = 1


@dataclass(frozen=True)
class Op:
    """An op of the exported graphs: its tensors in order, and the nodes that compute it."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    chain: tuple[Node, ...]


@dataclass(frozen=True)
class NodeKernel:
    """A node's kernel as TensorRT launches it: inputs, integers, outputs, and nothing else.

    Attributes:
        entry: Name to launch.
        ptx: Source.
        grid: Programs along three dimensions.
        threads: Threads of a program.
        shared_memory: Bytes of dynamic shared memory of a program.
        integers: Arguments between the inputs and the outputs, 32 bits each.
    """

    entry: str
    ptx: str
    grid: tuple[Dim, Dim, Dim]
    threads: int
    shared_memory: int
    integers: tuple[Dim, ...]


def node_kernel(node: Node, call: Call, gpu: Target) -> NodeKernel:
    """Return the kernel of one call of a node, with its parameters in TensorRT's order.

    Raises:
        BuildError: It cannot be compiled, or takes more shared memory than a plugin has.
    """
    launching = node.launching(call)
    compiled = compile_kernel(launching.spec, gpu)
    if compiled.shared_memory > SHARED_MEMORY_LIMIT:
        raise BuildError(
            f"kernel {compiled.name} takes {compiled.shared_memory} bytes of shared memory; a "
            f"plugin has {SHARED_MEMORY_LIMIT}: make its tiles smaller"
        )
    kinds = launching.spec.types
    integers = [name for name, kind in kinds.items() if not kind.startswith("*")]
    outputs = [name for name in kinds if name not in node.takes and name not in integers]
    order = [name if name in kinds else None for name in node.takes]
    x, y, z = (*launching.grid, 1, 1)[:3]
    return NodeKernel(
        entry=compiled.entry,
        ptx=compiled.arranged([*order, *integers, *outputs]),
        grid=(x, y, z),
        threads=compiled.threads,
        shared_memory=compiled.shared_memory,
        integers=tuple(launching.integers[name] for name in integers),
    )


def spec_of(name: str, specs: Sequence[KernelSpec], call: Call) -> KernelSpec:
    """Return the specification of that name, with the types that the inputs really have.

    Bytes stay bytes for a kernel: TensorRT hands these to it as words.
    """
    (spec,) = [spec for spec in specs if spec.name == name]
    given = {
        name: POINTERS[call.dtypes[name]]
        for name, kind in spec.types.items()
        if name in call.dtypes and kind != "*u8"
    }
    return replace(spec, types={**spec.types, **given})
