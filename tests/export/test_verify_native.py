"""Graphs in the checkpoint's dtype are the float32 ones with casts, and compute as torch does.

What only the structure can show is changed where no output tells; what only running can show is
changed so that the structure stays the same.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from tests.support.sabotage import change_graph, change_tensors, run
from twotower_export.bundle import write_bundle
from twotower_export.checkpoint import open_checkpoint
from twotower_export.tiny.checkpoints import write_random_checkpoint
from twotower_export.verification.emulation import emulated
from twotower_export.verification.graphs import GraphPart

pytestmark = pytest.mark.usefixtures("quick_exports")


def body_of(model, name):
    (found,) = [one for one in model.functions if one.name == name]
    return found


def epsilon(model):
    (node,) = [
        node
        for node in body_of(model, "RMSNorm").node
        if node.op_type == "Constant"
        and numpy_helper.to_array(node.attribute[0].t).dtype == np.float32
    ]
    node.attribute[0].t.CopyFrom(numpy_helper.from_array(np.float32(3.0)))


def attribute(model):
    (node,) = [one for one in body_of(model, "BlockAttention").node if one.op_type == "Attention"]
    node.attribute[0].f *= 1.5


def swapped_inputs(model):
    for function in model.functions:
        for node in function.node:
            if node.op_type == "Sub" and "within_block" in node.name:
                node.input[0], node.input[1] = node.input[1], node.input[0]
                return
    raise AssertionError


def shift_for_gate(model):
    (node,) = [
        one for one in body_of(model, "DenoiserAttentionLayer").node if one.op_type == "Modulation"
    ]
    node.output[1], node.output[2] = node.output[2], node.output[1]


def operator(model):
    (node, *_) = [one for one in body_of(model, "SparseExperts").node if one.op_type == "Relu"]
    node.op_type = "Abs"


def cast_to_double(model):
    (node, *_) = [one for one in body_of(model, "RMSNorm").node if one.op_type == "Cast"]
    node.attribute[0].i = TensorProto.DOUBLE


def cast_of_indices(model):
    """The router's indices are cast to float32 and not to int32."""
    (node, *_) = [
        one
        for one in body_of(model, "Router").node
        if one.op_type == "Cast" and one.attribute[0].i == TensorProto.INT32
    ]
    node.attribute[0].i = TensorProto.INT64


def unrounded_time(model):
    """t is not rounded to bfloat16 before it is multiplied by 1000."""
    function = body_of(model, "TimeEmbedding")
    narrow, wide = [one for one in function.node if one.op_type == "Cast"][-5:-3]
    assert (narrow.attribute[0].i, wide.attribute[0].i) == (TensorProto.BFLOAT16, TensorProto.FLOAT)
    for node in function.node:
        for place, name in enumerate(node.input):
            if name == wide.output[0]:
                node.input[place] = narrow.input[0]
    function.node.remove(narrow)
    function.node.remove(wide)


def another_output(model):
    function = body_of(model, "MambaMixer")
    function.output[1], function.output[2] = function.output[2], function.output[1]


def another_node(model):
    function = body_of(model, "RMSNorm")
    function.node.append(helper.make_node("Neg", [function.output[0]], ["unused"], name="more"))


def another_shape(model):
    (ids, *_) = [one for one in model.graph.input if one.name == "ids"]
    ids.type.tensor_type.shape.dim[1].dim_param = "batch"


CASES = {
    epsilon: "RMSNorm: RMSNorm/add: another constant as input 1",
    attribute: "BlockAttention: BlockAttention/attention.attention: other attributes",
    swapped_inputs: "MambaBlockStep/scan.within_block.sub: another value as input 0",
    shift_for_gate: "DenoiserAttentionLayer: DenoiserAttentionLayer/modulated.add: another value",
    operator: "SparseExperts: SparseExperts/up.relu: Abs instead of Relu",
    cast_to_double: "RMSNorm: RMSNorm/cast: ",
    cast_of_indices: "Router/padding.cast",
    unrounded_time: "TimeEmbedding: ",
    another_output: "MambaMixer has another output",
    another_node: "RMSNorm: more: no such node",
    another_shape: "its input ids has another shape or type",
}


@pytest.mark.parametrize("change", CASES)
def test_a_native_graph_that_is_another_fails(copied, change):
    change_graph(copied, "denoiser", change, "native")
    report = run(copied, parts=["embeddings"])
    assert not report.outcome.passed
    problems = [p for p in report.outcome.problems if not p.startswith("denoiser.embeddings")]
    assert problems
    assert all(problem.startswith("denoiser graph in bfloat16: ") for problem in problems)
    assert any(CASES[change] in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (epsilon, [0, 1, 2, 3, "head"]),
        (attribute, [2]),
        (shift_for_gate, [2]),
        (operator, [1]),
        (swapped_inputs, [0, 3]),
    ],
)
def test_running_finds_it_as_well(copied, change, parts):
    change_graph(copied, "denoiser", change, "native")
    report = run(copied)
    failed = {(t.part, t.precision) for t in report.outcome.tensors if not t.passed}
    assert failed == {
        (f"denoiser.layers.{part}" if part != "head" else "denoiser.head", "bfloat16")
        for part in parts
    }


def test_types_that_do_not_fit_are_a_problem_and_no_crash(copied):
    change_graph(copied, "denoiser", cast_to_double, "native")
    report = run(copied, parts=[1])
    assert not report.outcome.passed
    (problem,) = [p for p in report.outcome.problems if p.startswith("denoiser.layers.1")]
    assert "in bfloat16 cannot be run: " in problem
    assert "its types do not fit" in problem


def large_scores(name, tensor):
    return tensor * 8 if name.endswith("q_proj.weight") else tensor


def test_attention_keeps_large_scores_in_float32(tmp_path):
    """Rounded to bfloat16, as the inputs are, they would put the result off by percents.

    They never leave the operator, so that no graph of the same structure could round them.
    """
    checkpoint = tmp_path / "checkpoint"
    write_random_checkpoint(checkpoint, "*", 32, seed=3)
    change_tensors(checkpoint, large_scores)
    write_bundle(open_checkpoint(checkpoint), tmp_path / "bundle")
    assert run(tmp_path, parts=[0]).outcome.passed


def test_a_float32_model_with_some_tensors_in_bfloat16(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    write_random_checkpoint(checkpoint, "ME*", 32, seed=3, dtype="float32")
    narrow = ("in_proj.weight", "A_log", "embeddings.weight", "gate.weight")
    change_tensors(
        checkpoint,
        lambda name, tensor: tensor.to(torch.bfloat16) if name.endswith(narrow) else tensor,
    )
    write_bundle(open_checkpoint(checkpoint), tmp_path / "bundle")
    report = run(tmp_path)
    assert report.outcome.passed, report.outcome.problems
    parts = {tensor.part for tensor in report.outcome.tensors}
    assert "denoiser.layers.1" in parts  # the native graphs, in float32 as well
    assert {tensor.precision for tensor in report.outcome.tensors} == {"float32"}


def test_every_value_is_rounded_as_torch_rounds_it():
    text = """
        <ir_version: 10, opset_import: ["" : 20]>
        agraph (bfloat16[n, 24] x, bfloat16[24, 8] w, float[8] bias) => (bfloat16[n, 8] y) {
            product = MatMul(x, w)
            squared = Mul(product, product)
            wide = Cast<to = 1>(squared)
            sum = Add(wide, bias)
            narrow = Cast<to = 16>(sum)
            y = Sub(narrow, product)
        }
    """
    part = GraphPart(onnx.parser.parse_model(text), {"y": "result"})
    made = emulated(part, ["w"])
    assert not made.optimised
    ((name, reported),) = made.outputs.items()
    assert reported == "result"
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(made.model.SerializeToString(), options)
    generator = torch.Generator().manual_seed(0)
    x, bias = torch.randn(5, 24, generator=generator), torch.randn(8, generator=generator)
    w = torch.randn(24, 8, generator=generator).bfloat16()
    stored = w.view(torch.uint16).numpy()
    feed = {
        "x": ort.OrtValue.ortvalue_from_numpy(x.numpy()),
        "w": ort.OrtValue.ortvalue_from_numpy_with_onnx_type(stored, TensorProto.BFLOAT16),
        "bias": ort.OrtValue.ortvalue_from_numpy(bias.numpy()),
    }
    got = session.run_with_ort_values([name], feed)[0].numpy()
    product = x.bfloat16() @ w
    expected = ((product * product).float() + bias).bfloat16() - product
    assert (got == expected.float().numpy()).all()
