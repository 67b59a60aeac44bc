"""Values that layers share: the same as each layer's own, and asked once."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from twotower_contract.onnxruntime import import_onnxruntime
from twotower_engines.runtime.mamba_steps import replace_mamba_steps
from twotower_engines.runtime.pruning import flat_graph, prune, replace_norms
from twotower_engines.runtime.routed_experts import replace_experts
from twotower_engines.runtime.shared_values import replace_modulations, share_shapes

ROWS, HIDDEN = 2, 32


def test_modulations_of_all_layers_at_once_are_those_of_each(random_engines):
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


def test_every_product_of_a_layer_asks_the_ids_for_its_rows_and_tokens(random_engines):
    model = flat_graph(random_engines("MEM*EM*E", seed=2).folder / "denoiser.onnx")
    replace_mamba_steps(model.graph)
    prune(model.graph, ["logits"])
    replace_norms(model.graph, 1e-5)
    replace_modulations(model.graph)
    replace_experts(model.graph)
    share_shapes(model.graph, "ids")
    asked = {}
    for node in model.graph.node:
        if node.op_type == "Shape" and "weight" not in node.input[0]:
            asked.setdefault(node.input[0], []).append(node.name)
    products = sum(node.op_type == "Flatten" for node in model.graph.node)
    assert len(asked["ids"]) > products / 2
    caches = [name for name in asked if name.endswith("cache")]
    assert len(caches) == 1
    del asked["ids"]
    assert not any("in_proj" in name for names in asked.values() for name in names)
