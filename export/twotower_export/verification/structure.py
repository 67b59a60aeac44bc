"""Whether the graph in the checkpoint's dtype is the float32 graph with casts added.

The same operators in the same order, with the same attributes, constants and inputs, function by
function; every cast of the float32 graph; beyond these only casts to float32 and bfloat16, and the
decoding of quantized inputs. Where values are rounded is left to running it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final

import numpy.typing as npt
import onnx
from onnx import TensorProto, numpy_helper

from twotower_contract.quantized import CODES_PER_WORD
from twotower_export.graph.body import DOMAIN

Array = npt.NDArray[Any]

_SCALES: Final = {"FromINT4": ("_scale",), "FromNVFP4": ("_scale", "_scale_2")}
"""Functions that decode 4 bits, and the ends of the names of what they take beside the codes."""

_FLOATS: Final = (TensorProto.FLOAT, TensorProto.BFLOAT16)


@dataclass(frozen=True)
class _Made:
    """A value: output `output` of the node that comes `node`-th; -1 are inputs; "": left out."""

    node: int
    output: int | str


@dataclass(frozen=True, eq=False)
class _Constant:
    """A value that a Constant node holds."""

    value: Array

    def same(self, float32: _Constant) -> bool:
        """Whether it is the float32 graph's, rounded where this one is bfloat16."""
        ours, theirs = self.value, float32.value
        if ours.dtype != theirs.dtype and (ours.dtype.name, theirs.dtype.name) == (
            "bfloat16",
            "float32",
        ):
            theirs = theirs.astype(ours.dtype)
        return (
            ours.dtype == theirs.dtype
            and ours.shape == theirs.shape
            and ours.tobytes() == theirs.tobytes()
        )


_Value = _Made | _Constant


@dataclass
class _Body:
    """The nodes of a graph or function that are compared, and what each value is.

    Attributes:
        nodes: All but constants.
        values: Name -> value; grows while nodes are compared, because an added cast is its input.
        compared: Nodes compared so far, added casts not counted.
    """

    nodes: list[onnx.NodeProto]
    values: dict[str, _Value]
    compared: int = field(default=0)

    @classmethod
    def of(cls, nodes: Iterable[onnx.NodeProto], inputs: Sequence[str]) -> _Body:
        values: dict[str, _Value] = {"": _Made(-1, "")}
        values |= {name: _Made(-1, name) for name in inputs}
        others = []
        for node in nodes:
            if node.op_type == "Constant" and not node.domain:
                values[node.output[0]] = _Constant(numpy_helper.to_array(node.attribute[0].t))
            else:
                others.append(node)
        return cls(others, values)

    def take(self, node: onnx.NodeProto) -> None:
        """Give the outputs of a compared node their numbers."""
        made = {name: _Made(self.compared, n) for n, name in enumerate(node.output)}
        self.values |= made
        self.compared += 1

    def inputs(self, node: onnx.NodeProto) -> list[_Value | None]:
        return [self.values.get(name) for name in node.input]


def differences(native: onnx.ModelProto, float32: onnx.ModelProto) -> list[str]:
    """Return where the native graph is not the float32 one, the first place of each function."""
    native = undecoded(native)
    found = _interface(native.graph, float32.graph)
    found += _nodes(
        "main graph",
        _Body.of(native.graph.node, [given.name for given in native.graph.input]),
        _Body.of(float32.graph.node, [given.name for given in float32.graph.input]),
        [output.name for output in float32.graph.output],
    )
    if list(native.opset_import) != list(float32.opset_import):
        found.append("it is written in other versions of the operators")
    if native.graph.initializer or native.graph.sparse_initializer:
        found.append("it holds weights")
    ours = {function.name: function for function in native.functions}
    theirs = {function.name: function for function in float32.functions}
    found += [f"function {name} is missing" for name in sorted(theirs.keys() - ours)]
    found += [f"function {name} is one too many" for name in sorted(ours.keys() - theirs)]
    for name in theirs.keys() & ours:
        found += _function(ours[name], theirs[name])
    return found


def undecoded(native: onnx.ModelProto) -> onnx.ModelProto:
    """Return a graph whose quantized matrices are inputs as they were before.

    FP8 codes go with their scale into a DequantizeLinear and a Transpose to [out, in]; codes of 4
    bits go with their scales into the function that decodes them. Anything else stays, and is
    found as a difference. Running it shows what a decoding function computes.
    """
    made = onnx.ModelProto()
    made.CopyFrom(native)
    graph = made.graph
    inputs = {given.name: given for given in graph.input}
    renamed: dict[str, str] = {}
    removed = []
    for node, then in pairwise(graph.node):
        name = node.input[0] if node.input else ""
        if name not in inputs:
            continue
        given = inputs[name].type.tensor_type
        rank = len(given.shape.dim)
        last = [*range(rank - 2), rank - 1, rank - 2]
        sizes = [dim.dim_value for dim in given.shape.dim]
        if (
            node.op_type == "DequantizeLinear"
            and list(node.input) == [name, f"{name}_scale"]
            and [(one.name, one.i) for one in node.attribute] == [("axis", 0)]
            and (then.op_type, list(then.input)) == ("Transpose", list(node.output))
            and list(then.attribute[0].ints) == last
        ):
            sizes = [sizes[place] for place in last]
            renamed[then.output[0]] = name
            removed += [node, then]
        elif node.domain == DOMAIN and list(node.input) == [
            name,
            *(f"{name}{end}" for end in _SCALES.get(node.op_type, ())),
        ]:
            sizes[-1] *= CODES_PER_WORD
            renamed[node.output[0]] = name
            removed.append(node)
        else:
            continue
        given.elem_type = TensorProto.BFLOAT16
        for dim, size in zip(given.shape.dim, sizes, strict=True):
            dim.dim_value = size
        for scale in node.input[1:]:
            graph.input.remove(inputs[scale])
    for node in removed:
        graph.node.remove(node)
    for node in graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = renamed.get(name, name)
    used = {node.op_type for node in graph.node}
    functions = [one for one in made.functions if one.name in used or one.name not in _SCALES]
    del made.functions[:]
    made.functions.extend(functions)
    return made


def _function(ours: onnx.FunctionProto, theirs: onnx.FunctionProto) -> list[str]:
    for what in ("domain", "input", "output", "attribute", "attribute_proto", "opset_import"):
        a, b = getattr(ours, what), getattr(theirs, what)
        if (a if isinstance(a, str) else list(a)) != (b if isinstance(b, str) else list(b)):
            return [f"{ours.name} has another {what.replace('_', ' ')}"]
    return _nodes(
        ours.name,
        _Body.of(ours.node, ours.input),
        _Body.of(theirs.node, theirs.input),
        ours.output,
    )


def _interface(ours: onnx.GraphProto, theirs: onnx.GraphProto) -> list[str]:
    """Compare inputs and outputs: names, order, shapes, and types but for the precision."""
    found = []
    for what in ("input", "output"):
        pairs = (getattr(ours, what), getattr(theirs, what))
        names = [[value.name for value in values] for values in pairs]
        if names[0] != names[1]:
            found.append(f"it has other {what}s")
            continue
        for a, b in zip(*pairs, strict=True):
            a_type, b_type = a.type.tensor_type, b.type.tensor_type
            kinds = (a_type.elem_type, b_type.elem_type)
            narrowed = kinds == (TensorProto.BFLOAT16, TensorProto.FLOAT)
            if a_type.shape != b_type.shape or not (narrowed or kinds[0] == kinds[1]):
                found.append(f"its {what} {a.name} has another shape or type")
    return found


def _nodes(where: str, ours: _Body, theirs: _Body, outputs: Sequence[str]) -> list[str]:
    """Return the first difference between two lists of nodes."""
    waiting = iter(theirs.nodes)
    wanted = next(waiting, None)
    for node in ours.nodes:
        difference = "no such node" if wanted is None else _node(ours, node, theirs, wanted)
        if difference is None and wanted is not None:
            ours.take(node)
            theirs.take(wanted)
            wanted = next(waiting, None)
        elif node.op_type == "Cast" and node.attribute[0].i in _FLOATS:  # added
            source = ours.values.get(node.input[0])
            if source is None:
                return [f"{where}: {node.name} takes {node.input[0]}, which nothing makes"]
            ours.values[node.output[0]] = source
        else:
            return [f"{where}: {node.name}: {difference}"]
    if wanted is not None:
        return [f"{where}: lacks {wanted.name}"]
    wrong = [name for name in outputs if not _same(ours.values.get(name), theirs.values.get(name))]
    return [f"{where}: output {name} is another value" for name in wrong]


def _node(ours: _Body, node: onnx.NodeProto, theirs: _Body, wanted: onnx.NodeProto) -> str | None:
    """In what a node differs from the one wanted; None where it does not."""
    kinds = [(one.domain, one.op_type, len(one.output)) for one in (node, wanted)]
    if kinds[0] != kinds[1]:
        return f"{node.op_type} instead of {wanted.op_type}"
    if _attributes(node) != _attributes(wanted):
        return "other attributes"
    pairs = list(zip(ours.inputs(node), theirs.inputs(wanted), strict=False))
    if len(node.input) != len(wanted.input):
        return "another number of inputs"
    for place, (a, b) in enumerate(pairs):
        if not _same(a, b):
            constant = isinstance(a, _Constant) and isinstance(b, _Constant)
            return f"another {'constant' if constant else 'value'} as input {place}"
    return None


def _same(a: _Value | None, b: _Value | None) -> bool:
    if isinstance(a, _Constant) and isinstance(b, _Constant):
        return a.same(b)
    return a is not None and a == b


def _attributes(node: onnx.NodeProto) -> Mapping[str, bytes]:
    return {one.name: one.SerializeToString(deterministic=True) for one in node.attribute}
