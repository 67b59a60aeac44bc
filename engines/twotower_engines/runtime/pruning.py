"""A graph cut down to what some of its outputs need.

ONNX Runtime computes every node of a graph, also those whose results nobody asked for: a denoise
step the Mamba states after the block, an extension the vocabulary head. (Its run option
`only_execute_path_to_fetches` changes nothing on a CPU.)
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

import onnx
import onnx.inliner


def flat_graph(path: Path) -> onnx.ModelProto:
    """Read a graph and write its functions out, so that their parts can be left out as well."""
    return onnx.inliner.inline_local_functions(onnx.load(str(path), load_external_data=False))


def pruned(model: onnx.ModelProto, outputs: Collection[str]) -> onnx.ModelProto:
    """Return the nodes and inputs that some outputs need.

    Args:
        model: A graph without functions; it is not changed.
        outputs: Names of those to keep, in the graph's order.
    """
    cut = onnx.ModelProto()
    cut.CopyFrom(model)
    needed = set(outputs)
    kept = []
    for node in reversed(model.graph.node):  # sorted: who takes a value comes after who makes it
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(_read(node))
    del cut.graph.node[:], cut.graph.input[:], cut.graph.output[:], cut.graph.value_info[:]
    cut.graph.node.extend(reversed(kept))
    cut.graph.input.extend(value for value in model.graph.input if value.name in needed)
    cut.graph.output.extend(value for value in model.graph.output if value.name in outputs)
    return cut


def _read(node: onnx.NodeProto) -> Iterator[str]:
    """Yield every value that a node reads, those of its branches included."""
    yield from node.input
    for attribute in node.attribute:
        for inner in attribute.g.node:
            yield from _read(inner)
        for output in attribute.g.output:
            yield output.name
