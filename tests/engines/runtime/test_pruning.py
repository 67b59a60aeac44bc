"""Graphs cut down to some of their outputs, on the CPU flavour's own graphs."""

from __future__ import annotations

import numpy as np
import pytest
from onnx.reference import ReferenceEvaluator

from twotower_engines.runtime.mamba_steps import replace_mamba_steps
from twotower_engines.runtime.pruning import flat_graph, make_optional, prune, replace_norms
from twotower_engines.runtime.routed_experts import replace_experts


@pytest.fixture(scope="module")
def made(random_engines):
    return random_engines("MEM*EM*E", seed=2)


def pruned(path, outputs):
    graph = flat_graph(path).graph
    replace_mamba_steps(graph, with_states=True)
    prune(graph, outputs)
    return graph


def test_a_denoise_step_computes_no_states_and_a_prediction_refines_nothing(made):
    graph = flat_graph(made.folder / "denoiser.onnx").graph
    refine, predict = (
        pruned(made.folder / "denoiser.onnx", outputs) for outputs in (["new_ids"], ["logits"])
    )
    states = {node.output[1] for node in graph.node if node.op_type == "MambaBlockStep"}
    assert len(states) == 3
    for cut in (refine, predict):
        assert not any(states.intersection(node.output) for node in cut.node)
        assert any(node.op_type == "RefineBlock" for node in cut.node) == (cut is refine)
    assert {value.name for value in graph.input} - {value.name for value in predict.input} == {
        "threshold", "steps_left", "temperature", "policy", "seed",
    }  # fmt: skip


def test_an_extension_without_logits_has_no_head(made):
    path = made.folder / "context.onnx"
    graph = flat_graph(path).graph
    states = [value.name for value in graph.output if value.name != "logits"]
    left_out = {value.name for value in graph.input}
    left_out -= {value.name for value in pruned(path, states).input}
    assert {"context_lm_head.weight", "context_tower.norm_f.weight"} <= left_out


def test_an_optional_head_is_a_branch_with_its_weights(made):
    """The last experts of the pattern serve the head alone."""
    graph = flat_graph(made.folder / "context.onnx").graph
    replace_experts(graph)
    make_optional(graph, "logits", "asked")
    (branch,) = (node for node in graph.node if node.op_type == "If")
    inside = [node for attribute in branch.attribute for node in attribute.g.node]
    assert "If" not in {node.op_type for node in inside}
    weights = {name for node in inside for name in node.input}
    last = "context_tower.layers.7.mixer.experts.up_proj.0"
    assert {"context_lm_head.weight", last} <= weights


def test_a_norm_as_one_operator_is_the_graphs_norm(made):
    """The numbers are so small that the epsilon counts."""
    model = flat_graph(made.folder / "context.onnx")
    (function,) = (one for one in model.functions if one.name == "RMSNorm")
    x, weight = np.random.default_rng(0).normal(size=(2, 1, 5, 32)).astype(np.float32) / 300
    given = dict(zip(function.input, (x, weight[0, 0]), strict=True))
    (expected,) = ReferenceEvaluator(function).run(None, given, attributes={})
    replace_norms(model.graph, made.engines.manifest.model.norm_eps)
    norm = next(node for node in model.graph.node if node.op_type == "RMSNormalization")
    given = dict(zip(norm.input, (x, weight[0, 0]), strict=True))
    (found,) = ReferenceEvaluator(norm).run(None, given)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert "RMSNorm" not in {node.op_type for node in model.graph.node}
