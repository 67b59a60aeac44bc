"""The modulations of all layers at once are the same as each layer's own."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from twotower_contract.onnxruntime import import_onnxruntime
from twotower_engines.runtime.modulations import replace_modulations
from twotower_engines.runtime.pruning import flat_graph

ROWS, HIDDEN = 2, 32


def test_at_once_as_each_by_itself(random_engines):
    model = flat_graph(random_engines("MEM*EM*E", seed=2).folder / "denoiser.onnx")
    calls = [node for node in model.graph.node if node.op_type == "Modulation"]
    embedding, _, conditioned = calls[0].input
    shapes = {node.input[1]: [3, HIDDEN] for node in calls} | {embedding: [ROWS, 3, HIDDEN]}
    value = helper.make_tensor_value_info
    del model.graph.node[:], model.graph.input[:], model.graph.output[:]
    model.graph.node.extend(calls)
    model.graph.input.extend(value(name, 1, shape) for name, shape in shapes.items())
    model.graph.input.append(value(conditioned, 6, [ROWS]))
    names = [name for node in calls for name in node.output]
    model.graph.output.extend(value(name, 1, [ROWS, 1, HIDDEN]) for name in names)
    ours = onnx.ModelProto()
    ours.CopyFrom(model)
    replace_modulations(ours.graph)
    del ours.functions[:]
    draw = np.random.default_rng(0)
    given = {name: draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    given[conditioned] = np.array([1, 0], np.int32)
    each, at_once = (
        import_onnxruntime()
        .InferenceSession(one.SerializeToString(), providers=["CPUExecutionProvider"])
        .run(names, given)
        for one in (model, ours)
    )
    assert len(each) == 3 * 8
    np.testing.assert_array_equal(at_once, each)
