"""Graphs for GPUs: each condition replaced by what it computes where it holds."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator

from twotower_contract.layout import graph_weights
from twotower_engines.building.flavours.gpu_graph import gpu_graph
from twotower_export.graph import build_context_graph, build_denoiser_graph, build_refine_graph
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
    flat = gpu_graph(graph, has_kernels=True)
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


@pytest.fixture(params=["BlockAttention", "CausalAttention"])
def attention(request):
    """A tower with a layer of grouped-query attention, the name of its function, and its inputs."""
    config = tiny_config("*", hidden=16)
    assert config.num_attention_heads > config.num_key_value_heads > 1
    tower, build = {
        "BlockAttention": ("denoiser", build_denoiser_graph),
        "CausalAttention": ("context", build_context_graph),
    }[request.param]
    stored = dict.fromkeys(graph_weights(config, tower), "F32")
    model = ir.to_proto(build(config, "float32", stored, {}))
    draw = np.random.default_rng(2)
    cache = (2, config.num_key_value_heads, 9, config.head_dim)
    widths = (config.query_width, config.kv_width, config.kv_width)
    shapes = [(2, 4, 16), cache, cache, *((width, 16) for width in widths)]
    floats = [draw.standard_normal(shape, np.float32) for shape in (*shapes, (16, widths[0]))]
    rows = [np.array(values, np.int32) for values in ([4, 2], [5, 1])]
    return model, request.param, [*floats[:3], *rows, *floats[3:]]


def answer(model, name, given):
    """The attention node of a function, what made its mask, and what the function computes.

    By the specification's reference: ONNX Runtime asks for masks of all queries.
    """
    (body,) = (one for one in model.functions if one.name == name)
    makers = {node.output[0]: node.op_type for node in body.node}
    (node,) = (node for node in body.node if node.op_type == "Attention")
    feed = dict(zip(body.input, given, strict=True))
    return node, makers[node.input[3]], ReferenceEvaluator(body).run(None, feed, {})


def test_a_mask_that_is_the_same_for_all_queries_stays_one_row(attention):
    model, name, given = attention
    _, before, wanted = answer(model, name, given)
    _, after, made = answer(gpu_graph(model), name, given)
    assert after == ("Unsqueeze" if name == "BlockAttention" else before)
    assert (before == "Expand") == (name == "BlockAttention")
    for ours, theirs in zip(made, wanted, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("capability", ["8.0", "8.6", "8.9", "9.0", "12.0"])
def test_attention_has_another_form_where_caches_are_copied_for_each_head(attention, capability):
    model, name, given = attention
    plain, before, wanted = answer(model, name, given)
    node, after, made = answer(gpu_graph(model, [capability]), name, given)
    changed = [ours != theirs for ours, theirs in zip(node.input, plain.input, strict=True)][:3]
    folded, copied = [True, False, False], [False, True, True]
    copying = folded if name == "BlockAttention" else copied
    assert changed == (copying if capability in ("8.0", "8.6") else [False] * 3)
    assert name == "BlockAttention" or after == before, "a mask for each token is repeated"
    for ours, theirs in zip(made, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
