"""Graphs for GPUs: each condition replaced by what it computes where it holds."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from twotower_engines.building.flavours.branches import without_branches
from twotower_export.graph import build_refine_graph
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
    flat = without_branches(graph)
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
