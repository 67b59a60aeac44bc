"""Banks of experts as engines without our kernels take them: laid out when they are uploaded.

The exported body of `SparseExperts` multiplies with the down-projections of all experts as one
matrix [hidden, experts x inner], but the graph has them as [experts, hidden, inner], in which form
kernels read an expert. A builder that runs the body makes that matrix the engine's input, under a
name of its own, so that no call transposes a bank; who uploads goes by the name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from twotower_contract.layout import BANKS, FLAT

if TYPE_CHECKING:
    import onnx

OP = "SparseExperts"
DOWN = BANKS[1]


def with_flat_banks(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a graph whose banks of down-projections are inputs as its experts multiply with them.

    Args:
        model: A graph of a bundle; it is not changed. Where its experts do not multiply with all of
            a bank at once, because it is quantized, it comes back as it is.
    """
    flat = type(model)()
    flat.CopyFrom(model)
    body = next((one for one in flat.functions if one.name == OP), None)
    if body is None or not _takes_matrix(body):
        return model
    renamed = {one.name: one.name + FLAT for one in flat.graph.input if one.name.endswith(DOWN)}
    for bank in flat.graph.input:
        if bank.name in renamed:
            bank.name = renamed[bank.name]
            shape = bank.type.tensor_type.shape
            experts, rows, columns = (dim.dim_value for dim in shape.dim)
            del shape.dim[2:]
            shape.dim[0].dim_value, shape.dim[1].dim_value = rows, experts * columns
    for node in flat.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
    return flat


def _takes_matrix(body: onnx.FunctionProto) -> bool:
    """Make the matrix that a body makes of a bank its parameter; says whether it makes one."""
    bank = body.input[-1]
    made = [bank]  # and what becomes of it
    nodes = []
    for node in body.node:
        if node.op_type in ("Transpose", "Reshape") and node.input[0] == made[-1]:
            made.append(node.output[0])
            nodes.append(node)
    if [node.op_type for node in nodes] != ["Transpose", "Reshape"]:
        return False
    for node in nodes:
        body.node.remove(node)
    for node in body.node:
        node.input[:] = [bank if name == made[-1] else name for name in node.input]
    return True
