"""Random inputs of the three ops, shared by the tests of the kernels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tests.support.kernel_reference import Row

MASK = 3

BOUNDS = (0.3, 0.0, 1.5, 4.0, 0.0)
"""A threshold, factor or bound for each policy by number."""


def row_tensors(rows: list[Row]) -> tuple[torch.Tensor, ...]:
    """What the rows ask for, in the op's order."""
    i32, f32 = torch.int32, torch.float32
    return (
        torch.tensor([row.length for row in rows], dtype=i32),
        torch.tensor([row.threshold for row in rows], dtype=f32),
        torch.tensor([row.steps_left for row in rows], dtype=i32),
        torch.tensor([row.temperature for row in rows], dtype=f32),
        torch.tensor([row.policy for row in rows], dtype=i32),
        torch.tensor([row.seed for row in rows], dtype=i32),
    )


def block(generator: np.random.Generator, B: int, S: int, V: int, masked: float) -> np.ndarray:
    """Ids with about that share of masked positions; the rest are ordinary tokens."""
    ids = generator.integers(MASK + 1, V, (B, S))
    return np.where(generator.random((B, S)) < masked, MASK, ids)


def mixed_rows(generator: np.random.Generator, B: int, S: int) -> list[Row]:
    """Every policy in turn, with its own meaning of the threshold, ragged lengths and noise."""
    return [
        Row(
            length=int(generator.integers(0, S + 1)) if b % 4 == 3 else S,
            threshold=BOUNDS[b % len(BOUNDS)],
            steps_left=int(generator.integers(1, 9)),
            temperature=[0.0, 0.7, 1.0][b % 3],
            policy=b % len(BOUNDS),
            seed=int(generator.integers(0, 2**31)),
        )
        for b in range(B)
    ]


def draw_experts(
    generator: np.random.Generator,
    n: int,
    K: int,
    E: int,
    hidden: int,
    inner: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, ...]:
    """x, indices, weights, up, down; experts of a token differ."""
    x = torch.from_numpy(generator.normal(0, 1, (n, hidden))).to(dtype)
    indices = np.stack([generator.permutation(E)[:K] for _ in range(n)]).astype(np.int32)
    weights = torch.from_numpy(generator.random((n, K))).float()
    up = torch.from_numpy(generator.normal(0, hidden**-0.5, (E, inner, hidden))).to(dtype)
    down = torch.from_numpy(generator.normal(0, inner**-0.5, (E, hidden, inner))).to(dtype)
    return x, torch.from_numpy(indices), weights, up, down


def layer_of_experts(
    args: Sequence[torch.Tensor], rows: int, generator: np.random.Generator | None = None
) -> list[torch.Tensor]:
    """The op's inputs, from what `draw_experts` returns; without a generator they add nothing."""
    x, indices, weights, *banks = args
    hidden = x.shape[1]

    def drawn(shape: tuple[int, ...], neutral: float) -> torch.Tensor:
        if generator is None:
            return torch.full(shape, neutral, dtype=x.dtype, device=x.device)
        return torch.from_numpy(generator.normal(0, 1, shape)).to(x.dtype)

    rest = drawn(x.shape, 0.0), drawn(x.shape, 0.0), drawn((rows, 1, hidden), 1.0)
    return [x.view(rows, -1, hidden), indices, weights, *rest, *banks]


def draw_router(
    generator: np.random.Generator,
    lengths: list[int],
    L: int,
    E: int,
    hidden: int,
    dtype: torch.dtype = torch.float32,
) -> list[torch.Tensor]:
    """x, matrix, correction, lengths."""
    x = torch.from_numpy(generator.normal(0, 1, (len(lengths), L, hidden))).to(dtype)
    matrix = torch.from_numpy(generator.normal(0, hidden**-0.5, (E, hidden))).float()
    correction = torch.from_numpy(generator.normal(0, 0.3, E)).to(dtype)
    return [x, matrix, correction, torch.tensor(lengths, dtype=torch.int32)]


def draw_mamba(
    generator: np.random.Generator,
    L: int,
    lengths: list[int],
    dtype: torch.dtype = torch.float32,
    *,
    sizes: tuple[int, int, int, int] = (2, 8, 16, 2),
    seed_scale: float = 1.0,
    rate: float = 1.0,
) -> list[torch.Tensor]:
    """Everything up to norm_weight. rate: of decay; seed_scale: of the state before the block."""
    heads, dim, state, groups = sizes
    B, d_inner = len(lengths), heads * dim
    conv_dim = d_inner + 2 * groups * state

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.from_numpy(generator.normal(0, scale, shape)).to(dtype)

    return [
        normal(B, L, d_inner + conv_dim + heads),
        normal(B, 3, conv_dim),
        normal(B, heads, dim, state, scale=seed_scale).float(),
        torch.tensor(lengths, dtype=torch.int32),
        normal(conv_dim, 4, scale=0.5),
        normal(conv_dim, scale=0.5),
        normal(heads),
        torch.from_numpy(np.log(rate * generator.uniform(1, 16, heads))).to(dtype),
        normal(heads),
        normal(d_inner),
    ]
