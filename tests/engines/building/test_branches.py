"""Graphs for GPUs: each condition replaced by what it computes where it holds."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator

from twotower_contract.layout import graph_weights
from twotower_engines.building.flavours.branches import gpu_graph
from twotower_export.graph import build_denoiser_graph, build_refine_graph
from twotower_export.tiny.checkpoints import tiny_config

V = 264


@pytest.fixture(scope="module")
def graph():
    return ir.to_proto(build_refine_graph(tiny_config("M", vocab_size=V), "float32", {}, {}))


def conditions(model):
    return [node for one in model.functions for node in one.node if node.op_type == "If"]


@pytest.mark.parametrize("temperature", [[0.0, 0.0], [0.0, 0.9]])
@pytest.mark.parametrize("policy", [0, 3])
def test_a_graph_without_conditions_means_the_same(graph, temperature, policy):
    flat = gpu_graph(graph)
    assert len(conditions(graph)) == 2
    assert not conditions(flat)
    onnx.checker.check_model(flat)
    generator = np.random.default_rng(1)
    rows = {
        "threshold": np.full(2, 0.3, np.float32),
        "temperature": np.array(temperature, np.float32),
        **{
            name: np.full(2, value, np.int32)
            for name, value in (("lengths", 8), ("steps_left", 4), ("policy", policy), ("seed", 5))
        },
    }
    logits = generator.standard_normal((2, 8, V)).astype(np.float32) * 3
    feed = {"logits": logits, "ids": np.full((2, 8), 3, np.int32), **rows}
    made = [
        onnxruntime.InferenceSession(model.SerializeToString()).run(None, feed)
        for model in (graph, flat)
    ]
    for ours, theirs in zip(*made, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_mask_that_is_the_same_for_all_queries_stays_one_row():
    """ONNX Runtime cannot run it so; the specification's reference can."""
    config = tiny_config("*", hidden=16)
    stored = dict.fromkeys(graph_weights(config, "denoiser"), "F32")
    whole = ir.to_proto(build_denoiser_graph(config, "float32", stored, {}))
    draw = np.random.default_rng(2)
    widths = (config.query_width, config.kv_width, config.kv_width)
    cache = (2, config.num_key_value_heads, 9, config.head_dim)
    weights = [draw.standard_normal((width, 16)) for width in widths]
    weights += [draw.standard_normal((16, config.query_width))]
    floats = [draw.standard_normal(shape) for shape in ((2, 4, 16), cache, cache)]
    rows = [np.array([4, 2], np.int32), np.array([5, 1], np.int32)]
    given = [
        one.astype(np.float32) if one.dtype == float else one for one in floats + rows + weights
    ]
    answers = []
    for model, repeats in ((whole, 1), (gpu_graph(whole), 0)):
        (body,) = (one for one in model.functions if one.name == "BlockAttention")
        makers = {node.output[0]: node.op_type for node in body.node}
        (attention,) = (node for node in body.node if node.op_type == "Attention")
        assert (makers[attention.input[3]] == "Expand") == repeats
        feed = dict(zip(body.input, given, strict=True))
        answers.append(ReferenceEvaluator(body).run(None, feed, {})[0])
    np.testing.assert_array_equal(*answers)
