"""ONNX nodes as they are written, in place of others, when the CPU flavour loads a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

MICROSOFT = "com.microsoft"
"""Domain of the operators that are ONNX Runtime's own."""


class Nodes:
    """Nodes with names of their own; `nodes.add("Mul", x, y)` adds one and returns its output."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.written: list[onnx.NodeProto] = []

    def add(
        self,
        op: str,
        *inputs: str,
        output: str | None = None,
        others: Sequence[str] = (),
        **attributes: Any,
    ) -> str:
        """Add a node and return its first output, named after its operator unless it is given.

        Args:
            op: The operator.
            inputs: Names of values.
            output: Name of the first output.
            others: Names of the other outputs.
            attributes: Those of the node, and its `domain`.
        """
        made = output or f"{self.prefix}.{op}_{len(self.written)}"
        self.written.append(helper.make_node(op, inputs, [made, *others], made, **attributes))
        return made

    def constant(self, values: Any, dtype: npt.DTypeLike = np.int64) -> str:
        """Add a constant and return its name."""
        return self.add("Constant", value=numpy_helper.from_array(np.asarray(values, dtype)))

    def split(self, x: str, count: int, sizes: str, axis: int = 0) -> list[str]:
        """Return parts of a tensor along an axis, of the sizes in `sizes`, int64 [count]."""
        names = [f"{x}.{index}" for index in range(count)]
        self.written.append(helper.make_node("Split", [x, sizes], names, f"{x}.split", axis=axis))
        return names

    def branch(self, *outputs: str, inputs: Sequence[str] = ()) -> onnx.GraphProto:
        """Return these nodes as a branch or a body with float32 inputs and outputs."""
        given, made = (
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]
            for names in (inputs, outputs)
        )
        return helper.make_graph(self.written, self.prefix, given, made)


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Yield the nodes of a graph and of its branches."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            yield from all_nodes(attribute.g)


def read_by(node: onnx.NodeProto) -> Iterator[str]:
    """Yield every value that a node reads, those of its branches included."""
    yield from node.input
    for attribute in node.attribute:
        for inner in attribute.g.node:
            yield from read_by(inner)
        for output in attribute.g.output:
            yield output.name


def only(
    nodes: Iterable[onnx.NodeProto], sought: str, refusal: Callable[[str], Exception]
) -> onnx.NodeProto:
    """Return the one node.

    Args:
        nodes: Those that were found.
        sought: Names what was sought.
        refusal: Makes the error of a graph that has none or several.
    """
    matching = list(nodes)
    if len(matching) != 1:
        raise refusal(f"expected one {sought}, found {len(matching)}")
    return matching[0]


def in_order(nodes: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Return nodes such that whoever makes a value comes before those that read it."""
    makers = {name: index for index, node in enumerate(nodes) for name in node.output}
    ordered: list[onnx.NodeProto] = []
    done: set[int] = set()
    waiting = list(range(len(nodes)))[::-1]
    while waiting:
        index = waiting[-1]
        missing = {makers[name] for name in read_by(nodes[index]) if name in makers} - done
        if index not in done and missing:
            waiting.extend(sorted(missing, reverse=True))
            continue
        waiting.pop()
        if index not in done:
            done.add(index)
            ordered.append(nodes[index])
    return ordered
