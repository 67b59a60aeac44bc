"""Graphs cut down to some of their outputs, on the CPU flavour's own graphs."""

from __future__ import annotations

import pytest

from twotower_engines.runtime.pruning import flat_graph, pruned


@pytest.fixture(scope="module")
def made(random_engines):
    return random_engines("MEM*EM*E", seed=2)


def test_a_denoise_step_computes_no_states_and_a_prediction_refines_nothing(made):
    graph = flat_graph(made.folder / "denoiser.onnx")
    refine, predict = (pruned(graph, outputs) for outputs in (["new_ids"], ["logits"]))
    names = {node.name for node in graph.graph.node}
    assert any("end_state" in name for name in names)
    for cut in (refine, predict):
        left = {node.name for node in cut.graph.node}
        assert not any("end_state" in name for name in left)
        assert any("RefineBlock" in name for name in left) == (cut is refine)
    assert {value.name for value in graph.graph.input} - {
        value.name for value in predict.graph.input
    } == {"threshold", "steps_left", "temperature", "policy", "seed"}


def test_an_extension_without_logits_has_no_head(made):
    graph = flat_graph(made.folder / "context.onnx")
    states = [value.name for value in graph.graph.output if value.name != "logits"]
    inputs = {value.name for value in pruned(graph, states).graph.input}
    left_out = {value.name for value in graph.graph.input} - inputs
    assert {"context_lm_head.weight", "context_tower.norm_f.weight"} <= left_out
