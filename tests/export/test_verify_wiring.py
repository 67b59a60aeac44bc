"""A part that is verified alone gets its inputs from us: where it takes them from is read.

Each graph here computes the right thing in every part and joins one of them wrongly, in both
precisions.
"""

from __future__ import annotations

import onnx
import pytest

from tests.support.sabotage import change_graph, run
from twotower_export.checkpoint import open_checkpoint
from twotower_export.verification.target import open_target
from twotower_export.verification.wiring import wiring_problems


def takes(node, parameter, value):
    """Makes a node of the main graph take another value as one of its parameters."""

    def change(model):
        (found,) = [one for one in model.graph.node if one.name == node]
        (function,) = [one for one in model.functions if one.name == found.op_type]
        found.input[list(function.input).index(parameter)] = value

    return change


def reads(old, new, op_type):
    """Makes the one node of an operator take another value than it does."""

    def change(model):
        (found,) = [one for one in model.graph.node if one.op_type == op_type and old in one.input]
        found.input[list(found.input).index(old)] = new

    return change


def other_embedding(model):
    """Layer 3 gets the time embedding with its sign changed."""
    takes("denoiser.layers.3", "embedding", "changed")(model)
    place = [node.name for node in model.graph.node].index("denoiser.layers.0")
    node = onnx.helper.make_node("Neg", ["denoiser.time_embedding"], ["changed"], name="neg")
    model.graph.node.insert(place, node)


def swapped_outputs(model):
    (node,) = [one for one in model.graph.node if one.name == "context.layers.2"]
    node.output[1], node.output[2] = node.output[2], node.output[1]


TAKEN = {
    "a layer skipped": "context.layers.2 hidden context.layers.0.hidden context.layers.1.hidden",
    "a layer of the denoiser skipped": (
        "denoiser.layers.3 hidden denoiser.layers.1.hidden denoiser.layers.2.hidden"
    ),
    "conditioned by another input": "denoiser.layers.1 conditioned lengths conditioned",
    "the lengths of a MoE layer, which decide only what padding costs": (
        "context.layers.1 lengths context_lengths lengths"
    ),
    "the lengths of the time embedding": "denoiser.time lengths context_lengths lengths",
    "another layer's state": (
        "denoiser.layers.3 ssm_state context.layers.0.ssm_state context.layers.3.ssm_state"
    ),
    "another layer's weight": (
        "context.layers.3 norm.weight context_tower.layers.0.norm.weight "
        "context_tower.layers.3.norm.weight"
    ),
    "another layer's table": "denoiser.layers.2 table scale_shift_tables.1 scale_shift_tables.2",
    "a rule of the refinement": "denoiser.refine threshold temperature threshold",
}
"""Node, parameter, the value that it takes, and the value that it should take."""

CASES = {
    name: (
        node.partition(".")[0],
        takes(node, parameter, value),
        f"{node} takes {value} as its `{parameter}`, not {right}",
    )
    for name, (node, parameter, value, right) in ((n, t.split()) for n, t in TAKEN.items())
} | {
    "another table of embeddings": (
        "denoiser",
        reads("denoiser_tower.embeddings.weight", "lm_head.weight", "Gather"),
        "which is not denoiser_tower.embeddings.weight gathered by ids",
    ),
    "the head before the last layer": (
        "denoiser",
        reads("denoiser.layers.3.hidden", "denoiser.layers.2.hidden", "RMSNorm"),
        "the head does not read denoiser.layers.3.hidden",
    ),
    "the head of the context tower": (
        "context",
        reads("context.layers.3.hidden", "context.layers.2.hidden", "GatherND"),
        "the head also reads context.layers.2.hidden",
    ),
    "another time embedding": (
        "denoiser",
        other_embedding,
        "denoiser.layers.3 takes changed as its `embedding`, not denoiser.time_embedding",
    ),
    "keys for values": (
        "context",
        swapped_outputs,
        "context.layers.2 makes context.layers.2.hidden, context.layers.2.v_cache_new, "
        "context.layers.2.k_cache_new, context.layers.2.queries, not",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_joint_is_named(copied, case):
    tower, change, message = CASES[case]
    for precision in ("float32", "native"):
        change_graph(copied, tower, change, precision)
    report = run(copied, parts=["embeddings"])
    assert not report.outcome.passed
    for precision in ("float32", "bfloat16"):
        start = f"{tower} graph in {precision}: "
        assert any(
            problem.startswith(start) and message in problem for problem in report.outcome.problems
        ), report.outcome.problems
    assert {tensor.part for tensor in report.outcome.tensors} == {
        f"{other}.embeddings" for other in ("context", "denoiser") if other != tower
    }


def test_right_graphs_are_joined_rightly(exported):
    target = open_target(exported / "bundle")
    config = open_checkpoint(exported / "checkpoint").config
    for graphs in (target.graphs, target.native):
        for tower, path in graphs.items():
            assert wiring_problems(onnx.load(str(path)), tower, config) == []
