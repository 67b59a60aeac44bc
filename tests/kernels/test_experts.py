"""`SparseExperts`: the kernels, interpreted, against the float64 reference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import tests.support.kernel_reference as reference
from tests.support import kernel_launches
from tests.support.kernel_inputs import draw_experts
from tests.support.kernel_launches import launch
from twotower_engines.kernels import expert_products, expert_routing
from twotower_engines.kernels.jit import Launch

SMALL = Launch({"BLOCK_F": 16, "BLOCK_T": 4, "BLOCK_K": 16}, num_warps=4, num_stages=2)
"""Tiles that small sizes have several of."""


def check(args: tuple[torch.Tensor, ...], tiles: Launch | None = SMALL) -> torch.Tensor:
    """The kernels' result is the reference's, as precisely as its type allows."""
    got = kernel_launches.sparse_experts(*args, config=tiles)
    dtype = "bf16" if got.dtype == torch.bfloat16 else "fp32"
    x, indices, weights, up, down = (arg.double().numpy() for arg in args)
    want = reference.sparse_experts(x, indices.astype(int), weights, up, down, dtype)
    error = np.linalg.norm(got.double().numpy() - want) / max(np.linalg.norm(want), 1e-30)
    assert error < (4e-3 if dtype == "bf16" else 1e-6)
    return got


@pytest.mark.parametrize(
    ("n", "K", "E", "hidden", "inner", "dtype"),
    [
        (1, 2, 8, 32, 16, torch.float32),
        (16, 2, 8, 32, 48, torch.float32),
        (16, 2, 8, 32, 48, torch.bfloat16),
        (7, 3, 5, 40, 24, torch.float32),  # nothing divides the tiles
        (9, 1, 3, 17, 33, torch.bfloat16),
        (40, 2, 4, 32, 32, torch.float32),  # an expert has several tiles
        (5, 6, 6, 32, 32, torch.float32),  # every expert for every token
    ],
)
def test_sizes(n: int, K: int, E: int, hidden: int, inner: int, dtype: torch.dtype) -> None:
    check(draw_experts(np.random.default_rng(n + E), n, K, E, hidden, inner, dtype))


def test_the_activation_is_rounded_before_the_square() -> None:
    """As the ONNX function and NVIDIA's code do: 257 is 256 in bf16."""
    args = draw_experts(np.random.default_rng(11), 1, 1, 2, 32, 16, torch.bfloat16)
    x, _, weights, up, down = args
    x.fill_(1.0), weights.fill_(1.0), up.zero_(), down.zero_()
    up[:, 0, 0], up[:, 0, 1], down[:, :, 0] = 256.0, 1.0, 1.0
    got = kernel_launches.sparse_experts(*args, config=SMALL)
    assert (got == 256.0**2).all()


def test_bf16_agrees_with_the_function_to_its_last_roundings() -> None:
    """The function, in bf16, rounds each expert's product too; the kernels keep it in float32.

    The rest is equal, so results differ by half a unit of bf16 of each expert's product.
    """
    args = draw_experts(np.random.default_rng(12), 24, 3, 8, 64, 48, torch.bfloat16)
    x, indices, weights, up, down = (arg.double().numpy() for arg in args)
    want, slack = np.zeros_like(x), np.zeros_like(x)
    for n, k in np.ndindex(indices.shape):
        expert = int(indices[n, k])
        inner = reference.rounded(np.maximum(up[expert] @ x[n], 0.0), "bf16")
        product = reference.rounded(down[expert] @ reference.rounded(inner**2, "bf16"), "bf16")
        want[n] += weights[n, k] * product
        slack[n] += weights[n, k] * np.abs(product) * 2.0**-8
    got = kernel_launches.sparse_experts(*args, config=SMALL).double().numpy()
    slack += np.abs(want) * 2.0**-7 + 1e-6
    assert (np.abs(got - reference.rounded(want, "bf16")) <= slack).all()


@pytest.mark.parametrize("tokens", [1, 64, 4096])
def test_default_tiles(tokens: int) -> None:
    tiles = kernel_launches.matmul_launch(tokens, 8, 2, "fp32")
    check(draw_experts(np.random.default_rng(1), 20, 2, 8, 80, 72), tiles)


def test_one_expert_takes_all_tokens() -> None:
    args = draw_experts(np.random.default_rng(2), 30, 2, 8, 32, 32)
    args[1][:, 0], args[1][:, 1] = 5, 2
    check(args)


def test_pairs_without_an_expert_cost_nothing() -> None:
    args = draw_experts(np.random.default_rng(3), 12, 3, 8, 32, 32)
    args[1][::2, 1] = -1
    args[1][3] = -1
    args[4][6] = float("nan")  # an expert that nobody asked for is not read
    args[1][args[1] == 6] = -1
    got = check(args)
    assert not got[3].any()


def test_nothing_routed_at_all() -> None:
    args = draw_experts(np.random.default_rng(4), 6, 2, 4, 32, 32)
    args[1][:] = -1
    assert not check(args).any()


def test_an_expert_twice_counts_twice() -> None:
    args = draw_experts(np.random.default_rng(5), 6, 2, 4, 32, 32)
    args[1][:, 1] = args[1][:, 0]
    check(args)


def test_the_order_of_the_sum_is_that_of_k() -> None:
    """Terms of very different size: another order would give another float32 sum."""
    args = draw_experts(np.random.default_rng(6), 4, 3, 4, 32, 32)
    args[2][:, 0], args[2][:, 1], args[2][:, 2] = 1e8, 1.0, -1e8
    args[1][:] = torch.tensor([0, 1, 0])
    y = kernel_launches.sparse_experts(*args, config=SMALL)
    term = [
        kernel_launches.sparse_experts(
            args[0],
            args[1][:, k : k + 1].contiguous(),
            args[2][:, k : k + 1].contiguous(),
            *args[3:],
            config=SMALL,
        )
        for k in range(3)
    ]
    torch.testing.assert_close(y, (term[0] + term[1]) + term[2], rtol=0, atol=0)
    assert (y != (term[0] + term[2]) + term[1]).any()


@pytest.mark.slow
def test_results_do_not_depend_on_tiles_of_tokens() -> None:
    """On whole numbers, whose sums are exact in every order.

    A matrix product's own order is the processor's: in the interpreter, that of whichever routine
    NumPy picks for a shape.
    """
    args = draw_experts(np.random.default_rng(7), 24, 2, 4, 32, 32)
    for number in (0, 3, 4):
        args[number].mul_(8).round_().clamp_(-4, 4)
    args[2].mul_(4).round_()
    assert args[0].abs().max() == 4
    first = kernel_launches.sparse_experts(*args, config=SMALL)
    assert 0 < first.abs().max() < 2**24
    for tokens in (1, 2, 8, 16):
        other = replace(SMALL, constants={**SMALL.constants, "BLOCK_T": tokens})
        np.testing.assert_array_equal(first, kernel_launches.sparse_experts(*args, config=other))


def route(indices: np.ndarray, E: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """The sorted pairs and both tables of tiles, as the kernel writes them."""
    n = indices.size
    pairs = torch.empty(n, dtype=torch.int32)
    bounds = [kernel_launches.tile_bound(n, E, size) for size in expert_routing.TILE_TOKENS]
    tables = [torch.full((bound, 4), -7, dtype=torch.int32) for bound in bounds]
    constants = dict(zip(("FEW", "MANY"), expert_routing.TILE_TOKENS, strict=True), E=E)
    given = (torch.from_numpy(indices), n, pairs, *tables)
    launch(expert_routing.route_tokens, (E,), given, constants, expert_routing.route_launch(E))
    return pairs.numpy(), [table.numpy() for table in tables]


@pytest.mark.parametrize(("n", "K", "E"), [(5, 2, 4), (700, 3, 7), (3, 2, 9)])
def test_routing_sorts_pairs_and_lists_tiles(n: int, K: int, E: int) -> None:
    indices = np.random.default_rng(8).integers(-1, E + 1, (n, K)).astype(np.int32)
    indices[: n // 2] = 1  # an expert of many tiles
    pairs, tables = route(indices, E)
    flat = indices.ravel()
    routed = [pair for expert in range(E) for pair in np.flatnonzero(flat == expert)]
    np.testing.assert_array_equal(pairs[: len(routed)], routed)
    counts = np.bincount(flat[(flat >= 0) & (flat < E)], minlength=E)
    starts = np.concatenate([[0], np.cumsum(counts)])
    for table, size in zip(tables, expert_routing.TILE_TOKENS, strict=True):
        want = [
            (expert, start, max(size - (starts[expert + 1] - start), 0))
            for expert in range(E)
            for start in range(starts[expert], starts[expert + 1], size)
        ]
        np.testing.assert_array_equal(table[: len(want), :3], want)
        assert (table[len(want) :, 2] == size).all(), "no work"


def test_the_grid_has_a_program_for_every_tile() -> None:
    generator = np.random.default_rng(9)
    for _ in range(300):
        n, E, block = (int(generator.integers(1, bound)) for bound in (200, 40, 20))
        counts = np.bincount(
            generator.integers(0, E, n) // generator.integers(1, E + 1), minlength=E
        )
        assert (-(-counts // block)).sum() <= kernel_launches.tile_bound(n, E, block)


@pytest.mark.usefixtures("overflow_fails")
def test_nonsense_tiles_write_nothing_outside() -> None:
    """TensorRT times a plugin's node alone, on tiles and pairs that no routing produced."""
    generator = np.random.default_rng(10)
    x, _, _, up, _ = draw_experts(generator, 6, 2, 4, 32, 32)
    sizes = {"HIDDEN": 32, "INNER": 32, "E": 4, "K": 2, "MANY": False, "UPCAST": True}
    sizes |= expert_products.bank_constants("up", "plain", 32, 0)

    def run(tiles: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
        buffer = torch.full((12 + 8, 32), 7.0)
        args = (x, up, pairs, tiles, tiles, 12, buffer[4:16])
        launch(expert_products.experts_up, (2, 6), args, sizes, SMALL)
        assert (buffer[:4] == 7.0).all()
        assert (buffer[16:] == 7.0).all()
        return buffer[4:16]

    for _ in range(20):
        tiles = torch.from_numpy(generator.integers(-(2**31), 2**31, (6, 4)).astype(np.int32))
        tiles[0] = torch.from_numpy(generator.integers(-3, 14, 4).astype(np.int32))
        pairs = torch.from_numpy(generator.integers(-(2**31), 2**31, 12).astype(np.int32))
        run(tiles, pairs)


def test_a_table_of_zeros_is_work() -> None:
    """If TensorRT times a node on zeros, a tactic with more or larger tiles must take longer."""
    x, _, _, up, _ = draw_experts(np.random.default_rng(13), 6, 2, 4, 32, 32)
    inner = torch.zeros(12, 32)
    sizes = {"HIDDEN": 32, "INNER": 32, "E": 4, "K": 2, "MANY": False, "UPCAST": True}
    sizes |= expert_products.bank_constants("up", "plain", 32, 0)
    tiles, pairs = torch.zeros(6, 4, dtype=torch.int32), torch.zeros(12, dtype=torch.int32)
    launch(
        expert_products.experts_up, (2, 6), (x, up, pairs, tiles, tiles, 12, inner), sizes, SMALL
    )
    want = torch.relu(up[0] @ x[0]).square()
    torch.testing.assert_close(inner[0], want, rtol=1e-5, atol=1e-5)
