"""`RefineBlock` in two kernels: a pass over the vocabulary, then one decision per row.

    logits [B, S, V] --> refine_vocabulary --> partials [B, S, 5, P] --> refine_decision --> new ids
                         one program per       partial_ids [B, S, P]     one program per row
                         (split, position, row)

A block has 16 positions and a GPU over a hundred multiprocessors: one program per position would
leave most of them idle, so the vocabulary is cut into P splits. A split leaves five numbers and a
token; the second kernel merges them and ranks the row. Both are one launch each because a TensorRT
plugin node is one launch. The first is in `vocabulary.py`; this file has the second, and the op.

Rules, ties and noise are those of the ONNX function `twotower::RefineBlock` in a bundle's graphs:
NVIDIA's `generate_mask_diffusion` for policy 0, see `docs/kernels.md` for the others.
"""

from __future__ import annotations

import triton
import triton.language as tl

from twotower_engines.kernels.jit import Launch, kernel
from twotower_engines.kernels.policies import policy_rule
from twotower_engines.kernels.spec import KernelSpec, Sizes
from twotower_engines.kernels.vocabulary import (
    NO_TOKEN,
    TILE,
    VOCABULARY_LAUNCH,
    refine_vocabulary,
    tiles,
)


@kernel
def refine_decision(
    ids: tl.tensor, lengths: tl.tensor, threshold: tl.tensor, steps_left: tl.tensor,
    policy: tl.tensor, partials: tl.tensor, partial_ids: tl.tensor, S: tl.tensor, P: tl.tensor,
    new_ids: tl.tensor, confidence_out: tl.tensor, committed_out: tl.tensor,
    still_masked: tl.tensor,
    MASK_ID: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr,
) -> None:  # fmt: skip
    """Merge the splits of a row and decide what it commits; grid (B,).

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
    row_threshold = tl.load(threshold + row)
    where = position.to(tl.float32)
    # Twice: the second time for what depends on the order, which the first gives.
    key, _ = policy_rule(rule, row_threshold, confidence, entropy, where, where, where)
    key = tl.where(open_, key, 3e38)
    other, mine = key[None, :], key[:, None]
    later = position[None, :] > position[:, None]
    before = (other < mine) | ((other == mine) & later)  # [i, j]: j is committed before i
    rank = tl.sum(before.to(tl.int32), axis=1)
    earlier = before & open_[None, :]
    entropy_before = tl.sum(tl.where(earlier, entropy[None, :], 0.0), axis=1)

    n = tl.sum(open_.to(tl.int32), axis=0)
    number = rank + 1
    _, fits = policy_rule(
        rule, row_threshold, confidence, entropy, where, number.to(tl.float32), entropy_before
    )
    wanted = tl.max(tl.where(open_ & fits, number, 0), axis=0)
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


def decision_launch(block: int, split_count: int) -> Launch:
    """Return the tiles of the decision: one row's positions by its splits."""
    constants = {
        "BLOCK_S": triton.next_power_of_2(block),
        "BLOCK_P": triton.next_power_of_2(split_count),
    }
    tile = constants["BLOCK_S"] * constants["BLOCK_P"]
    return Launch(constants, num_warps=4 if tile <= 1024 else 8)


INTEGERS = ("ids", "lengths", "steps_left", "policy", "seed", "partial_ids", "new_ids")
TYPES = {
    **dict.fromkeys((*INTEGERS, "committed_out", "still_masked"), "*i32"),
    **dict.fromkeys(("threshold", "temperature", "partials", "confidence_out"), "*fp32"),
    **dict.fromkeys(("S", "P", "TILES"), "i32"),
}
"""Types of both kernels' parameters, but for the logits."""


def specs(sizes: Sizes) -> list[KernelSpec]:
    """Return both kernels for one model, for batches of any number of rows."""
    most_splits = -(-sizes.vocab_size // (tiles(1) * TILE))
    types = {**TYPES, "logits": f"*{sizes.dtype}"}
    constants = {"V": sizes.vocab_size, "MASK_ID": sizes.mask_id}
    decision = decision_launch(sizes.block, most_splits)
    return [
        KernelSpec.of("refine_vocabulary", refine_vocabulary, types, constants, VOCABULARY_LAUNCH),
        KernelSpec.of("refine_decision", refine_decision, types, constants, decision),
    ]
