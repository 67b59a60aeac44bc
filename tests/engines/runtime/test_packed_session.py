"""Sessions that hold weights: which arrays they give up, and that what is kept is right."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
from onnx import TensorProto, helper

from twotower_contract.onnxruntime import import_onnxruntime
from twotower_engines.runtime.packed_session import packed_session

ROWS, HIDDEN = 40, 24


def model():
    """table[ids] * exp(scale) @ weight^T, the first size of the weight, and a head in a branch."""
    make, value = helper.make_node, helper.make_tensor_value_info
    head = helper.make_graph(
        [make("Gemm", ["flat", "head"], ["inner"], transB=1)], "then", [],
        [value("inner", TensorProto.FLOAT, None)],
    )  # fmt: skip
    none = helper.make_graph(
        [make("Identity", ["flat"], ["same"])], "else", [], [value("same", TensorProto.FLOAT, None)]
    )
    nodes = [
        make("Gather", ["table", "ids"], ["rows"]),
        make("Exp", ["scale"], ["factor"]),
        make("Mul", ["rows", "factor"], ["scaled"]),
        make("Gemm", ["scaled", "weight"], ["flat"], transB=1),
        make("Shape", ["weight"], ["size"], start=0, end=1),
        make("If", ["asked"], ["y"], then_branch=head, else_branch=none),
    ]
    shapes = {"table": (ROWS, HIDDEN), "scale": (HIDDEN,), "weight": (16, HIDDEN), "head": (9, 16)}
    inputs = [value("ids", TensorProto.INT32, ["n"]), value("asked", TensorProto.BOOL, [1])]
    inputs += [value(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    outputs = [value("y", TensorProto.FLOAT, None), value("size", TensorProto.INT64, [1])]
    graph = helper.make_graph(nodes, "small", inputs, outputs)
    opset = [helper.make_opsetid("", 23)]
    return helper.make_model(graph, opset_imports=opset, ir_version=11), shapes


@pytest.fixture(params=["in memory", "in a file"])
def weights(request, tmp_path):
    def array(name, shape):
        values = np.random.default_rng(len(name)).standard_normal(shape, np.float32)
        if request.param == "in memory":
            return values
        values.tofile(tmp_path / name)
        return np.memmap(tmp_path / name, np.float32, "r", shape=shape)

    return array


def test_a_packed_weight_is_given_up_and_a_table_stays(weights):
    graph, shapes = model()
    expected = {name: np.array(weights(name, shape)) for name, shape in shapes.items()}
    alive = {}

    def drawn():
        for name in [*shapes, "nobody's"]:
            array = weights(name, shapes.get(name, (3,)))
            alive[name] = weakref.ref(array)
            yield name, array

    ort = import_onnxruntime()
    session, kept = packed_session(ort, graph, drawn(), ort.SessionOptions())
    assert kept == {"table"}
    assert [name for name, array in alive.items() if array() is not None] == ["table"]
    ids = np.array([3, 39, 0], np.int32)
    rows = expected["table"][ids] * np.exp(expected["scale"]) @ expected["weight"].T
    for asked, y in ((True, rows @ expected["head"].T), (False, rows)):
        found, size = session.run(["y", "size"], {"ids": ids, "asked": np.array([asked])})
        np.testing.assert_allclose(found, y, rtol=1e-4, atol=1e-4)
        assert size == [16]
    del session
    assert alive["table"]() is None


def test_a_weight_that_would_be_computed_from_at_load_is_not_read_from_nowhere():
    """ONNX Runtime computes what depends on constants alone; a matrix has no values then."""
    value = helper.make_tensor_value_info
    nodes = [helper.make_node("MatMul", ["constant", "weight"], ["y"])]
    constant = helper.make_tensor("constant", TensorProto.FLOAT, [1, 2], [1.0, 2.0])
    graph = helper.make_graph(
        nodes, "constant", [value("weight", TensorProto.FLOAT, [2, 2])],
        [value("y", TensorProto.FLOAT, [1, 2])], [constant],
    )  # fmt: skip
    opset = [helper.make_opsetid("", 23)]
    folded = helper.make_model(graph, opset_imports=opset, ir_version=11)
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    with pytest.raises(Exception, match="require a regular file"):
        packed_session(ort, folded, [("weight", np.eye(2, dtype=np.float32))], options)
