"""The scan of `MambaBlockStep` where new states are wanted: spans of a row's tokens in parallel.

    projected, conv_state --> mamba_spans --> convolved [B, L, conv_dim] T
                              one program     span_states [slots, H, P, N] float32
                              per (head,      span_decays [slots, H] float32
                              row, span)
    all of these, states  --> mamba_scan_states --> scanned [B, L, d_inner] T, new states
                              one program per (half head, row, span)

This is the block form of the recurrence (Dao and Gu, "Transformers are SSMs", section 6). A span
begins with a state that is the sum of what each span before it adds, decayed since. `mamba_spans`
finds what each adds, with no regard to the others; `mamba_scan_states` takes the sum and goes
through its span in chunks. A row has one span where its call is short or has many rows: nothing is
summed then, and there are no slots but one that nobody uses.

Each channel is convolved once: eight heads share B and C, and as many programs would convolve them
anew, in most of their instructions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from twotower_engines.kernels.jit import Launch, kernel
from twotower_engines.kernels.mamba_chunk import (
    CHUNK,
    attended,
    decays,
    product,
    steps_of,
    within,
)
from twotower_engines.kernels.mamba_convolution import TAPS, convolved, keep_columns, row_of

TILE = 64
"""Least tokens of a span; a multiple of the chunk in every tactic."""

MOST_SPANS = 8
"""Most spans of a call of one row. More would have more states to sum than tokens to scan."""

TACTICS = 2
"""Choices of the scan's chunk."""


@kernel
def mamba_spans(
    projected: tl.tensor, conv_state: tl.tensor, lengths: tl.tensor, weight: tl.tensor,
    bias: tl.tensor, dt_bias: tl.tensor, A_log: tl.tensor, L: tl.tensor, span: tl.tensor,
    convolution: tl.tensor, span_states: tl.tensor, span_decays: tl.tensor,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, G: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:  # fmt: skip
    """Convolve a share of the channels over one span, and find what it adds to a head's state.

    Grid (H * cdiv(P, BLOCK_P), B, spans). Tokens past a row's length are not written, and a span
    after which none follows has no slot.
    """
    LEFT: tl.constexpr = "none" if projected.dtype.element_ty == tl.float32 else "left"
    D_INNER: tl.constexpr = H * P
    CONV_DIM: tl.constexpr = D_INNER + 2 * G * N
    STRIDE: tl.constexpr = D_INNER + CONV_DIM + H
    PARTS: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    SHARE: tl.constexpr = (2 * G * N + H * PARTS - 1) // (H * PARTS)
    head = tl.program_id(0) // PARTS
    first = (tl.program_id(0) % PARTS) * BLOCK_P
    row = tl.program_id(1).to(tl.int64)
    begin = tl.program_id(2) * span
    p, n, s = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_S)
    width = BLOCK_P if P % BLOCK_P == 0 else P - first  # a constant where nothing is masked
    x0, b0 = head * P + first, D_INNER + (head // (H // G)) * N
    s0 = D_INNER + tl.program_id(0) * SHARE
    share = tl.minimum(CONV_DIM - s0, SHARE)
    source = row_of(projected, conv_state, lengths, L, D_INNER, CONV_DIM, STRIDE)
    length = source[2]
    is_carried = begin + span < length
    steps = steps_of(source, dt_bias, A_log, head)
    state = tl.zeros((BLOCK_P, BLOCK_N), dtype=tl.float32)
    decayed = 0.0
    for start in range(begin, tl.minimum(begin + span, length), BLOCK_L):
        time = start + tl.arange(0, BLOCK_L)
        x = convolved(source, weight, bias, time, x0, width, BLOCK_P, True)
        shared = convolved(source, weight, bias, time, s0, share, BLOCK_S, True)
        there = (time < length)[:, None]
        out = convolution + (row * L + time)[:, None] * CONV_DIM
        tl.store(out + (x0 + p)[None, :], x, mask=there & (p < width)[None, :])
        tl.store(out + (s0 + s)[None, :], shared, mask=there & (s < share)[None, :])
        if is_carried:
            b = convolved(source, weight, bias, time, b0, N, BLOCK_N, True)
            step, total, end = decays(steps, time)
            moved = x.to(tl.float32) * (step * tl.exp(end - total))[:, None]
            state = product(tl.trans(moved), b, state * tl.exp(end), LEFT, UPCAST)
            decayed += end
    if is_carried:
        slot = row * (tl.num_programs(2) - 1) + tl.program_id(2)
        place = (slot * D_INNER + x0 + p)[:, None] * N + n[None, :]
        tl.store(span_states + place, state, mask=(p < width)[:, None] & (n < N)[None, :])
        tl.store(span_decays + slot * H + head, decayed, mask=first == 0)


@kernel
def mamba_scan_states(
    projected: tl.tensor, conv_state: tl.tensor, ssm_state: tl.tensor, lengths: tl.tensor,
    dt_bias: tl.tensor, A_log: tl.tensor, D: tl.tensor, convolution: tl.tensor,
    span_states: tl.tensor, span_decays: tl.tensor, L: tl.tensor, span: tl.tensor,
    scanned: tl.tensor, conv_state_new: tl.tensor, ssm_state_new: tl.tensor,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, G: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, UPCAST: tl.constexpr,
) -> None:  # fmt: skip
    """Scan a span of a row, for one head or part of it; grid (H * cdiv(P, BLOCK_P), B, spans).

    Tokens past a row's length get 0 and leave the new states alone. The new columns need memory of
    their own: a group's heads all read the old ones, and one of them writes.
    """
    LEFT: tl.constexpr = "none" if projected.dtype.element_ty == tl.float32 else "left"
    D_INNER: tl.constexpr = H * P
    CONV_DIM: tl.constexpr = D_INNER + 2 * G * N
    STRIDE: tl.constexpr = D_INNER + CONV_DIM + H
    PARTS: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    head = tl.program_id(0) // PARTS
    first = (tl.program_id(0) % PARTS) * BLOCK_P
    row = tl.program_id(1).to(tl.int64)
    begin = tl.program_id(2) * span
    group = head // (H // G)
    p, n, lane = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_L)
    width = BLOCK_P if P % BLOCK_P == 0 else P - first  # a constant where nothing is masked
    real_p, real_n = p < width, n < N
    x0, b0 = head * P + first, D_INNER + group * N
    c0 = b0 + G * N
    source = row_of(projected, conv_state, lengths, L, D_INNER, CONV_DIM, STRIDE)
    length = source[2]
    place = (x0 + p)[:, None] * N + n[None, :]
    real_state = real_p[:, None] & real_n[None, :]
    state = tl.load(ssm_state + row * D_INNER * N + place, mask=real_state, other=0.0)
    steps = steps_of(source, dt_bias, A_log, head)
    skip = tl.load(D + head).to(tl.float32)
    slot = row * (tl.num_programs(2) - 1)
    for before in range(0, tl.where(begin < length, tl.program_id(2), 0)):
        decay = tl.exp(tl.load(span_decays + (slot + before) * H + head))
        added = span_states + (slot + before) * D_INNER * N + place
        state = state * decay + tl.load(added, mask=real_state, other=0.0)
    for start in range(begin, tl.minimum(begin + span, L), BLOCK_L):
        time = start + lane
        y = tl.zeros((BLOCK_L, BLOCK_P), dtype=tl.float32)
        if start < length:
            token = convolution + (row * L + time)[:, None] * CONV_DIM
            there = (time < length)[:, None]
            real_n_there = there & real_n[None, :]
            c = tl.load(token + (c0 + n)[None, :], mask=real_n_there, other=0.0)
            b = tl.load(token + (b0 + n)[None, :], mask=real_n_there, other=0.0)
            x = tl.load(token + (x0 + p)[None, :], mask=there & real_p[None, :], other=0.0)
            x = x.to(tl.float32)
            step, total, end = decays(steps, time)
            y = attended(c, b, x, step, within(total, lane), state, total, UPCAST) + skip * x
            moved = x * (step * tl.exp(end - total))[:, None]
            state = product(tl.trans(moved), b, state * tl.exp(end), LEFT, UPCAST)
        out = scanned + (row * L + time)[:, None] * D_INNER + (x0 + p)[None, :]
        tl.store(out, y.to(scanned.dtype.element_ty), mask=(time < L)[:, None] & real_p[None, :])

    # The span with the row's last token, or the first, has the new states.
    last = tl.maximum(length - 1, 0)
    if (begin <= last) & (last < begin + span):
        tl.store(ssm_state_new + row * D_INNER * N + place, state, mask=real_state)
        kept = conv_state_new + row * (TAPS - 1) * CONV_DIM
        keep_columns(source, kept, x0 + p, real_p)
        # B and C belong to a group: its first head's first program writes them.
        leads = n < tl.where(head * P + first == group * (H // G) * P, N, 0)
        keep_columns(source, kept, b0 + n, leads)
        keep_columns(source, kept, c0 + n, leads)


def span_sizes(
    rows: Any,
    tokens: Any,
    cdiv: Callable[[Any, Any], Any] = triton.cdiv,
    minimum: Callable[[Any, Any], Any] = min,
) -> tuple[Any, Any]:
    """Return how many spans a row's tokens are cut into, and the tokens of each.

    Args:
        rows: Rows of the call, an integer or one of TensorRT's symbols.
        tokens: Tokens of each row.
        cdiv: Division of such numbers, rounded up.
        minimum: The smaller of two.
    """
    tiles = cdiv(tokens, TILE)
    most = cdiv(MOST_SPANS, minimum(rows, MOST_SPANS))
    each = cdiv(tiles, minimum(tiles, most))
    return cdiv(tiles, each), each * TILE


def span_slots(rows: Any, spans: Any) -> Any:
    """Return the number of states that `mamba_spans` may write."""
    return rows * (spans - 1) + 1


def spans_launch(heads: int, head_dim: int, state: int, groups: int, dtype: str) -> Launch:
    """Return the tiles of the convolution over spans."""
    channels = max(16, triton.next_power_of_2(head_dim))
    block = min(16 if dtype == "fp32" else 64, channels)
    share = triton.cdiv(2 * groups * state, heads * triton.cdiv(head_dim, block))
    constants = {
        **{"BLOCK_L": CHUNK, "BLOCK_P": block, "BLOCK_N": max(16, triton.next_power_of_2(state))},
        "BLOCK_S": max(16, triton.next_power_of_2(share)),
    }
    return Launch(constants, num_warps=8 if dtype == "fp32" else 4)


def states_tactics(head_dim: int, state: int, dtype: str) -> tuple[Launch, ...]:
    """Return the tiles of the scan with new states, one set for each tactic.

    Chunks of 16 tokens are a block's. Those of 32 take two thirds of the instructions for a token
    of a long span; in float32 they would spill.
    """
    channels = max(16, triton.next_power_of_2(head_dim))
    constants = {"BLOCK_N": max(16, triton.next_power_of_2(state))}
    if dtype == "fp32":
        return (Launch({**constants, "BLOCK_P": 16, "BLOCK_L": CHUNK}, num_warps=8),) * TACTICS
    constants["BLOCK_P"] = min(32, channels)
    return tuple(
        Launch({**constants, "BLOCK_L": tokens}, num_warps=4) for tokens in (CHUNK, 2 * CHUNK)
    )
