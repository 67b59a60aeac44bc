"""`MambaBlockStep`: the kernels, interpreted, against the float64 recurrence."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import tests.support.kernel_reference as reference
from tests.support import kernel_launches
from tests.support.kernel_inputs import draw_mamba
from twotower_engines.kernels import mamba_chunk, mamba_spans

G = 2
EPSILON = 1e-5


def check(
    args: list[torch.Tensor], groups: int = G, *, states: bool = True, tactic: int = 1
) -> tuple[torch.Tensor, ...]:
    """y and both new states are the reference's, as precisely as T allows."""
    got = kernel_launches.mamba_block_step(*args, groups, EPSILON, states=states, tactic=tactic)
    dtype = "bf16" if args[0].dtype == torch.bfloat16 else "fp32"
    exact = [arg.double().numpy() for arg in args]
    want = reference.mamba_block_step(*exact, groups, EPSILON, dtype)
    for name, mine, theirs in zip(("y", "conv_state", "ssm_state"), got, want, strict=True):
        if mine is None:
            continue
        scale = max(np.linalg.norm(theirs), 1e-30)
        error = np.linalg.norm(mine.double().numpy() - theirs) / scale
        # One flipped rounding of x, B or C to bf16 is 2^-8 of that number.
        bound = {"y": 4e-3, "conv_state": 0.0, "ssm_state": 1e-3}[name] if dtype == "bf16" else 2e-6
        assert error <= bound, name
    return got


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("L", "lengths"),
    [
        (16, [16, 9, 0, 3]),
        (1, [1, 0]),
        (23, [23, 16]),
        (40, [40, 33]),
    ],
)
def test_lengths(L: int, lengths: list[int], dtype: torch.dtype) -> None:
    check(draw_mamba(np.random.default_rng(L), L, lengths, dtype))


TACTICS = range(1, mamba_spans.TACTICS + 1)


@pytest.mark.parametrize("tactic", TACTICS)
def test_rows_of_several_spans(tactic: int) -> None:
    """Rows that end inside a span, with one, and before the first."""
    lengths = [140, 64, 0]
    assert mamba_spans.span_sizes(len(lengths), 140) == (3, 64)
    generator = np.random.default_rng(0)
    args = draw_mamba(generator, 140, lengths, torch.bfloat16, sizes=(1, 8, 16, 1), rate=0.01)
    check(args, 1, tactic=tactic)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("L", "lengths", "rate", "dtype", "tactic"),
    [
        (1024, [1024], 1e-3, torch.float32, 1),
        (1024, [1024], 1e-3, torch.bfloat16, 1),
        (256, [256, 200], 1e-3, torch.float32, 1),
        *((1000, [937, 1], 1.0, torch.bfloat16, tactic) for tactic in TACTICS),
    ],
)
def test_chunks_of_a_prompt(
    L: int, lengths: list[int], rate: float, dtype: torch.dtype, tactic: int
) -> None:
    """Decays that reach from the first span to the last, and those that end in their own."""
    generator = np.random.default_rng(L)
    sizes = (1, 20, 24, 1)
    args = draw_mamba(generator, L, lengths, dtype, sizes=sizes, seed_scale=30.0, rate=rate)
    check(args, 1, tactic=tactic)


def test_spans_cover_the_tokens_and_have_few_states() -> None:
    for rows, tokens in itertools.product((1, 2, 3, 4, 7, 8, 16, 64), range(1, 2100)):
        count, span = mamba_spans.span_sizes(rows, tokens)
        assert (count - 1) * span < tokens <= count * span
        assert span % mamba_spans.TILE == 0
        assert 1 <= mamba_spans.span_slots(rows, count) <= mamba_spans.MOST_SPANS + 1
    assert [mamba_spans.span_sizes(1, tokens) for tokens in (16, 64, 256, 1024)] == [
        *((1, 64), (1, 64), (4, 64), (8, 128))
    ]


@pytest.mark.parametrize("sizes", [(2, 4, 8, 1), (4, 24, 20, 2), (2, 64, 128, 1)])
def test_sizes(sizes: tuple[int, int, int, int]) -> None:
    check(draw_mamba(np.random.default_rng(1), 18, [18, 5], sizes=sizes), sizes[3])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rate", [1e-4, 100.0])
def test_large_seeds_and_extreme_decays(rate: float, dtype: torch.dtype) -> None:
    """Long contexts bring states of 10^3 and more; a head may forget all or nothing in a token."""
    args = draw_mamba(np.random.default_rng(2), 40, [40, 31], dtype, seed_scale=1e3, rate=rate)
    got = check(args)
    assert all(torch.isfinite(x.float()).all() for x in got)


def test_steps_far_from_zero() -> None:
    """softplus must neither overflow nor vanish."""
    args = draw_mamba(np.random.default_rng(3), 16, [16], sizes=(4, 8, 16, 2))
    args[6] = torch.tensor([-30.0, -12.0, 60.0, 300.0])
    got = check(args)
    quiet, before = got[2][0, 0], args[2][0, 0]
    assert (quiet - before).abs().max() < 1e-6
    assert (quiet != before).any() or (got[2][0, 1] != args[2][0, 1]).any()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("L", "lengths"), [(16, [16, 3]), (23, [23, 0]), (64, [64, 41])])
@pytest.mark.parametrize("rate", [1e-4, 1.0])
def test_without_states_any_length_is_right(
    rate: float, L: int, lengths: list[int], dtype: torch.dtype
) -> None:
    """A block longer than a chunk sees its earlier chunks, though no state is carried on."""
    args = draw_mamba(np.random.default_rng(8), L, lengths, dtype, seed_scale=30.0, rate=rate)
    check(args, states=False)


@pytest.mark.parametrize("L", [16, 23])
def test_states_only_where_wanted(L: int) -> None:
    args = draw_mamba(np.random.default_rng(4), L, [L, 7], torch.bfloat16)
    before = [arg.clone() for arg in args]
    y, conv_state, ssm_state = kernel_launches.mamba_block_step(*args, G, EPSILON, states=False)
    assert conv_state is None
    assert ssm_state is None
    if L <= mamba_chunk.CHUNK:
        torch.testing.assert_close(
            y, kernel_launches.mamba_block_step(*args, G, EPSILON)[0], rtol=0, atol=0
        )
    for arg, kept in zip(args, before, strict=True):
        torch.testing.assert_close(arg, kept, rtol=0, atol=0)


def test_padding_is_not_read_and_gives_zeros() -> None:
    args = draw_mamba(np.random.default_rng(5), 16, [10, 0])
    args[0][0, 10:] = float("nan")
    args[0][1] = float("nan")
    y, conv_state, ssm_state = check(args)
    assert not y[0, 10:].any()
    assert not y[1].any()
    torch.testing.assert_close(conv_state[1], args[1][1], rtol=0, atol=0)
    torch.testing.assert_close(ssm_state[1], args[2][1], rtol=0, atol=0)


def test_a_block_in_two_calls_is_the_block() -> None:
    args = draw_mamba(np.random.default_rng(6), 24, [24])
    whole = kernel_launches.mamba_block_step(*args, G, EPSILON)
    halves, states = [], args[1:3]
    for start in (0, 12):
        part = [args[0][:, start : start + 12].contiguous(), *states]
        lengths = torch.tensor([12], dtype=torch.int32)
        y, *states = kernel_launches.mamba_block_step(*part, lengths, *args[4:], G, EPSILON)
        halves.append(y)
    torch.testing.assert_close(torch.cat(halves, dim=1), whole[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(states[0], whole[1], rtol=0, atol=0)
    torch.testing.assert_close(states[1], whole[2], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("overflow_fails")
def test_nonsense_lengths_stay_inside() -> None:
    """TensorRT times a plugin's node alone, on lengths that no request has."""
    args = draw_mamba(np.random.default_rng(7), 16, [-(2**31), 2**31 - 1, -1])
    got = kernel_launches.mamba_block_step(*args, G, EPSILON)
    args[3] = torch.tensor([0, 16, 0], dtype=torch.int32)
    for mine, theirs in zip(got, kernel_launches.mamba_block_step(*args, G, EPSILON), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
