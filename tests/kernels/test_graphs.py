"""The kernels and the ONNX functions of the bundle's graphs: two writings of one op.

ONNX Runtime runs the functions, Triton's interpreter the kernels, on the same float32 inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from tests.support import kernel_launches
from tests.support.kernel_inputs import (
    MASK,
    block,
    draw_experts,
    draw_mamba,
    draw_router,
    layer_of_experts,
    mixed_rows,
    row_tensors,
)
from tests.support.kernel_reference import Row
from twotower_engines.kernels.nodes import OPS
from twotower_export.graph import build_refine_graph
from twotower_export.graph import experts as graph_of_experts
from twotower_export.graph.body import OPSET, Body
from twotower_export.graph.mamba import mamba_block_step
from twotower_export.tiny.checkpoints import tiny_config

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def run_model(model: ir.Model, tensors: Sequence[torch.Tensor]) -> list[np.ndarray]:
    """A graph's outputs by ONNX Runtime; its inputs in order."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    names = [value.name for value in session.get_inputs()]
    feed = dict(zip(names, (tensor.numpy() for tensor in tensors), strict=True))
    made: list[np.ndarray] = session.run(None, feed)
    return made


def one_op(function: ir.Function, tensors: Sequence[torch.Tensor]) -> ir.Model:
    """A model that is one call of a function on tensors of these shapes."""
    body = Body(ir.DataType.FLOAT)
    values = [
        ir.val(name, ir.DataType.from_numpy(tensor.numpy().dtype), tensor.shape)
        for name, tensor in zip(OPS[function.name].inputs, tensors, strict=True)
    ]
    outputs = body.call(function, values, "op", OPS[function.name].outputs)
    graph = ir.Graph(
        values,
        list(outputs),
        nodes=body.op.tape.nodes,
        opset_imports={"": OPSET, "twotower": 1},
        name="one_op",
    )
    return ir.Model(graph, ir_version=10, functions=[function])


def compare_refine(logits: torch.Tensor, ids: np.ndarray, rows: list[Row]) -> None:
    """Equal decisions, bit for bit, and confidences to float32's precision."""
    given = (logits, torch.from_numpy(ids.astype(np.int32)), *row_tensors(rows))
    config = tiny_config("M", vocab_size=logits.shape[2], mask_token_id=MASK)
    want = run_model(build_refine_graph(config, "float32", {}, {}), given)
    got = [x.numpy() for x in kernel_launches.refine_block(*given, MASK)]
    for index in (0, 2, 3):
        np.testing.assert_array_equal(got[index], want[index])
    np.testing.assert_allclose(got[1], want[1], rtol=5e-6)


def test_refine_decides_alike_where_float32_overflows() -> None:
    logits = torch.full((2, 2, 272), -20.0) - torch.arange(272) * 0.01
    rows = [Row(2, temperature=1e-38, steps_left=1), Row(2, threshold=1.0, steps_left=2**31 - 1)]
    compare_refine(logits, np.full((2, 2), MASK), rows)


@pytest.mark.parametrize(
    ("B", "S", "V", "seed"), [(10, 6, 261, 1), (5, 16, 300, 2), (5, 2, 5001, 3)]
)
def test_refine_decides_alike(B: int, S: int, V: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    logits = torch.from_numpy(generator.normal(0, 3, (B, S, V))).float()
    compare_refine(logits, block(generator, B, S, V, 0.7), mixed_rows(generator, B, S))


@pytest.mark.parametrize("policy", [0, 1, 2, 3, 4, 7, -1])
def test_refine_breaks_ties_alike(policy: int) -> None:
    """bf16 logits, as the head gives them, and equal positions: ties of both kinds, everywhere.

    The vocabulary is a multiple of 16: ONNX Runtime's sums depend on how a position's logits are
    aligned in memory, so that at 261 equal positions get entropies that differ in the last bit.
    """
    generator = np.random.default_rng(policy + 1)
    row = torch.from_numpy(generator.normal(0, 2, 272)).bfloat16().float().round()
    logits = row.expand(2, 8, -1).clone()
    logits[1, ::2] += 1.0
    ids = block(generator, 2, 8, 272, 0.8)
    compare_refine(logits, ids, [Row(8, 1.1, steps, policy=policy) for steps in (3, 8)])


def test_refine_fails_alike() -> None:
    logits = torch.from_numpy(np.random.default_rng(4).normal(0, 3, (6, 4, 261))).float()
    logits[0, 1, 17] = float("nan")
    logits[1, 1, 17] = float("inf")
    logits[2, 1] = float("-inf")
    logits[3, 1, ::2] = float("-inf")
    logits[4, 1, MASK] = float("nan")
    logits[5] *= 1e37
    for policy in (0, 3):
        rows = [Row(4, threshold=0.4, steps_left=2, policy=policy) for _ in range(6)]
        compare_refine(logits, np.full((6, 4), MASK), rows)


@pytest.mark.parametrize("is_gated", [True, False])
@pytest.mark.parametrize("is_flat", [True, False])
def test_experts_agree(is_flat: bool, is_gated: bool) -> None:
    n, K, E, hidden, inner = 20, 2, 5, 40, 24
    generator = np.random.default_rng(5)
    args = draw_experts(generator, n, K, E, hidden, inner)
    args[1][2], args[1][7, 1] = -1, -1
    config = tiny_config(
        "E", hidden=hidden, num_experts=E, num_experts_per_tok=K, moe_intermediate_size=inner
    )
    body = graph_of_experts.sparse_experts(
        config, ir.DataType.FLOAT, is_flat=is_flat, is_gated=is_gated
    )
    given = layer_of_experts(args, 2, generator)
    want = run_model(one_op(body, given), given)
    rest = dict(zip(("shared", "hidden", "gate"), given[3:6], strict=True))
    got = kernel_launches.sparse_experts(
        *args, **rest | ({} if is_gated else {"gate": None})
    ).numpy()
    np.testing.assert_allclose(got, want[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("lengths", "L", "E", "hidden", "k", "normalized"), [
    ([16, 5, 0], 16, 8, 40, 2, True),
    ([1], 1, 5, 17, 5, False),
    ([21, 13], 21, 37, 70, 6, True),
])  # fmt: skip
def test_routers_agree(
    lengths: list[int], L: int, E: int, hidden: int, k: int, normalized: bool
) -> None:
    given = draw_router(np.random.default_rng(L), lengths, L, E, hidden)
    given[1][3] = given[1][0]
    given[2][3] = given[2][0]  # a tie of every token
    sizes = {"hidden": hidden, "num_experts": E, "num_experts_per_tok": k}
    config = tiny_config("E", **sizes, norm_topk_prob=normalized, routed_scaling_factor=2.5)
    want = run_model(one_op(graph_of_experts.router(config, ir.DataType.FLOAT), given), given)
    got = kernel_launches.router(*given, k, normalized, 2.5)
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_allclose(got[1], want[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("lengths", [[16, 5], [23, 0]])
def test_mamba_agrees(lengths: list[int]) -> None:
    L, heads, dim, state, groups = max(lengths), 4, 8, 16, 2
    args = draw_mamba(np.random.default_rng(6), L, lengths, sizes=(heads, dim, state, groups))
    config = tiny_config(
        "M",
        mamba_num_heads=heads,
        mamba_head_dim=dim,
        n_groups=groups,
        ssm_state_size=state,
    )
    want = run_model(one_op(mamba_block_step(config, ir.DataType.FLOAT), args), args)
    got = kernel_launches.mamba_block_step(*args, groups, config.norm_eps)
    for b, length in enumerate(lengths):  # past a row's length the function has what it likes
        np.testing.assert_allclose(got[0][b, :length], want[0][b, :length], rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(got[1], want[1])
    np.testing.assert_allclose(got[2], want[2], rtol=2e-5, atol=2e-5)
