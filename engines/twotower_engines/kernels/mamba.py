"""`MambaBlockStep` in three kernels: convolution, scan per head, gated norm per group.

    projected (xBC), conv_state --> mamba_conv --> convolved [B, L, conv_dim] T, new conv_state
                                    one program per (64 channels, 16 tokens, row)
    convolved, dt, ssm_state    --> mamba_scan --> scanned [B, L, d_inner] T, new ssm_state
                                    one program per (part of a head, row)
    projected (z), scanned      --> mamba_norm --> y [B, L, d_inner] T
                                    one program per (group, token, row)

The scan's work is the state, 2 MB a row in the released model: each program reads its part of one
head's state once, keeps it in registers for the whole call and writes it once, if at all. Eight
heads share B and C; convolving them once in a launch of their own is cheaper than in every program
of the scan (16 times over), and the norm spans a group of heads, so neither can be in the scan's
launch without a barrier across programs. What passes between the launches is rounded to T there by
the op's definition.

Within a chunk of `BLOCK_L` tokens the recurrence is a masked matrix product (Dao and Gu,
"Transformers are SSMs", section 6); chunks follow one another with the state in between. A short
chunk keeps the exponents small: they are differences of sums of decays since the chunk began.

Where T is bf16, x, B and C come rounded to 8 bits. The products with the state and with dt * x run
on the tensor cores with that factor as the sum of two bf16 numbers, 16 bits, and accumulate in
float32: 2^-17 of a factor is lost where its partner lost 2^-9 before. The state itself stays
float32.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from twotower_engines.kernels.jit import INTERPRETED, Launch, kernel, launch
from twotower_engines.kernels.spec import KernelSpec, Sizes

__all__ = [
    "conv_launch",
    "mamba_block_step",
    "mamba_conv",
    "mamba_norm",
    "mamba_scan",
    "norm_launch",
    "scan_launch",
    "specs",
]

CHUNK = 16
"""Tokens of a chunk of the scan; a denoiser's block is one chunk."""

TAPS = tl.constexpr(4)
"""Width of the convolution; a row's history is one less."""


@kernel
def softplus(x: tl.tensor) -> tl.tensor:
    """log(1 + e^x), accurate where e^x is far below 1: dt of a closed head is small, not 0."""
    power = tl.exp(tl.minimum(x, 20.0))
    one_more = 1.0 + power
    # log(u) * e / (u - 1) repairs the rounding of u = 1 + e (Kahan).
    rounded = one_more - 1.0
    safe = tl.where(rounded == 0.0, 1.0, rounded)
    small = tl.where(rounded == 0.0, power, tl.log(one_more) * (power / safe))
    return tl.where(x > 20.0, x, small)


@kernel
def raw_columns(
    xbc: tl.tensor,
    history: tl.tensor,
    place: tl.tensor,
    channel: tl.tensor,
    used: tl.tensor,
    STRIDE: tl.constexpr,
    CONV_DIM: tl.constexpr,
) -> tl.tensor:
    """xBC before the convolution, [places, channels] float32; places below 0 are history.

    xbc: the row's first token; history: the row's three columns, newest last.
    """
    new = tl.load(
        xbc + place.to(tl.int64)[:, None] * STRIDE + channel[None, :],
        mask=used & (place >= 0)[:, None],
        other=0.0,
    )
    old = tl.load(
        history + (place + TAPS - 1)[:, None] * CONV_DIM + channel[None, :],
        mask=used & (place < 0)[:, None],
        other=0.0,
    )
    return tl.where((place >= 0)[:, None], new.to(tl.float32), old.to(tl.float32))


@kernel
def mamba_conv(
    projected: tl.tensor,
    conv_state: tl.tensor,
    lengths: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    L: tl.tensor,
    convolved: tl.tensor,
    conv_state_new: tl.tensor,
    H: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    G: tl.constexpr,
    STATES: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """SiLU(conv + bias) of BLOCK_C channels of BLOCK_L tokens.

    Grid (conv_dim / BLOCK_C, L / BLOCK_L, B). Tokens past a row's length get 0. STATES: whether the
    last three raw columns are written; where not, their pointer is not used.
    """
    CONV_DIM: tl.constexpr = H * P + 2 * G * N
    STRIDE: tl.constexpr = H * P + CONV_DIM + H
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    time = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
    row = tl.program_id(2).to(tl.int64)
    length = tl.maximum(tl.minimum(tl.load(lengths + row), L), 0)
    xbc = projected + row * L * STRIDE + H * P
    history = conv_state + row * (TAPS - 1) * CONV_DIM
    real = channel < CONV_DIM

    used = (time < length)[:, None] & real[None, :]
    total = tl.zeros((BLOCK_L, BLOCK_C), dtype=tl.float32)
    total += tl.load(bias + channel, mask=real, other=0.0).to(tl.float32)[None, :]
    for tap in tl.static_range(TAPS):
        place = time + (tap - (TAPS - 1))
        column = raw_columns(xbc, history, place, channel, used, STRIDE, CONV_DIM)
        factor = tl.load(weight + channel * TAPS + tap, mask=real, other=0.0).to(tl.float32)
        total += column * factor[None, :]
    silu = tl.where(used, total / (1.0 + tl.exp(-total)), 0.0)
    out = convolved + (row * L + time)[:, None] * CONV_DIM + channel[None, :]
    tl.store(out, silu.to(convolved.dtype.element_ty), mask=(time < L)[:, None] & real[None, :])

    if STATES:  # noqa: SIM102 - the outer condition is decided at compile time
        if tl.program_id(1) == 0:
            slot = tl.arange(0, TAPS)
            kept = (slot < TAPS - 1)[:, None] & real[None, :]
            last = length - (TAPS - 1) + slot
            newest = raw_columns(xbc, history, last, channel, kept, STRIDE, CONV_DIM)
            columns = conv_state_new + row * (TAPS - 1) * CONV_DIM
            columns += slot[:, None] * CONV_DIM + channel[None, :]
            tl.store(columns, newest.to(conv_state_new.dtype.element_ty), mask=kept)


@kernel
def product(
    a: tl.tensor, b: tl.tensor, c: tl.tensor, SPLIT: tl.constexpr, UPCAST: tl.constexpr
) -> tl.tensor:
    """a @ b + c, accumulated in float32.

    SPLIT: which factor is float32 while the other is bf16, "left" or "right"; it enters as the sum
    of two bf16 numbers, the smaller first. "none": both are of one type.
    """
    if SPLIT == "none":
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        c = tl.dot(a, b, c, input_precision="ieee")
    else:
        whole = a if SPLIT == "left" else b
        high = whole.to(tl.bfloat16)
        low = (whole - high.to(tl.float32)).to(tl.bfloat16)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
            high, low = high.to(tl.float32), low.to(tl.float32)
        if SPLIT == "left":
            c = tl.dot(low, b, c)
            c = tl.dot(high, b, c)
        else:
            c = tl.dot(a, low, c)
            c = tl.dot(a, high, c)
    return c


@kernel
def mamba_scan(
    projected: tl.tensor,
    convolved: tl.tensor,
    ssm_state: tl.tensor,
    lengths: tl.tensor,
    dt_bias: tl.tensor,
    A_log: tl.tensor,
    D: tl.tensor,
    L: tl.tensor,
    scanned: tl.tensor,
    ssm_state_new: tl.tensor,
    H: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    G: tl.constexpr,
    STATES: tl.constexpr,
    UPDATE: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """BLOCK_P channels of one head over a row's tokens; grid (H * P / BLOCK_P, B).

    Tokens past a row's length get 0 and leave the state alone. STATES: whether the new state is
    written; where not, its pointer is not used.
    """
    D_INNER: tl.constexpr = H * P
    CONV_DIM: tl.constexpr = D_INNER + 2 * G * N
    STRIDE: tl.constexpr = D_INNER + CONV_DIM + H
    PARTS: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    IS_FLOAT: tl.constexpr = convolved.dtype.element_ty == tl.float32
    LEFT: tl.constexpr = "none" if IS_FLOAT else "left"
    RIGHT: tl.constexpr = "none" if IS_FLOAT else "right"
    head = tl.program_id(0) // PARTS
    row = tl.program_id(1).to(tl.int64)
    group = head // (H // G)

    p = (tl.program_id(0) % PARTS) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    real_p, real_n = p < P, n < N
    real_state = real_p[:, None] & real_n[None, :]
    state_place = ((row * H + head) * P + p)[:, None] * N + n[None, :]
    state = tl.load(ssm_state + state_place, mask=real_state, other=0.0)

    rate = -tl.exp(tl.load(A_log + head).to(tl.float32))
    step_bias = tl.load(dt_bias + head).to(tl.float32)
    skip = tl.load(D + head).to(tl.float32)
    length = tl.maximum(tl.minimum(tl.load(lengths + row), L), 0)

    lane = tl.arange(0, BLOCK_L)
    causal = lane[:, None] >= lane[None, :]
    for start in range(0, L, BLOCK_L):
        time = row * L + start + lane
        there = start + lane < length
        inside = start + lane < L
        y = tl.zeros((BLOCK_L, BLOCK_P), dtype=tl.float32)
        if start < length:
            token = convolved + time[:, None] * CONV_DIM
            mask_n = inside[:, None] & real_n[None, :]
            x = tl.load(
                token + (head * P + p)[None, :], mask=inside[:, None] & real_p[None, :], other=0.0
            ).to(tl.float32)
            b = tl.load(token + (D_INNER + group * N + n)[None, :], mask=mask_n, other=0.0)
            c = tl.load(token + (D_INNER + (G + group) * N + n)[None, :], mask=mask_n, other=0.0)
            raw = projected + time * STRIDE + D_INNER + CONV_DIM + head
            step = tl.load(raw, mask=there, other=0.0).to(tl.float32)
            step = tl.where(there, softplus(step + step_bias), 0.0)
            total = tl.cumsum(step * rate, axis=0)  # log of the decay since the chunk began
            end = tl.sum(tl.where(lane == BLOCK_L - 1, total, 0.0), axis=0)
            since = tl.where(causal, total[:, None] - total[None, :], float("-inf"))

            zero = tl.zeros((BLOCK_L, BLOCK_L), dtype=tl.float32)
            similarity = product(c, tl.trans(b), zero, "none", UPCAST) * tl.exp(since)
            moved = x * step[:, None]
            y = product(c, tl.trans(state), y, RIGHT, UPCAST) * tl.exp(total)[:, None]
            y = product(similarity, moved, y, "none", UPCAST) + skip * x
            if UPDATE:
                moved = moved * tl.exp(end - total)[:, None]
                state = product(tl.trans(moved), b, state * tl.exp(end), LEFT, UPCAST)
        out = scanned + time[:, None] * D_INNER + (head * P + p)[None, :]
        tl.store(out, y.to(scanned.dtype.element_ty), mask=inside[:, None] & real_p[None, :])

    if STATES:
        tl.store(ssm_state_new + state_place, state, mask=real_state)


@kernel
def mamba_norm(
    projected: tl.tensor,
    scanned: tl.tensor,
    lengths: tl.tensor,
    weight: tl.tensor,
    L: tl.tensor,
    y: tl.tensor,
    H: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    G: tl.constexpr,
    EPSILON: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """u = scanned * silu(z), divided by its root mean square over the group; grid (G, L, B).

    Tokens past a row's length get 0.
    """
    D_INNER: tl.constexpr = H * P
    STRIDE: tl.constexpr = 2 * D_INNER + 2 * G * N + H
    WIDTH: tl.constexpr = D_INNER // G
    group, time = tl.program_id(0), tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    lane = tl.arange(0, BLOCK_C)
    real = lane < tl.where(time < tl.load(lengths + row), WIDTH, 0)
    channel = group * WIDTH + lane
    token = row * L + time
    z = tl.load(projected + token * STRIDE + channel, mask=real, other=0.0).to(tl.float32)
    value = tl.load(scanned + token * D_INNER + channel, mask=real, other=0.0).to(tl.float32)
    gated = value * (z / (1.0 + tl.exp(-z)))
    mean = tl.sum(gated * gated, axis=0) / WIDTH
    factor = tl.load(weight + channel, mask=real, other=0.0).to(tl.float32)
    normed = gated / tl.sqrt(mean + EPSILON) * factor
    out = y + token * D_INNER + channel
    tl.store(out, normed.to(y.dtype.element_ty), mask=lane < WIDTH)


def conv_launch() -> Launch:
    """Tiles of the convolution: 96 programs at one row of the released model."""
    return Launch({"BLOCK_L": 16, "BLOCK_C": 64}, num_warps=4)


def scan_launch(head_dim: int, state: int, dtype: str, *, update: bool) -> Launch:
    """Tiles of the scan: half a head of the released model, so 128 programs at one row.

    Args:
        head_dim: channels of a head.
        state: numbers of a channel's state.
        dtype: "bf16" or "fp32"; float32 products are made of scalar ones and need more registers.
        update: see `needs_update`. Without, 128 registers a thread do, and a multiprocessor holds
            four programs.
    """
    wide = dtype == "fp32"
    constants = {
        "BLOCK_L": CHUNK,
        "BLOCK_P": 16 if wide else min(32, max(16, triton.next_power_of_2(head_dim))),
        "BLOCK_N": max(16, triton.next_power_of_2(state)),
    }
    if wide:
        return Launch(constants, num_warps=8)
    return Launch(constants, num_warps=4, max_registers=None if update else 128)


def needs_update(tokens: int, *, states: bool) -> bool:
    """Whether the scan must carry its state on: to the next chunk, or to the caller."""
    return states or tokens > CHUNK


def norm_launch(width: int) -> Launch:
    """Tiles of the gated norm: one group of one token, by one warp."""
    return Launch({"BLOCK_C": triton.next_power_of_2(width)}, num_warps=1)


def mamba_block_step(
    projected: Any,
    conv_state: Any,
    ssm_state: Any,
    lengths: Any,
    conv_weight: Any,
    conv_bias: Any,
    dt_bias: Any,
    A_log: Any,
    D: Any,
    norm_weight: Any,
    n_groups: int,
    epsilon: float,
    *,
    states: bool = True,
) -> tuple[Any, Any, Any]:
    """One block through convolution, scan and gated norm, on torch tensors.

    Args:
        projected: [B, L, d_inner + conv_dim + H] T: z, xBC, dt; contiguous, as all others.
        conv_state: [B, 3, conv_dim] T, raw xBC, newest last.
        ssm_state: [B, H, P, N] float32.
        lengths: [B] int32.
        conv_weight: [conv_dim, 4].
        conv_bias: [conv_dim].
        dt_bias: [H], as A_log and D.
        A_log: logarithm of the decay rates.
        D: weight of the direct path.
        norm_weight: [d_inner].
        n_groups: heads of a group share B and C, and a norm.
        epsilon: of the norm.
        states: whether the new states are wanted.

    Returns:
        y [B, L, d_inner] T; conv_state and ssm_state after each row's last token, or None twice.
    """
    import torch

    B, L, _ = projected.shape
    _, H, P, N = ssm_state.shape
    dims = {"H": H, "P": P, "N": N, "G": n_groups}
    conv_dim = conv_state.shape[2]
    convolved = projected.new_empty((B, L, conv_dim))
    scanned = projected.new_empty((B, L, H * P))
    y = torch.empty_like(scanned)
    conv_new = torch.empty_like(conv_state) if states else conv_state
    ssm_new = torch.empty_like(ssm_state) if states else ssm_state

    tiles = conv_launch()
    channels, tokens = tiles.constants["BLOCK_C"], tiles.constants["BLOCK_L"]
    launch(
        mamba_conv,
        (triton.cdiv(conv_dim, channels), triton.cdiv(L, tokens), B),
        (projected, conv_state, lengths, conv_weight, conv_bias, L, convolved, conv_new),
        {**dims, "STATES": states},
        tiles,
    )
    update = needs_update(L, states=states)
    dtype = "fp32" if projected.dtype == torch.float32 else "bf16"
    tiles = scan_launch(P, N, dtype, update=update)
    launch(
        mamba_scan,
        (H * triton.cdiv(P, tiles.constants["BLOCK_P"]), B),
        (projected, convolved, ssm_state, lengths, dt_bias, A_log, D, L, scanned, ssm_new),
        {**dims, "STATES": states, "UPDATE": update, "UPCAST": INTERPRETED},
        tiles,
    )
    launch(
        mamba_norm,
        (n_groups, L, B),
        (projected, scanned, lengths, norm_weight, L, y),
        {**dims, "EPSILON": epsilon},
        norm_launch(H * P // n_groups),
    )
    return (y, conv_new, ssm_new) if states else (y, None, None)


def specs(sizes: Sizes) -> list[KernelSpec]:
    """Convolution and scan, each with and without new states, and the norm."""
    T, small = f"*{sizes.dtype}", f"*{sizes.small_dtype}"
    dims: dict[str, int | float] = {
        "H": sizes.heads,
        "P": sizes.head_dim,
        "N": sizes.state,
        "G": sizes.groups,
    }
    rows = {"lengths": "*i32"}
    conv_types = {
        **{"projected": T, "conv_state": T, **rows, "weight": small, "bias": small},
        **{"L": "i32", "convolved": T, "conv_state_new": T},
    }
    scan_types = {
        **{"projected": T, "convolved": T, "ssm_state": "*fp32", **rows},
        **dict.fromkeys(("dt_bias", "A_log", "D"), small),
        **{"L": "i32", "scanned": T, "ssm_state_new": "*fp32"},
    }
    norm_types = {"projected": T, "scanned": T, **rows, "weight": small, "L": "i32", "y": T}
    made = []
    for suffix, states in (("", False), ("_states", True)):
        update = needs_update(sizes.block, states=states)
        wanted = {**dims, "STATES": states}
        constants = {**wanted, "UPDATE": update, "UPCAST": False}
        scan = scan_launch(sizes.head_dim, sizes.state, sizes.dtype, update=update)
        made += [
            KernelSpec(f"mamba_conv{suffix}", mamba_conv, conv_types, wanted, conv_launch()),
            KernelSpec(f"mamba_scan{suffix}", mamba_scan, scan_types, constants, scan),
        ]
    norm = norm_launch(sizes.heads * sizes.head_dim // sizes.groups)
    constants = {**dims, "EPSILON": sizes.epsilon}
    return [*made, KernelSpec("mamba_norm", mamba_norm, norm_types, constants, norm)]
