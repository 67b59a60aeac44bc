"""An ONNX Runtime session that holds a tower's weights, its matrices packed for its products.

A weight that is a graph's input is read as it lies, at every call: products of 16 tokens run at
half the speed. A weight inside the session (an initializer) is packed once, and the array that it
came from is given up. ONNX Runtime does not say which arrays it goes on to read, so each belongs to
the session's own value, and lives as long as that.

Sessions share no packed weights (the Python API has no container for them): one session per tower.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from twotower_engines.runtime.nodes import all_nodes

Array = npt.NDArray[Any]

MATRIX_INPUT = {"Gemm": 1, "MatMul": 1, "MatMulIntegerToFloat": 1, "Gather": 0}
"""Operators that read matrices, and as which of their inputs."""

# ONNX Runtime wants a file to be where values are said to lie, and never reads it: what it would
# read is not in it, and that would be an error.
NO_FILE = Path(os.devnull)
PROVIDER = "CPUExecutionProvider"


def packed_session(
    ort: Any, model: onnx.ModelProto, weights: Iterable[tuple[str, Array]], options: Any
) -> tuple[Any, frozenset[str]]:
    """Open a graph with its weights inside.

    Args:
        ort: The module `onnxruntime`.
        model: A graph without functions whose weights are inputs; it is changed.
        weights: Every weight by name, in any order; C-contiguous. Those that the graph does not
            read are left out.
        options: The session's options; they are changed and not to be used again.

    Returns:
        The session, and the names of the matrices that it reads where they lay: those that no
        product takes, such as embeddings.
    """
    values, lent = _put_inside(ort, model.graph, weights)
    for name in values:  # the options know a value by its address alone
        options.add_initializer(name, values[name])
    key = "session.model_external_initializers_file_folder_path"
    options.add_session_config_entry(key, str(NO_FILE.parent))
    session = ort.InferenceSession(model.SerializeToString(), options, [PROVIDER])
    values.clear()
    return session, frozenset(name for name, owner in lent.items() if owner() is not None)


class _Lent:
    """The memory of an array, for ONNX Runtime, which never writes to a weight.

    NumPy hands no read-only array on, as those are that lie in a file; this says it is writable.
    """

    def __init__(self, array: Array) -> None:
        self._owner = array
        address = (array.ctypes.data, False)
        self.__array_interface__ = {**array.__array_interface__, "data": address}


def _put_inside(
    ort: Any, graph: onnx.GraphProto, weights: Iterable[tuple[str, Array]]
) -> tuple[dict[str, Any], dict[str, weakref.ref[_Lent]]]:
    """Make the weights initializers of a graph.

    Returns:
        Value of each matrix, which the graph has no more than the name of, and its memory.
    """
    inputs = {value.name: value for value in graph.input}
    write_shapes(graph)
    matrices = _matrices(graph)
    values: dict[str, Any] = {}
    lent: dict[str, weakref.ref[_Lent]] = {}
    for name, array in weights:
        if name not in inputs:
            continue
        del inputs[name]
        if name in matrices:
            owner = _Lent(array)
            lent[name] = weakref.ref(owner)
            values[name] = ort.OrtValue.from_dlpack(np.asarray(owner))
            graph.initializer.append(_elsewhere(name, array))
        else:  # a vector: what is computed from it alone is computed once
            graph.initializer.append(numpy_helper.from_array(array, name))
    kept = list(inputs.values())
    del graph.input[:]
    graph.input.extend(kept)
    return values, lent


def _elsewhere(name: str, array: Array) -> onnx.TensorProto:
    """Return an initializer without values."""
    tensor = TensorProto(
        name=name,
        dims=array.shape,
        data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
        data_location=TensorProto.EXTERNAL,
    )
    tensor.external_data.add(key="location", value=NO_FILE.name)
    return tensor


def write_shapes(graph: onnx.GraphProto) -> None:
    """Make constants of the shapes of weights: a node that asks for one keeps the weight alive."""
    inputs = {value.name: value for value in graph.input}
    for node in all_nodes(graph):
        if node.op_type == "Shape" and node.input[0] in inputs:
            sizes = inputs[node.input[0]].type.tensor_type.shape.dim
            if any(not size.HasField("dim_value") for size in sizes):
                continue
            cut = {attribute.name: attribute.i for attribute in node.attribute}
            shape = [size.dim_value for size in sizes][cut.get("start", 0) : cut.get("end")]
            value = numpy_helper.from_array(np.array(shape, np.int64))
            constant = helper.make_node("Constant", [], node.output, node.name, value=value)
            node.CopyFrom(constant)


def _matrices(graph: onnx.GraphProto) -> set[str]:
    """Return the values that are read as matrices and as nothing else, branches included."""
    matrices: set[str] = set()
    others: set[str] = set()
    for node in all_nodes(graph):
        for place, name in enumerate(node.input):
            (matrices if MATRIX_INPUT.get(node.op_type) == place else others).add(name)
    return matrices - others
