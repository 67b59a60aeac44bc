"""Body: the nodes of one ONNX function, or of a main graph, as they are written.

A thin layer over `onnx_ir.tape.Tape` that adds what writing a model by hand needs: shared
constants, named values, casts that vanish where the dtype already fits, and calls of functions
written before. It knows nothing about towers.

Nodes are named after the section of the body that they are written in: `decay.exp` is the first Exp
of section `decay`, `decay.exp_1` the second. A node more in one section renames none in another.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import onnx_ir as ir
import onnx_ir.tape

OPSET = 24
"""Version of the standard operators: the first that has `Attention` and `TensorScatter`."""

DOMAIN = "twotower"
"""Domain of the functions in this file and of the plugins that can replace three of them."""

FLOAT = ir.DataType.FLOAT
INT32 = ir.DataType.INT32
INT64 = ir.DataType.INT64


_SECTION = "section"
"""Key of a node's metadata that only exists until nodes are named."""

Given = ParamSpec("Given")
Made = TypeVar("Made")


class Operators:
    """`op.Mul(x, y)` writes a node to the tape and returns its output; keywords are attributes.

    Attributes:
        tape: The nodes.
        section: That nodes belong to which are written now.
    """

    def __init__(self) -> None:
        self.tape = ir.tape.Tape()
        self.section = ""

    def __getattr__(self, op_type: str) -> Callable[..., ir.Value]:
        def write(*args: ir.Value, **attributes: Any) -> ir.Value:
            value = self.tape.op(op_type, args, attributes)
            self.mark(value)
            return value

        return write

    def several(
        self, op_type: str, *args: ir.Value, outputs: int, **attributes: Any
    ) -> Sequence[ir.Value]:
        """Write a node of several outputs, and return them."""
        values = self.tape.op_multi_out(op_type, args, attributes, num_outputs=outputs)
        self.mark(values[0])
        return values

    def mark(self, output: ir.Value) -> None:
        """Note which section the node of an output belongs to."""
        node = output.producer()
        assert node is not None, "the output of a node that was just written"
        node.meta[_SECTION] = self.section


@dataclass
class Body:
    """Nodes in the order in which they are written; `body.op.Mul(x, y)` adds one.

    Args:
        dtype: Compute dtype of the model ("T" in docstrings); `up` and `down` go between it and
            float32 and are no nodes at all where T is float32.
    """

    dtype: ir.DataType
    op: Operators = field(default_factory=Operators)
    _constants: dict[str, ir.Value] = field(default_factory=dict)
    _outer: str = ""

    def __post_init__(self) -> None:
        self._outside = self.op.tape

    def begin(self, section: str) -> None:
        """Name the part of the body that begins here; it ends where the next one begins."""
        self.op.section = self._outer + section

    def const(self, value: Any, dtype: ir.DataType) -> ir.Value:
        """Return a constant; equal ones are one node."""
        array = np.asarray(value)
        digest = hashlib.sha256(array.tobytes()).hexdigest()[:12]
        key = f"const_{dtype.name}_{'x'.join(map(str, array.shape))}_{digest}".lower()
        if key not in self._constants:
            tensor = ir.Tensor(array.astype(dtype.numpy()), dtype=dtype, name=key)
            # Never inside a branch: whoever asks for it next may stand outside.
            made = self._outside.op("Constant", [], {"value": tensor})
            made.name = key
            self._constants[key] = made
        return self._constants[key]

    def f32(self, value: Any, rank: int = 0) -> ir.Value:
        """Return a float32 constant of at least so many dimensions."""
        return self.const(np.array(value, ndmin=rank), FLOAT)

    def i32(self, value: Any) -> ir.Value:
        """Return an int32 constant."""
        return self.const(value, INT32)

    def i64(self, value: Any) -> ir.Value:
        """Return an int64 constant, as axes and shapes are."""
        return self.const(value, INT64)

    def cast(self, x: ir.Value, dtype: ir.DataType) -> ir.Value:
        """`x` in another dtype."""
        return self.op.Cast(x, to=dtype)

    def up(self, x: ir.Value) -> ir.Value:
        """T -> float32."""
        return x if self.dtype == FLOAT else self.cast(x, FLOAT)

    def down(self, x: ir.Value) -> ir.Value:
        """Cast float32 to T."""
        return x if self.dtype == FLOAT else self.cast(x, self.dtype)

    def reshape(self, x: ir.Value, *dims: int | ir.Value) -> ir.Value:
        """Reshape to sizes; 0 keeps that dimension of `x`, -1 is inferred.

        For a size that may be 0, TensorRT's compiler makes operators that look for it. So where
        none is, the node says so.

        Args:
            dims: Numbers, and int64 vectors of sizes that a call decides.
        """
        fixed = [dim for dim in dims if isinstance(dim, int)]
        if len(fixed) == len(dims):
            shape = self.i64(fixed)
        else:
            parts = [self.i64([dim]) if isinstance(dim, int) else dim for dim in dims]
            shape = self.op.Concat(*parts, axis=0)
        named = {} if 0 in fixed else {"allowzero": 1}
        return self.op.Reshape(x, shape, **named)

    def unsqueeze(self, x: ir.Value, *axes: int) -> ir.Value:
        """Insert dimensions of size one."""
        return self.op.Unsqueeze(x, self.i64(list(axes)))

    def transpose(self, x: ir.Value, *perm: int) -> ir.Value:
        """Return `x` with its dimensions in another order."""
        return self.op.Transpose(x, perm=list(perm))

    def slice(self, x: ir.Value, start: int, end: int | None, axis: int) -> ir.Value:
        """Return `x[start:end]` along one axis; an end of None means to its end."""
        stop = np.iinfo(np.int64).max if end is None else end
        return self.op.Slice(x, self.i64([start]), self.i64([stop]), self.i64([axis]))

    def linear(self, x: ir.Value, weight: ir.Value, width: int, *sizes: int) -> ir.Value:
        """Return `x @ weight.T`; x [B, L, ..], weight [out, width] -> [B, L, *sizes].

        One Gemm over all rows, which reads the weight as it lies: TensorRT writes a transposed copy
        of it at every call where a MatMul takes its Transpose.

        Args:
            width: Numbers of a token: the product of the sizes of `x` after the second.
            sizes: Their product is out.
        """
        rows = self.op.Gemm(self.reshape(x, -1, width), weight, transB=1)
        return self.reshape(rows, self.op.Shape(x, end=2), *sizes)

    def silu(self, x: ir.Value) -> ir.Value:
        """Return x * sigmoid(x)."""
        return self.op.Mul(x, self.op.Sigmoid(x))

    def size(self, x: ir.Value, axis: int) -> ir.Value:
        """Return the size of one dimension as an int64 tensor of shape [1]."""
        return self.op.Shape(x, start=axis, end=axis + 1)

    def arange(self, size: ir.Value) -> ir.Value:
        """0, 1, .. size - 1 as int32; size int64 [1].

        The range is int64: ONNX Runtime refuses an int32 one over a size that it knows.
        """
        return self.cast(self.op.Range(self.i64(0), self.op.Squeeze(size), self.i64(1)), INT32)

    def when(
        self,
        condition: ir.Value,
        then: Callable[[], ir.Value],
        otherwise: Callable[[], ir.Value],
        dtype: ir.DataType,
    ) -> ir.Value:
        """`then()` where the condition holds, `otherwise()` where not; only one is computed.

        `then()` must be right in either case, and for each row by itself: on a GPU a condition is a
        wait for the host, which no CUDA graph can capture. There `then()` is computed for the rows
        that a call lists, or for all.

        Args:
            condition: Bool [] or [1].
            then: Writes the nodes of one branch.
            otherwise: Writes those of the other.
            dtype: Dtype of the result.
        """
        branches = {}
        for name, write in (("then_branch", then), ("else_branch", otherwise)):
            outer, self.op.tape = self.op.tape, ir.tape.Tape()
            try:
                value = write()
                value.type = ir.TensorType(dtype)
                nodes = self.op.tape.nodes
            finally:
                self.op.tape = outer
            branches[name] = ir.Graph([], [value], nodes=nodes, name=name)
            for node in nodes:  # a graph names its nodes, but they are part of this body
                node.name = None
                for value in node.outputs:
                    value.name = None
        return self.op.If(condition, **branches)

    def call(
        self,
        function: ir.Function,
        inputs: Sequence[ir.Value],
        name: str | None = None,
        outputs: Sequence[str] | None = None,
    ) -> Sequence[ir.Value]:
        """Call `function` in a node; return its outputs in order, named `outputs` where given.

        A function's attributes describe it to plugins and are repeated on every call.
        """
        made: Sequence[ir.Value] = self.op.tape.op_multi_out(
            function.name,
            inputs,
            {name: attr.value for name, attr in function.attributes.items()},
            num_outputs=len(function.outputs),
            domain=function.domain,
            version=1,
            name=name,
        )
        self.op.mark(made[0])
        for value, value_name in zip(made, outputs or (), strict=bool(outputs)):
            value.name = value_name
        return made

    def function(
        self,
        name: str,
        inputs: Sequence[ir.Value],
        outputs: Mapping[str, ir.Value],
        doc: str,
        attributes: Mapping[str, int | float | str] | None = None,
    ) -> ir.Function:
        """Return the nodes written so far as a function of the domain `twotower`.

        Args:
            attributes: Attributes for a plugin of the same name. The body does not read them:
                it is written for one model's sizes.
        """
        nodes = prefixed(self.op.tape.nodes, name)
        for output_name, value in outputs.items():
            value.name = output_name
        graph = ir.Graph(
            list(inputs),
            list(outputs.values()),
            nodes=nodes,
            opset_imports={"": OPSET, DOMAIN: 1},
            name=name,
            doc_string=doc,
        )
        given = dict(attributes or {})
        if given:
            given |= {"plugin_namespace": DOMAIN, "plugin_version": "1"}
        attrs = {key: ir.convenience.convert_attribute(key, value) for key, value in given.items()}
        return ir.Function(DOMAIN, name, graph=graph, attributes=attrs)


def in_section(
    name: str,
) -> Callable[[Callable[Concatenate[Body, Given], Made]], Callable[Concatenate[Body, Given], Made]]:
    """Give the nodes that the decorated function writes a section of their own.

    Within a section, this is a part of that section; sections that the function begins are parts of
    its own.
    """

    def decorate(
        build: Callable[Concatenate[Body, Given], Made],
    ) -> Callable[Concatenate[Body, Given], Made]:
        @functools.wraps(build)
        def inside(b: Body, /, *args: Given.args, **kwargs: Given.kwargs) -> Made:
            outer, section = b._outer, b.op.section
            b.op.section = f"{section}.{name}" if section else name
            b._outer = f"{b.op.section}."
            try:
                return build(b, *args, **kwargs)
            finally:
                b._outer, b.op.section = outer, section

        return inside

    return decorate


def prefixed(nodes: Sequence[ir.Node], prefix: str) -> list[ir.Node]:
    """Give nameless nodes and values their names: `<prefix>/<section>.<op>`, then `.._1`, ...

    Constants are named after what they hold.
    """
    counts: dict[str, int] = {}
    for node in _with_branches(nodes):
        section = node.meta.pop(_SECTION, "")
        if node.op_type == "Constant":
            node.name = f"{prefix}/{node.outputs[0].name}"
            continue
        stem = f"{section}.{node.op_type.lower()}".removeprefix(".")
        count = counts.get(stem, 0)
        counts[stem] = count + 1
        stem = f"{stem}_{count}" if count else stem
        node.name = node.name or f"{prefix}/{stem}"
        for index, value in enumerate(node.outputs):
            value.name = value.name or (stem if len(node.outputs) == 1 else f"{stem}.{index}")
    return list(nodes)


def _with_branches(nodes: Iterable[ir.Node]) -> Iterator[ir.Node]:
    """Yield nodes, each followed by those of its branches."""
    for node in nodes:
        yield node
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                yield from _with_branches(attribute.as_graph())


def inputs(*names: str) -> list[ir.Value]:
    """Return inputs of a function: ONNX functions take any dtype and shape."""
    return [ir.Value(name=name) for name in names]
