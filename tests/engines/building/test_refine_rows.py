"""The refinement step on listed rows, against the step as it is exported."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from twotower_contract.layout import ROW_LISTS, graph_weights
from twotower_contract.policies import POLICIES
from twotower_engines.building.flavours.gpu_graph import gpu_graph
from twotower_engines.building.flavours.refine_rows import list_rows
from twotower_engines.errors import BuildError
from twotower_export.graph import build_context_graph, build_denoiser_graph, build_refine_graph
from twotower_export.graph.refine import refine_block
from twotower_export.tiny.checkpoints import tiny_config

MASK, V = 3, 261
ROWS, BLOCK = 5, 7
SAMPLED = {"none": [], "some": [1, 4], "all": [0, 1, 2, 3, 4]}


@pytest.fixture(scope="module")
def graph():
    return ir.to_proto(build_refine_graph(tiny_config("M", vocab_size=V), "float32", {}, {}))


@pytest.fixture(scope="module")
def steps(graph):
    """The step as it is exported, and on listed rows."""
    listed = gpu_graph(graph)
    onnx.checker.check_model(listed)
    assert not [node for one in listed.functions for node in one.node if node.op_type == "If"]
    return [onnxruntime.InferenceSession(m.SerializeToString()) for m in (graph, listed)]


def inputs(policies, sampled, block=BLOCK, seed=1):
    """Inputs of a step: masked and decided positions, short rows, some of which draw."""
    draw = np.random.default_rng(seed)
    ids = np.where(draw.random((ROWS, block)) < 0.7, MASK, draw.integers(4, V, (ROWS, block)))
    temperature = np.zeros(ROWS, np.float32)
    temperature[sampled] = draw.uniform(0.3, 1.5, len(sampled))
    return {
        "logits": (4 * draw.standard_normal((ROWS, block, V))).astype(np.float32),
        "ids": ids.astype(np.int32),
        "lengths": np.array([block, 0, block, max(1, block - 2), block], np.int32),
        "threshold": draw.uniform(0.1, 1.5, ROWS).astype(np.float32),
        "steps_left": np.array([4, 4, 1, 2, 9], np.int32),
        "temperature": temperature,
        "policy": np.array(policies, np.int32),
        "seed": draw.integers(0, 2**31 - 1, ROWS).astype(np.int32),
    }


def lists(sampled, entropy):
    """Row numbers in an order of their own: an engine takes any."""
    return {
        "sampled_rows": np.array(sampled[::-1], np.int32),
        "entropy_rows": np.array(entropy, np.int32),
    }


def assert_same(steps, feed, listed):
    exported, rows = steps
    names = [one.name for one in exported.get_outputs()]
    wanted = exported.run(names, feed)
    made = rows.run(names, feed | listed)
    for name, ours, theirs in zip(names, made, wanted, strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg=name)
    return dict(zip(names, made, strict=True))


@pytest.mark.parametrize("block", [1, BLOCK])
@pytest.mark.parametrize("sampled", SAMPLED)
@pytest.mark.parametrize("policy", POLICIES)
def test_listed_rows_get_what_the_exported_step_gives(steps, policy, sampled, block):
    """An `If` takes the branch with noise for all rows where one draws, and so for entropy."""
    number = POLICIES[policy]
    for seed in range(5):
        feed = inputs([number] * ROWS, SAMPLED[sampled], block, seed)
        entropy = list(range(ROWS)) if policy == "entropy" else []
        made = assert_same(steps, feed, lists(SAMPLED[sampled], entropy))
        assert made["committed"].any()


def test_rows_of_each_policy_share_a_call(steps):
    policies = [POLICIES[name] for name in POLICIES][:ROWS]
    feed = inputs([*policies, *[0] * (ROWS - len(policies))], [0, 3])
    unsure = [row for row in range(ROWS) if feed["policy"][row] == POLICIES["entropy"]]
    assert unsure
    for sampled in ([0, 3], SAMPLED["all"]):
        for entropy in (unsure, SAMPLED["all"]):
            assert_same(steps, feed, lists(sampled, entropy))


def test_a_list_decides_who_draws(steps):
    """So a kernel over no rows leaves the noise out, whatever a row's temperature is."""
    feed = inputs([0] * ROWS, SAMPLED["all"]) | {"steps_left": np.ones(ROWS, np.int32)}
    greedy = feed | {"temperature": np.zeros(ROWS, np.float32)}
    _, rows = steps
    drawn, left_out, plain = (
        rows.run(["new_ids"], one | lists(sampled, []))[0]
        for one, sampled in ((feed, SAMPLED["all"]), (feed, []), (greedy, SAMPLED["all"]))
    )
    assert (drawn != left_out).any()
    np.testing.assert_array_equal(left_out, plain)


@pytest.mark.parametrize("sampled", SAMPLED)
def test_ties_the_mask_and_what_is_no_number(steps, sampled):
    feed = inputs([0] * ROWS, SAMPLED[sampled]) | {"lengths": np.full(ROWS, BLOCK, np.int32)}
    feed["ids"][:] = MASK
    logits = feed["logits"]
    logits[0] = 1.0
    logits[0, :, MASK] = 9.0
    logits[1, 2, 5] = np.nan
    logits[2, :, MASK] = np.nan
    logits[3] = -np.inf
    logits[4, 1, [40, 17, 99]] = 50.0
    made = assert_same(steps, feed, lists(SAMPLED[sampled], []))
    assert made["still_masked"][[1, 3]].tolist() == [-1, -1]
    if sampled == "none":
        assert set(made["new_ids"][0].tolist()) <= {0, MASK}, "the first of equal tokens"
        assert made["new_ids"][4, 1] in (17, MASK)
        assert made["still_masked"][2] >= 0, "the mask token's logit is not looked at"


class GatherElements(OpRun):
    """ONNX's own takes no more than 32 bfloat16 numbers along an axis."""

    op_domain = ""

    def _run(self, data, indices, axis=0):
        return (np.take_along_axis(data, indices, axis),)


@pytest.mark.parametrize("sampled", SAMPLED)
@pytest.mark.parametrize("policy", POLICIES)
def test_logits_of_the_towers_dtype_give_the_same(sampled, policy):
    """By the specification's reference: ONNX Runtime has no bfloat16 on a CPU."""
    function = ir.to_proto(refine_block(MASK, ir.DataType.BFLOAT16))
    model = onnx.helper.make_model(
        onnx.helper.make_graph(
            [onnx.helper.make_node(
                "RefineBlock", list(function.input), list(function.output), domain="twotower"
            )],
            "step",
            [],
            [],
        ),
        functions=[function],
    )  # fmt: skip
    listed = onnx.ModelProto()
    listed.CopyFrom(model)
    list_rows(listed)
    feed = inputs([POLICIES[policy]] * ROWS, SAMPLED[sampled])
    feed["logits"] = np.round(feed["logits"] * 2) / 2  # many tokens are as likely as another
    feed["logits"] = feed["logits"].astype(ml_dtypes.bfloat16)
    entropy = list(range(ROWS)) if policy == "entropy" else []
    given = feed | lists(SAMPLED[sampled], entropy)
    wanted, made = (
        ReferenceEvaluator(one.functions[0], new_ops=[GatherElements]).run(
            None, {name: given[name] for name in one.functions[0].input}, {}
        )
        for one in (model, listed)
    )
    for ours, theirs in zip(made, wanted, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.fixture(scope="module")
def denoiser():
    return exported(build_denoiser_graph, "denoiser")


def exported(build, tower):
    config = tiny_config("M", hidden=16)
    stored = dict.fromkeys(graph_weights(config, tower), "F32")
    return ir.to_proto(build(config, "float32", stored, {}))


def dims(values):
    return {one.name: [d.dim_param or d.dim_value for d in one.type.tensor_type.shape.dim]
            for one in values}  # fmt: skip


def test_a_denoiser_shows_the_logits_of_listed_rows(denoiser):
    listed = gpu_graph(denoiser)
    onnx.checker.check_model(listed)
    before, after = dims(denoiser.graph.output), dims(listed.graph.output)
    assert before.pop("logits")[0] == "batch"
    assert after.pop("logits")[0] == "shown"
    assert after == before
    given = dims(listed.graph.input)
    assert {name: given[name] for name in ROW_LISTS} == {n: [dim] for n, dim in ROW_LISTS.items()}


def test_lists_are_for_the_bodies_of_a_denoiser(denoiser):
    """A kernel of ours draws where a row asks for it, and reads logits that are an output."""

    def added(model):
        return dims(model.graph.input).keys() - dims(denoiser.graph.input).keys()

    assert added(gpu_graph(denoiser)) == ROW_LISTS.keys()
    assert not added(gpu_graph(denoiser, has_kernels=True))
    context = exported(build_context_graph, "context")
    assert dims(gpu_graph(context).graph.input) == dims(context.graph.input)
    assert dims(gpu_graph(context).graph.output) == dims(context.graph.output)


@pytest.mark.parametrize("op", ["ArgMax", "Cast", "ReduceMax"])
def test_a_step_of_another_form_is_refused(graph, op):
    other = onnx.ModelProto()
    other.CopyFrom(graph)
    (body,) = other.functions

    def rename(nodes):
        for node in nodes:
            if node.op_type == op:
                node.op_type = "TopK"
            for attribute in node.attribute:
                rename(attribute.g.node)

    rename(body.node)
    with pytest.raises(BuildError, match=r"has another form than this version writes: .* export"):
        list_rows(other)
