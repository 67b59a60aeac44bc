"""`RefineBlock` in two kernels: a pass over the vocabulary, then one decision per row.

    logits [B, S, V] --> refine_vocabulary --> partials [B, S, 5, P] --> refine_decision --> new ids
                         one program per       partial_ids [B, S, P]     one program per row
                         (split, position, row)

A block has 16 positions and a GPU over a hundred multiprocessors: one program per position would
leave most of them idle, so the vocabulary is cut into P splits of `BLOCK_V` tokens. A split leaves
five numbers and a token; the second kernel merges them and ranks the row. Both are one launch each
because a TensorRT plugin node is one launch.

Rules, ties and noise are those of the ONNX function `twotower::RefineBlock` in a bundle's graphs:
NVIDIA's `generate_mask_diffusion` for policy 0, see `docs/kernels.md` for the others.
"""

# Kernels are read by Triton's compiler: annotations are for people, `tl.constexpr` is for both.
from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from twotower_engines.kernels.jit import Launch, kernel, launch
from twotower_engines.kernels.spec import KernelSpec, Sizes

__all__ = [
    "BLOCK_V",
    "FIELDS",
    "decision_launch",
    "refine_block",
    "refine_decision",
    "refine_vocabulary",
    "specs",
    "splits",
    "vocabulary_launch",
]

BLOCK_V = 4096
"""Tokens of a split: 8 or 16 kB in flight per program, and 512 programs at one row of 16 positions,
about four per multiprocessor of an H200. Larger splits would leave multiprocessors idle at one row;
smaller ones spend their time starting."""

FIELDS = 5
"""Numbers that a split leaves: maximum logit; sum of e = exp(logit - maximum); sum of
e * (logit - maximum); best score; logit of the best token."""

NO_TOKEN = tl.constexpr(2**31 - 1)
"""The prediction where nothing can be predicted: after every token, and in no vocabulary."""

PRIME = tl.constexpr(2**31 - 1)
"""The noise is computed in the field of this many elements: 2^31 = 1 there."""


@kernel
def field_multiply(x: tl.tensor, y: tl.tensor) -> tl.tensor:
    """x * y in the field; x, y int64 below 2^31 - 1.

    The product's upper and lower 31 bits add up to it, since 2^31 = 1: no division.
    """
    product = x * y
    folded = (product & PRIME) + (product >> 31)
    return tl.where(folded >= PRIME, folded - PRIME, folded)


@kernel
def field_add(x: tl.tensor, y: tl.tensor) -> tl.tensor:
    """x + y in the field."""
    total = x + y
    return tl.where(total >= PRIME, total - PRIME, total)


@kernel
def fifth_power(x: tl.tensor) -> tl.tensor:
    """x^5 in the field: a permutation, since 5 does not divide 2^31 - 2."""
    square = field_multiply(x, x)
    return field_multiply(field_multiply(square, square), x)


@kernel
def gumbel(token: tl.tensor, position: tl.tensor, seed: tl.tensor) -> tl.tensor:
    """Gumbel noise of a token at a position; float32, a function of its arguments alone.

    U lies strictly inside (0, 1) and is exact in float32: 23 bits and a half.
    """
    place = (seed.to(tl.int64) + 7919 * (position.to(tl.int64) + 1) + 1) % PRIME
    first = fifth_power(place)
    second = fifth_power(field_add(first, 104729))
    mixed = fifth_power(field_add(token.to(tl.int64), first))
    mixed = fifth_power(field_add(mixed, second))
    uniform = ((mixed >> 8).to(tl.float32) + 0.5) * (1.0 / 8388608.0)
    return -tl.log(-tl.log(uniform))


@kernel
def sample(
    logits: tl.tensor,
    first: tl.tensor,
    position: tl.tensor,
    heat: tl.tensor,
    seed: tl.tensor,
    V: tl.constexpr,
    MASK_ID: tl.constexpr,
    BLOCK_V: tl.constexpr,
) -> tl.tensor:
    """(best score, its token, its logit) of a split, with noise; the lowest token of equal ones.

    Reads the split again, from the cache and in pieces: noise takes many 64-bit registers, and a
    kernel that samples all of its logits at once would run half as many programs at temperature 0.
    """
    PIECE: tl.constexpr = BLOCK_V if BLOCK_V < 512 else 512
    lane = tl.arange(0, PIECE)
    best = tl.full((PIECE,), float("-inf"), dtype=tl.float32)
    token = tl.full((PIECE,), NO_TOKEN, dtype=tl.int32)
    logit = tl.full((PIECE,), float("-inf"), dtype=tl.float32)
    for start in range(0, BLOCK_V, PIECE):
        candidate = first + start + lane
        real = (candidate < V) & (candidate != MASK_ID)
        x = tl.load(logits + candidate, mask=candidate < V, other=0.0).to(tl.float32)
        score = tl.div_rn(x, tl.zeros_like(x) + heat) + gumbel(candidate, position, seed)
        better = real & ((score > best) | (token == NO_TOKEN))  # scores may all be -inf
        best = tl.where(better, score, best)
        token = tl.where(better, candidate, token)
        logit = tl.where(better, x, logit)
    winner = tl.max(best, axis=0)
    chosen = tl.min(tl.where(best == winner, token, NO_TOKEN), axis=0)
    return winner, chosen, tl.max(tl.where(token == chosen, logit, float("-inf")), axis=0)


@kernel
def refine_vocabulary(
    logits: tl.tensor,
    ids: tl.tensor,
    lengths: tl.tensor,
    temperature: tl.tensor,
    seed: tl.tensor,
    S: tl.tensor,
    partials: tl.tensor,
    partial_ids: tl.tensor,
    V: tl.constexpr,
    MASK_ID: tl.constexpr,
    BLOCK_V: tl.constexpr,
) -> None:
    """One split of the vocabulary at one position; grid (splits, S, B).

    Reads its logits once, all loads in flight together. Positions that are not masked are left
    alone: their logits are not read and their partials not written.
    """
    split = tl.program_id(0)
    position = tl.program_id(1)
    row = tl.program_id(2)
    place = row * S + position
    if (position >= tl.load(lengths + row)) | (tl.load(ids + place) != MASK_ID):
        return

    token = split * BLOCK_V + tl.arange(0, BLOCK_V)
    real = (token < V) & (token != MASK_ID)
    # The load's own mask leaves the mask token in, so that it stays 16 bytes wide.
    x = tl.load(logits + place.to(tl.int64) * V + token, mask=token < V, other=float("-inf"))
    x = tl.where(real, x.to(tl.float32), float("-inf"))

    # A split may hold nothing but -inf (a vocabulary of BLOCK_V * k + 1, whose last is the mask
    # token): its maximum must not turn -inf - -inf into NaN. +inf does, and so is reported.
    top = tl.max(x, axis=0)
    shifted = x - tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp(shifted)
    total = tl.sum(weight, axis=0)
    mean = tl.sum(tl.where(weight > 0.0, weight * shifted, 0.0), axis=0)

    best = top
    chosen = tl.min(tl.where(real & (x == top), token, NO_TOKEN), axis=0)
    logit = top
    heat = tl.load(temperature + row)
    if heat > 0.0:
        best, chosen, logit = sample(
            logits + place.to(tl.int64) * V,
            split * BLOCK_V,
            position,
            heat,
            tl.load(seed + row),
            V,
            MASK_ID,
            BLOCK_V,
        )

    count = tl.num_programs(0)
    out = partials + place.to(tl.int64) * (5 * count) + split
    tl.store(out, top)
    tl.store(out + count, total)
    tl.store(out + 2 * count, mean)
    tl.store(out + 3 * count, best)
    tl.store(out + 4 * count, logit)
    tl.store(partial_ids + place.to(tl.int64) * count + split, chosen)


@kernel
def policy_key(
    policy: tl.tensor, confidence: tl.tensor, entropy: tl.tensor, position: tl.tensor
) -> tl.tensor:
    """What a policy commits first has the lowest key. A new policy adds a line here."""
    key = position.to(tl.float32)  # 4, leftmost
    key = tl.where(policy == 3, entropy, key)  # entropy
    return tl.where((policy >= 0) & (policy <= 2), -confidence, key)  # threshold, quota, factor


@kernel
def policy_count(
    policy: tl.tensor,
    bound: tl.tensor,
    masked: tl.tensor,
    rank: tl.tensor,
    confidence: tl.tensor,
    entropy_before: tl.tensor,
) -> tl.tensor:
    """How many positions a policy would commit. A new policy adds a line here.

    rank: 0 for the position that is committed first; entropy_before: sum over those before it.
    """
    number = (rank + 1).to(tl.float32)
    confident = masked & (confidence > bound)
    within_factor = masked & ((number + 1.0) * (1.0 - confidence) < bound)
    within_bound = masked & (entropy_before <= bound)
    count = tl.where(policy == 0, tl.sum(confident.to(tl.int32), axis=0), 0)
    furthest = tl.max(tl.where(within_factor, rank + 1, 0), axis=0)
    count = tl.where(policy == 2, furthest, count)
    furthest = tl.max(tl.where(within_bound, rank + 1, 0), axis=0)
    return tl.where(policy == 3, furthest, count)


@kernel
def refine_decision(
    ids: tl.tensor,
    lengths: tl.tensor,
    threshold: tl.tensor,
    steps_left: tl.tensor,
    policy: tl.tensor,
    partials: tl.tensor,
    partial_ids: tl.tensor,
    S: tl.tensor,
    P: tl.tensor,
    new_ids: tl.tensor,
    confidence_out: tl.tensor,
    committed_out: tl.tensor,
    still_masked: tl.tensor,
    MASK_ID: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_P: tl.constexpr,
) -> None:
    """Merges the splits of a row and decides what it commits; grid (B,).

    BLOCK_S and BLOCK_P are at least S and P, and powers of two.
    """
    row = tl.program_id(0)
    position = tl.arange(0, BLOCK_S)
    split = tl.arange(0, BLOCK_P)
    inside = position < S
    old = tl.load(ids + row * S + position, mask=inside, other=MASK_ID)
    masked = inside & (position < tl.load(lengths + row)) & (old == MASK_ID)

    there = masked[:, None] & (split < P)[None, :]
    place = (row * S + position).to(tl.int64)[:, None]
    field = partials + place * (5 * P) + split[None, :]
    top = tl.load(field, mask=there, other=float("-inf"))
    total = tl.load(field + P, mask=there, other=0.0)
    mean = tl.load(field + 2 * P, mask=there, other=0.0)
    best = tl.load(field + 3 * P, mask=there, other=float("-inf"))
    logit = tl.load(field + 4 * P, mask=there, other=float("-inf"))
    token = tl.load(partial_ids + place * P + split[None, :], mask=there, other=NO_TOKEN)

    peak = tl.max(top, axis=1)
    base = tl.where(peak == float("-inf"), 0.0, peak)[:, None]
    scale = tl.exp(top - base)
    part = tl.where(total == 0.0, 0.0, scale * (mean + (top - base) * total))
    sum_weight = tl.sum(scale * total, axis=1)
    sum_mean = tl.sum(part, axis=1)
    log_total = tl.log(sum_weight)
    entropy = log_total - tl.div_rn(sum_mean, sum_weight)

    winner = tl.max(best, axis=1)
    wins = there & (best == winner[:, None])
    prediction = tl.min(tl.where(wins, token, NO_TOKEN), axis=1)
    chosen = tl.max(tl.where(wins & (token == prediction[:, None]), logit, float("-inf")), axis=1)
    log_p = (chosen - peak) - log_total
    confidence = tl.exp(log_p)

    # All logits -inf: the sum is 0 and its logarithm -inf, where the ONNX function has NaN.
    lost = masked & ((log_p != log_p) | (entropy != entropy) | (peak == float("-inf")))
    lost = lost | (masked & (prediction == NO_TOKEN))
    failed = tl.max(lost.to(tl.int32), axis=0) > 0
    open_ = masked & (failed == 0)

    rule = tl.load(policy + row)
    key = tl.where(open_, policy_key(rule, confidence, entropy, position), 3e38)
    other, mine = key[None, :], key[:, None]
    later = position[None, :] > position[:, None]
    before = (other < mine) | ((other == mine) & later)  # [i, j]: j is committed before i
    rank = tl.sum(before.to(tl.int32), axis=1)
    earlier = before & open_[None, :]
    entropy_before = tl.sum(tl.where(earlier, entropy[None, :], 0.0), axis=1)

    n = tl.sum(open_.to(tl.int32), axis=0)
    bound = tl.load(threshold + row)
    wanted = policy_count(rule, bound, open_, rank, confidence, entropy_before)
    steps = tl.load(steps_left + row)
    quota = (n - 1) // tl.maximum(steps, 1) + 1  # rounded up, where n + steps might overflow
    commit = tl.minimum(n, tl.maximum(wanted, quota))
    commit = tl.where(steps <= 1, n, commit)

    committed = open_ & (rank < commit)
    out = row * S + position
    tl.store(new_ids + out, tl.where(committed, prediction, old), mask=inside)
    tl.store(confidence_out + out, tl.where(masked, confidence, float("inf")), mask=inside)
    tl.store(committed_out + out, committed.to(tl.int32), mask=inside)
    tl.store(still_masked + row, tl.where(failed, -1, n - commit))


def splits(vocab_size: int) -> int:
    """Programs that share one position's vocabulary."""
    return -(-vocab_size // BLOCK_V)


def vocabulary_launch(vocab_size: int) -> Launch:
    """Tiles of the vocabulary pass: a split, or a smaller vocabulary whole."""
    block = min(BLOCK_V, triton.next_power_of_2(vocab_size))
    return Launch({"BLOCK_V": block}, num_warps=8 if block == BLOCK_V else 4)


def decision_launch(block: int, split_count: int) -> Launch:
    """Tiles of the decision: one row's positions by its splits."""
    constants = {
        "BLOCK_S": triton.next_power_of_2(block),
        "BLOCK_P": triton.next_power_of_2(split_count),
    }
    tile = constants["BLOCK_S"] * constants["BLOCK_P"]
    return Launch(constants, num_warps=4 if tile <= 1024 else 8)


def refine_block(
    logits: Any,
    ids: Any,
    lengths: Any,
    threshold: Any,
    steps_left: Any,
    temperature: Any,
    policy: Any,
    seed: Any,
    mask_id: int,
) -> tuple[Any, Any, Any, Any]:
    """One refinement step on torch tensors; nothing is synchronized.

    Args:
        logits: [B, S, V] bf16 or float32, contiguous.
        ids: [B, S] int32.
        lengths: [B] int32, valid positions; 0 for an inactive row.
        threshold: [B] float32; the factor or the bound for policies 2 and 3.
        steps_left: [B] int32, this one included.
        temperature: [B] float32.
        policy: [B] int32.
        seed: [B] int32, not negative.
        mask_id: token of a position that is not decided.

    Returns:
        new_ids [B, S] int32, confidence [B, S] float32, committed [B, S] int32, still_masked [B]
        int32.
    """
    import torch

    B, S, V = logits.shape
    config = vocabulary_launch(V)
    P = splits(V)
    partials = logits.new_empty((B, S, FIELDS, P), dtype=torch.float32)
    partial_ids = ids.new_empty((B, S, P))
    launch(
        refine_vocabulary,
        (P, S, B),
        (logits, ids, lengths, temperature, seed, S, partials, partial_ids),
        {"V": V, "MASK_ID": mask_id},
        config,
    )
    new_ids, committed = torch.empty_like(ids), torch.empty_like(ids)
    confidence = logits.new_empty((B, S), dtype=torch.float32)
    still_masked = ids.new_empty((B,))
    rows = (ids, lengths, threshold, steps_left, policy)
    launch(
        refine_decision,
        (B,),
        (*rows, partials, partial_ids, S, P, new_ids, confidence, committed, still_masked),
        {"MASK_ID": mask_id},
        decision_launch(S, P),
    )
    return new_ids, confidence, committed, still_masked


VOCABULARY_TYPES = {
    "ids": "*i32",
    "lengths": "*i32",
    "temperature": "*fp32",
    "seed": "*i32",
    "S": "i32",
    "partials": "*fp32",
    "partial_ids": "*i32",
}
DECISION_TYPES = {
    "ids": "*i32",
    "lengths": "*i32",
    "threshold": "*fp32",
    "steps_left": "*i32",
    "policy": "*i32",
    "partials": "*fp32",
    "partial_ids": "*i32",
    "S": "i32",
    "P": "i32",
    "new_ids": "*i32",
    "confidence_out": "*fp32",
    "committed_out": "*i32",
    "still_masked": "*i32",
}


def specs(sizes: Sizes) -> list[KernelSpec]:
    """Both kernels for one model."""
    config = vocabulary_launch(sizes.vocab_size)
    return [
        KernelSpec(
            "refine_vocabulary",
            refine_vocabulary,
            {"logits": f"*{sizes.dtype}", **VOCABULARY_TYPES},
            {"V": sizes.vocab_size, "MASK_ID": sizes.mask_id},
            config,
        ),
        KernelSpec(
            "refine_decision",
            refine_decision,
            DECISION_TYPES,
            {"MASK_ID": sizes.mask_id},
            decision_launch(sizes.block, splits(sizes.vocab_size)),
        ),
    ]
