"""Run a bfloat16 graph where no bfloat16 arithmetic is: each operator in float32, then rounded.

ONNX Runtime's CPU provider moves and casts bfloat16 values but does not compute with them. So each
operator that takes or makes some is given its inputs cast to float32, which is exact, and its
outputs are rounded: what hardware does that multiplies bfloat16 and sums in float32. Casts that are
written in the graph stay as they are; nothing may be optimised, because a pair of casts is a
rounding.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

import onnx
import onnx.inliner
from onnx import TensorProto, helper

from twotower_contract.errors import BundleError
from twotower_export.verification.graphs import GraphPart

BFLOAT16: Final = TensorProto.BFLOAT16

_AS_THEY_ARE: Final = ("Cast", "Constant", "Gather", "Shape", "Transpose")
"""Operators that take bfloat16 on a CPU. The experts of a full-size layer are 1.3 GB in bfloat16
where they are transposed, and twice that in float32."""


def emulated(part: GraphPart, weights: Collection[str]) -> GraphPart:
    """Return the same graph, to be run without optimisations.

    Weights go in as they are stored; other bfloat16 inputs are taken in float32 and rounded;
    outputs are float32.

    Args:
        weights: Names of the inputs that are weights.

    Raises:
        BundleError: The types in the graph do not fit together.
    """
    try:
        model = onnx.inliner.inline_local_functions(part.model)
        model = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError) as error:
        raise BundleError(
            f"{part.model.graph.name} graph: its types do not fit: {error}"
        ) from error
    rewriting = _Rewriting(model, set(weights))
    rewriting.inputs()
    nodes = list(model.graph.node)
    del model.graph.value_info[:], model.graph.node[:]
    for node in nodes:
        rewriting.node(node)
    outputs = rewriting.outputs(part.outputs)
    model.graph.node.extend(rewriting.nodes)
    return GraphPart(model, outputs, optimised=False)


class _Rewriting:
    """The nodes of an emulated graph while they are written."""

    def __init__(self, model: onnx.ModelProto, weights: Collection[str]) -> None:
        self._graph, self._weights = model.graph, weights
        values = (*model.graph.value_info, *model.graph.input, *model.graph.output)
        self._types = {value.name: value.type.tensor_type.elem_type for value in values}
        self._renamed: dict[str, str] = {}
        self._wide: dict[str, str] = {}
        self.nodes: list[onnx.NodeProto] = []

    def inputs(self) -> None:
        """Make inputs float32 and round them, weights left out."""
        for given in self._graph.input:
            if self._types[given.name] == BFLOAT16 and given.name not in self._weights:
                given.type.tensor_type.elem_type = TensorProto.FLOAT
                rounded = f"{given.name}::rounded"
                self._cast(given.name, rounded, BFLOAT16)
                self._renamed[given.name] = rounded
                self._types[rounded] = BFLOAT16

    def node(self, node: onnx.NodeProto) -> None:
        """Write a node, with casts around it where it computes with bfloat16 values."""
        for place, name in enumerate(node.input):
            node.input[place] = self._renamed.get(name, name)
        for name in node.output:
            if name and name not in self._types and node.op_type != "Constant":
                raise BundleError(
                    f"{self._graph.name} graph: the type of {name} cannot be inferred; export again"
                )
        if node.op_type == "Constant":
            self._types[node.output[0]] = node.attribute[0].t.data_type
        if node.op_type in _AS_THEY_ARE:
            self.nodes.append(node)
            return
        for place, name in enumerate(node.input):
            if name and self._types[name] == BFLOAT16:
                node.input[place] = self._widened(name)
        narrow = [name for name in node.output if name and self._types[name] == BFLOAT16]
        for place, name in enumerate(node.output):
            if name in narrow:
                node.output[place] = f"{name}::unrounded"
        self.nodes.append(node)
        for name in narrow:
            self._cast(f"{name}::unrounded", name, BFLOAT16)

    def outputs(self, reported: dict[str, str]) -> dict[str, str]:
        """Make outputs float32; returns name of each output -> name to report it by."""
        found = {}
        for output in self._graph.output:
            name = output.name
            if self._types[name] == BFLOAT16:
                output.name = self._widened(self._renamed.get(name, name))
                output.type.tensor_type.elem_type = TensorProto.FLOAT
            found[output.name] = reported[name]
        return found

    def _widened(self, name: str) -> str:
        if name not in self._wide:
            self._wide[name] = f"{name}::float32"
            self._cast(name, self._wide[name], TensorProto.FLOAT)
        return self._wide[name]

    def _cast(self, source: str, target: str, to: int) -> None:
        self.nodes.append(helper.make_node("Cast", [source], [target], to=to))
