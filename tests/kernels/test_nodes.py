"""The plugin nodes' shapes, grids and arguments: chains against what they should compute.

The interpreter stands in for TensorRT: see `kernel_launches`. The chains of `RefineBlock` and
`MambaBlockStep` are tested as ops, in `test_refine` and `test_mamba`.
"""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch

from tests.support import kernel_launches
from tests.support.compiled import config_of
from tests.support.kernel_inputs import (
    draw_experts,
    draw_router,
    layer_of_experts,
)
from tests.support.kernel_launches import run_chain
from tests.support.quantized_banks import as_given, draw_bank
from tests.support.released_nodes import dtype_of, released_call, tensor_shapes
from twotower_engines.errors import BuildError
from twotower_engines.kernels import expert_products, linear, nodes
from twotower_engines.kernels.compile import all_specs
from twotower_engines.kernels.node import Call, Launching
from twotower_engines.kernels.spec import Sizes
from twotower_engines.planning.compiled import compiled_tower

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy


@pytest.mark.parametrize("tactic", range(1, expert_products.TACTICS + 1))
@pytest.mark.parametrize("tokens", [3, 20])
def test_experts_chain(tokens: int, tactic: int) -> None:
    args = draw_experts(np.random.default_rng(tokens), tokens, 2, 5, 40, 24)
    args[1][1] = -1
    tiles = expert_products.matmul_tactics("fp32")[tactic - 1]
    given = layer_of_experts(args, 1, np.random.default_rng(tokens))
    rest = dict(zip(("shared", "hidden", "gate"), given[3:6], strict=True))
    for gated in (1, 0):
        made = run_chain("SparseExperts", given, {"num_experts": 5, "gated": gated}, tactic)
        want = kernel_launches.sparse_experts(*args, config=tiles, **rest)
        torch.testing.assert_close(made["y"], want, rtol=0, atol=0)
        rest["gate"], given[5] = None, given[4]  # which stands in the gate's place


@pytest.mark.parametrize("form", ["fp8", "int4", "nvfp4"])
def test_experts_chain_of_codes(form: str) -> None:
    generator = np.random.default_rng(5)
    x, indices, weights, _, _ = draw_experts(generator, 9, 2, 4, 128, 64, torch.bfloat16)
    banks = []
    for shape in ((4, 64, 128), (4, 128, 64)):
        bank, _ = draw_bank(generator, form, shape, 16 if form == "nvfp4" else 64)
        banks.append(bank)
    tensors = [tensor for bank in banks for tensor in as_given(bank)]
    given = layer_of_experts([x, indices, weights, *tensors], 3)
    made = run_chain(f"SparseExperts{form.upper()}", given, {"num_experts": 4, "gated": 1})
    want = kernel_launches.sparse_experts(x, indices, weights, *banks)
    torch.testing.assert_close(made["y"], want, rtol=0, atol=0)


@pytest.mark.parametrize("tactic", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_router_chain(dtype: torch.dtype, tactic: int) -> None:
    """Weights are those of float64 scores; a token's experts are distinct."""
    given = draw_router(np.random.default_rng(3), [20, 7, 0], 20, 19, 130, dtype)
    attributes = {"per_token": 3, "normalized": 1, "scaling": 2.5}
    made = run_chain("Router", given, attributes, tactic)
    x, matrix, correction = (one.double() for one in given[:3])
    scores = torch.sigmoid(x.flatten(0, 1) @ matrix.T)
    chosen = (scores + correction).topk(3).indices
    weights = scores.gather(1, chosen)
    weights = 2.5 * weights / weights.sum(dim=1, keepdim=True)
    real = (torch.arange(20) < given[3][:, None]).flatten()
    assert (made["indices"][~real] == -1).all()
    torch.testing.assert_close(made["indices"][real].long(), chosen[real])
    torch.testing.assert_close(made["weights"].double(), weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tactic", range(1, linear.TACTICS + 1))
@pytest.mark.parametrize(("form", "group", "depth"), [("int4", 128, 384), ("nvfp4", 16, 272)])
def test_linear_chain(form: str, group: int, depth: int, tactic: int) -> None:
    """A dense product of codes, against its exact weights; no size is a multiple of a tile."""
    generator = np.random.default_rng(depth)
    bank, exact = draw_bank(generator, form, (1, 76, depth), group)
    codes, scale, *second = as_given(bank)
    x = torch.from_numpy(generator.normal(0, 1, (21, depth))).bfloat16()
    given = [x, codes[0], scale[0], *(one[0] for one in second)]
    made = run_chain(f"Linear{form.upper()}", given, {}, tactic)["y"].double().numpy()
    want = x.double().numpy() @ exact[0].T
    assert np.linalg.norm(made - want) < 3e-3 * np.linalg.norm(want)


NODES = nodes.NODES


def test_every_node_takes_what_was_made_before_it() -> None:
    chained = {id(node): node.name for op in nodes.OPS.values() for node in op.chain}
    assert len(NODES) == len(chained), "two nodes of one name"
    for name, op in nodes.OPS.items():
        known = set(op.inputs)
        for node in op.chain:
            assert set(node.takes) <= known
            known |= set(node.makes)
        # a denoiser's chain leaves the new states out
        wanted = op.outputs[:1] if f"{name}{nodes.STATES}" in nodes.OPS else op.outputs
        assert set(wanted) <= known


def test_an_unbounded_dimension_is_refused() -> None:
    call = Call({}, {"x": (-1, 4)}, {"x": "bf16"}, {})
    with pytest.raises(BuildError, match=re.escape("input x has no bound along axis 0")):
        call.size("x", 0)


def released(node: str, rows: int, block: int, tactic: int = 1) -> Launching:
    """A node at the released sizes, in a profile that allows blocks of 64."""
    return NODES[node].launching(released_call(NODES[node], rows, block, tactic))


@pytest.mark.parametrize("rows", [1, 16])
def test_an_engine_runs_what_is_compiled_and_timed(rows: int) -> None:
    """The denoiser's nodes, whose profile allows 64 tokens and is tuned for 16.

    They are the kernels of `twotower kernels`, which `test_compile.py` assembles, and take the
    tiles of the ops' own launchers, which `benchmarks/kernels.py` times.
    """
    launchings = []
    for form, suffix in (("plain", ""), ("fp8", "FP8"), ("int4", "INT4"), ("nvfp4", "NVFP4")):
        listed = {spec.name: spec for spec in all_specs(Sizes(experts_format=form))}
        mamba_ops = ("MambaBlockStep", f"MambaBlockStep{nodes.STATES}")
        for op in ("Router", f"SparseExperts{suffix}", *mamba_ops):
            for node in nodes.OPS[op].chain:
                for tactic in range(1, node.tactics + 1):
                    launchings.append(released(node.name, rows, 16, tactic))
                    assert launchings[-1].spec == listed[launchings[-1].spec.name]
    scan = next(one for one in launchings if one.spec.name == "mamba_scan")
    assert scan.grid == (64, rows, 1)


def test_only_the_first_dimension_of_a_grid_grows_with_tokens() -> None:
    """A grid's other dimensions end at 65535: 256 rows of 256 tokens are 65536."""
    grid = released("ExpertsSum", 256, 256).grid
    assert grid[0] == 65536
    assert max(grid[1:]) <= 65535


@pytest.mark.parametrize(
    ("tower", "rows", "tokens"),
    [*(("context", rows, tokens) for rows, tokens in ((1, 1), (1, 1024), (4, 256), (16, 1024))),
     ("denoiser", 1, 16), ("denoiser", 16, 64)],
)  # fmt: skip
def test_the_plan_of_memory_has_room_for_what_nodes_hand_on(
    tower: str, rows: int, tokens: int
) -> None:
    """TensorRT gives a node no workspace: all that a chain needs are its tensors between nodes."""
    planned = compiled_tower(config_of(), tower, "kernels", 2).scratch_bytes(rows, tokens, 8192)
    shapes = tensor_shapes(Sizes(), rows, tokens)
    width = {"bf16": 2, "fp32": 4, "i32": 4}
    is_denoiser = tower == "denoiser"
    mamba_op = "MambaBlockStep" if is_denoiser else f"MambaBlockStep{nodes.STATES}"
    for name in ("SparseExperts", mamba_op, *(["RefineBlock"] if is_denoiser else [])):
        op = nodes.OPS[name]
        between = {one for node in op.chain for one in node.makes} - set(op.outputs)
        held = sum(math.prod(shapes[one]) * width[dtype_of(one)] for one in between)
        assert 0 < held <= planned, name


def test_the_grid_of_a_prefill_call_fits() -> None:
    for node in ("ExpertsUp", "ExpertsDown"):
        assert max(released(node, 256, 256, expert_products.TACTICS).grid[1:]) <= 65535
