"""A graph cut down to what some of its outputs need.

ONNX Runtime computes every node of a graph, also those whose results nobody asked for: a denoise
step the Mamba states after the block, an extension the vocabulary head. (Its run option
`only_execute_path_to_fetches` changes nothing on a CPU.)
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import onnx
import onnx.inliner
from onnx import TensorProto, helper

from twotower_engines.runtime.nodes import MICROSOFT, read_by

NORM = ("twotower", "RMSNorm")
WRITTEN_ANEW = [
    ("twotower", name)
    for name in ("MambaBlockStep", "Modulation", "SparseExperts", "RefineBlock", "RMSNorm")
]
"""Functions that a CPU has a form of its own for: in `mamba_steps`, `modulations`,
`routed_experts`, `vocabulary_passes`, here."""


def flat_graph(path: Path) -> onnx.ModelProto:
    """Read a graph and write its functions out, so that their parts can be left out as well.

    All but those that are written anew.
    """
    model = onnx.load(str(path), load_external_data=False)
    flat = onnx.inliner.inline_selected_functions(model, WRITTEN_ANEW, exclude=True)
    kept = [one for one in flat.functions if (one.domain, one.name) in WRITTEN_ANEW]
    del flat.functions[:]
    flat.functions.extend(kept)
    flat.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
    return flat


def replace_norms(graph: onnx.GraphProto, epsilon: float) -> None:
    """Make one operator of every norm, in the place of six: half the time, and five nodes less."""
    for node in graph.node:
        if (node.domain, node.op_type) == NORM:
            ends = node.input, node.output, node.name
            node.CopyFrom(helper.make_node("RMSNormalization", *ends, axis=-1, epsilon=epsilon))


def prune(graph: onnx.GraphProto, outputs: Collection[str]) -> None:
    """Leave only the nodes and inputs that some outputs need.

    Args:
        graph: A graph without functions.
        outputs: Names of those to keep, in the graph's order.
    """
    kept, needed = _needed(graph, outputs)
    inputs = [value for value in graph.input if value.name in needed]
    wanted = [value for value in graph.output if value.name in outputs]
    del graph.node[:], graph.input[:], graph.output[:], graph.value_info[:]
    graph.node.extend(kept)
    graph.input.extend(inputs)
    graph.output.extend(wanted)


def make_optional(graph: onnx.GraphProto, output: str, flag: str) -> None:
    """Compute an output, and what it alone needs, only where an input of the graph says so.

    It becomes a branch. ONNX Runtime packs the weights of a branch, but not those of a branch in
    another: what the output alone needs must hold none.

    Args:
        graph: A graph without functions.
        output: Name of a float32 output; its value is empty where it is not computed.
        flag: Name of the new input, bool [1].
    """
    others = [value.name for value in graph.output if value.name != output]
    shared, _ = _needed(graph, others)
    names = {name for node in shared for name in node.output}
    own = [node for node in _needed(graph, [output])[0] if names.isdisjoint(node.output)]
    rank = next(
        len(value.type.tensor_type.shape.dim) for value in graph.output if value.name == output
    )
    inside = f"{output}.computed"
    for node in own:
        node.output[:] = [inside if name == output else name for name in node.output]
    nothing = helper.make_tensor(f"{output}.none", TensorProto.FLOAT, [0] * rank, [])
    empty = helper.make_node("Constant", [], [nothing.name], value=nothing)
    then, otherwise = (
        helper.make_graph(
            nodes, name, [], [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)]
        )
        for nodes, name in ((own, inside), ([empty], nothing.name))
    )
    del graph.node[:]
    graph.node.extend(shared)
    graph.node.append(
        helper.make_node("If", [flag], [output], then_branch=then, else_branch=otherwise)
    )
    graph.input.append(helper.make_tensor_value_info(flag, TensorProto.BOOL, [1]))


def _needed(
    graph: onnx.GraphProto, outputs: Collection[str]
) -> tuple[list[onnx.NodeProto], set[str]]:
    """Return the nodes that some outputs need, in their order, and every value that these read."""
    needed = set(outputs)
    kept = []
    for node in reversed(graph.node):  # sorted: who takes a value comes after who makes it
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(read_by(node))
    return kept[::-1], needed
