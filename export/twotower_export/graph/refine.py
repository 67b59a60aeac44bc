"""`twotower::RefineBlock`: one step of iterative refinement, from logits to block ids.

The rules are those of a step of NVIDIA's `generate_mask_diffusion`
(`modeling_nemotron_twotower.py`), each named where it is written; the policies are in
`policies.py`. This body is the reference: kernels must take the same decisions.

Where it differs from NVIDIA's: the mask token has logit -inf and not -1e12; noise is drawn by
(seed, position, token) and not by `torch.rand_like`; and a NaN fails the row, where NVIDIA's sort
would commit that position first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from twotower_contract.policies import POLICIES
from twotower_export.graph.body import FLOAT, INT32, INT64, Body, in_section, inputs
from twotower_export.graph.policies import POLICY_RULES, Order, Seen

PRIME = 2**31 - 1
"""The noise is computed in the field of this many elements: products of two fit an int64."""

EXCLUDED = -np.inf
"""Logit of the mask token. (`_mdlm_forward`'s -1e12 would predict it where all are lower still.)"""

TAIL = 2.0**-6
TAIL_TERMS = 4
"""Where U is at most this far from 1, -log(U) is the sum of (1 - U)^n / n over as many terms, which
is exact to float32. A GPU's fast log is off by a fixed 4e-7 there, six times the least -log(U)."""

LEAST_LOG_P = -1e12
"""Bound on the log probability of what has no probability: 0 * -inf is not a number."""

BEFORE_ANY = 3e38
"""Sort key of a position that is not to be committed: after every real one."""

LEFTMOST = POLICIES["leftmost"]
"""The policy that an unknown number counts as."""

ROW_INPUTS = ("lengths", "threshold", "steps_left", "temperature", "policy", "seed")


def refine_block(mask_id: int, dtype: ir.DataType) -> ir.Function:
    """Return the op; logits may be T or float32.

    Inputs: logits [B, S, V]; ids [B, S] int32; per row [B]: lengths int32 (0: inactive), threshold
    float32 (policy `factor`: the factor; `entropy`: the bound in nats), steps_left int32,
    temperature float32 (0, or at least 1e-6: what overflows float32 cannot be compared), policy
    int32, seed int32 (not negative). The noise is a function of (seed, position, token) alone; the
    host folds the step into the seed, so that each step has noise of its own.
    Outputs: new_ids [B, S] int32; confidence [B, S] float32 (+inf where nothing was masked);
    committed [B, S] int32; still_masked [B] int32, -1 where a masked position's logits hold a NaN:
    such a row commits nothing.
    """
    b = Body(dtype)
    args = inputs("logits", "ids", *ROW_INPUTS)
    logits, ids, lengths, threshold, steps_left, temperature, policy, seed = args
    b.begin("masked")
    steps = b.arange(b.size(ids, 1))  # [S]
    inside = b.op.Less(b.unsqueeze(steps, 0), b.unsqueeze(lengths, 1))
    masked = b.op.And(inside, b.op.Equal(ids, b.i32(mask_id)))  # [B, S]

    b.begin("logits")
    vocabulary = b.unsqueeze(b.arange(b.size(logits, 2)), 0, 1)  # [1, 1, V]
    is_mask = b.op.Equal(vocabulary, b.i32(mask_id))
    given, logits = logits, b.op.Where(is_mask, b.f32(EXCLUDED), b.cast(logits, FLOAT))
    b.begin("")
    prediction = _predict(b, logits, vocabulary, temperature, seed, steps)
    log_p, entropy = _statistics(b, given, logits, prediction, policy, mask_id)

    b.begin("failed")
    bad = b.op.And(masked, b.op.IsNaN(log_p))
    failed = b.op.Greater(_count(b, bad), b.i32(0))  # [B]
    masked_ok = b.op.And(masked, b.op.Not(b.unsqueeze(failed, 1)))
    b.begin("confidence")
    confidence = b.op.Exp(log_p)

    b.begin("order")
    position = b.unsqueeze(b.cast(steps, FLOAT), 0)
    seen = Seen(confidence, entropy, position, b.unsqueeze(threshold, 1))
    key = _of_policy(b, policy, [rule.key(b, seen) for rule in POLICY_RULES.values()])
    key = b.op.Where(masked_ok, key, b.f32(BEFORE_ANY))
    before = _precedes(b, key, steps)  # [B, S, S]: j is committed before i
    rank = b.op.ReduceSum(b.cast(before, INT32), b.i64([2]), keepdims=0)
    b.begin("commit")
    n = _count(b, masked_ok)
    wanted = _wanted(b, seen, policy, masked_ok, before, rank)
    quota = _ceil_div(b, n, steps_left)
    commit = b.op.Min(n, b.op.Max(wanted, quota))
    commit = b.op.Where(b.op.LessOrEqual(steps_left, b.i32(1)), n, commit)  # `is_last_step`

    b.begin("outputs")
    committed = b.op.And(masked_ok, b.op.Less(rank, b.unsqueeze(commit, 1)))
    still = b.op.Where(failed, b.i32(-1), b.op.Sub(n, commit))
    outputs = {
        "new_ids": b.op.Where(committed, prediction, ids),
        "confidence": b.op.Where(masked, confidence, b.f32(np.inf)),
        "committed": b.cast(committed, INT32),
        "still_masked": still,
    }
    doc = "One refinement step: predict every masked position, commit the most confident."
    return b.function("RefineBlock", args, outputs, doc, {"mask_id": mask_id})


def _count(b: Body, flags: ir.Value) -> ir.Value:
    """Count the true positions of each row; [B, S] -> [B] int32."""
    return b.op.ReduceSum(b.cast(flags, INT32), b.i64([1]), keepdims=0)


@in_section("predict")
def _predict(
    b: Body,
    logits: ir.Value,
    vocabulary: ir.Value,
    temperature: ir.Value,
    seed: ir.Value,
    steps: ir.Value,
) -> ir.Value:
    """argmax(logits / temperature + gumbel), or argmax(logits) at temperature 0; [B, S] int32.

    `predicted` of `generate_mask_diffusion`; `_gumbel_sample`. (A softmax does not move an argmax.)
    """
    row = b.unsqueeze(temperature, 1, 2)
    sampled = b.op.Greater(row, b.f32(0.0))

    def best(scores: ir.Value) -> ir.Value:
        return b.cast(b.op.ArgMax(scores, axis=2, keepdims=0), INT32)

    def with_noise() -> ir.Value:
        divisor = b.op.Where(sampled, row, b.f32(1.0))
        noise = b.op.Where(sampled, _gumbel(b, vocabulary, seed, steps), b.f32(0.0))
        return best(b.op.Add(b.op.Div(logits, divisor), noise))

    return b.when(_any(b, sampled), with_noise, lambda: best(logits), INT32)


@in_section("noise")
def _gumbel(b: Body, vocabulary: ir.Value, seed: ir.Value, steps: ir.Value) -> ir.Value:
    """Gumbel noise as a function of (seed, position, token); [B, S, V] float32.

    A keyed permutation of the field (x -> x^5 with round keys, as in the cipher MiMC): no state, so
    an answer does not depend on what it is batched with, and nothing but int64 products, which
    every runtime has.
    """

    def reduced(x: ir.Value) -> ir.Value:
        # Not Mod, which TensorRT writes as eight operators that use each other twice.
        return b.op.Sub(x, b.op.Mul(b.op.Div(x, b.i64(PRIME)), b.i64(PRIME)))

    def fifth_power(x: ir.Value, key: ir.Value | None = None) -> ir.Value:
        # Plus a key; x is below 3e9, so that its square fits an int64.
        square = reduced(b.op.Mul(x, x))
        fourth = reduced(b.op.Mul(square, square))
        fifth = b.op.Mul(fourth, x)
        return reduced(fifth if key is None else b.op.Add(fifth, key))

    def apart(x: ir.Value) -> ir.Value:
        # A maximum over one element. TensorRT-RTX writes a chain of elementwise operators out as
        # one expression, whose length doubles with each operand that is used twice: four rounds
        # took it minutes for small vocabularies. A reduction ends the chain, and what it reduces
        # is written to memory: of keys, not of tokens.
        return b.op.ReduceMax(b.unsqueeze(x, 0), b.i64([0]), keepdims=0)

    b.begin("key")
    place = b.op.Add(b.op.Mul(b.cast(steps, INT64), b.i64(7919)), b.i64(7919 + 1))
    key = b.op.Add(b.unsqueeze(b.cast(seed, INT64), 1), b.unsqueeze(place, 0))  # [B, S]
    b.begin("first_key")
    first = apart(fifth_power(key))
    b.begin("second_key")
    second = apart(fifth_power(b.op.Add(first, b.i64(104729))))
    b.begin("first_round")
    token = b.op.Add(b.cast(vocabulary, INT64), b.unsqueeze(first, 2))
    mixed = fifth_power(token, b.unsqueeze(second, 2))
    b.begin("second_round")
    mixed = fifth_power(mixed)
    b.begin("uniform")
    top = b.cast(b.op.Div(mixed, b.i64(256)), FLOAT)  # 23 bits: U below is exact in float32
    uniform = b.op.Mul(b.op.Add(top, b.f32(0.5)), b.f32(2.0**-23))
    b.begin("exponential")
    rest = b.op.Sub(b.f32(1.0), uniform)  # exact where it is used
    series = b.f32(1 / TAIL_TERMS)
    for term in range(TAIL_TERMS - 1, 0, -1):
        series = b.op.Add(b.op.Mul(series, rest), b.f32(1 / term))
    tail = b.op.Mul(series, rest)
    is_tail = b.op.Less(rest, b.f32(TAIL))
    exponential = b.op.Where(is_tail, tail, b.op.Neg(b.op.Log(uniform)))
    b.begin("gumbel")
    return b.op.Neg(b.op.Log(exponential))


@in_section("statistics")
def _statistics(
    b: Body,
    given: ir.Value,
    logits: ir.Value,
    prediction: ir.Value,
    policy: ir.Value,
    mask_id: int,
) -> tuple[ir.Value, ir.Value]:
    """log p(prediction) and entropy in nats at temperature 1, each [B, S] float32.

    The prediction's logit is read from the logits as they were given: TensorRT would write all of
    them in float32 in order to read one of what they became.

    `confidence` of `generate_mask_diffusion` is taken from the unscaled distribution, after
    `_mdlm_forward` has removed the mask token. Entropy is 0 where no row's policy asks for it.
    """
    b.begin("log_p")
    top = b.op.ReduceMax(logits, b.i64([2]), keepdims=1)
    shifted = b.op.Sub(logits, top)
    weight = b.op.Exp(shifted)
    total = b.op.ReduceSum(weight, b.i64([2]), keepdims=1)
    log_total = b.op.Log(total)
    place = b.unsqueeze(prediction, 2)
    chosen = b.cast(b.op.GatherElements(given, b.cast(place, INT64), axis=2), FLOAT)
    chosen = b.op.Where(b.op.Equal(place, b.i32(mask_id)), b.f32(EXCLUDED), chosen)
    log_p = b.op.Squeeze(b.op.Sub(b.op.Sub(chosen, top), log_total), b.i64([2]))
    b.begin("entropy")

    def entropy() -> ir.Value:
        share = b.op.Mul(weight, b.op.Max(shifted, b.f32(LEAST_LOG_P)))
        mean = b.op.Div(b.op.ReduceSum(share, b.i64([2]), keepdims=1), total)
        return b.op.Squeeze(b.op.Sub(log_total, mean), b.i64([2]))

    def none() -> ir.Value:
        return b.op.Mul(b.cast(prediction, FLOAT), b.f32(0.0))

    asked = _any(b, b.op.Equal(policy, b.i32(POLICIES["entropy"])))
    return log_p, b.when(asked, entropy, none, FLOAT)


def _any(b: Body, flags: ir.Value) -> ir.Value:
    """Whether any flag is set; bool []."""
    some: ir.Value = b.op.ReduceMax(b.cast(flags, INT32), keepdims=0)
    return b.cast(some, ir.DataType.BOOL)


def _of_policy(b: Body, policy: ir.Value, cases: Sequence[ir.Value]) -> ir.Value:
    """`cases[policy]` per row, each broadcast to [B, S]; `leftmost` for an unknown number."""
    row = b.unsqueeze(policy, 1)
    result = cases[LEFTMOST]
    for number, case in enumerate(cases):
        if number != LEFTMOST:
            result = b.op.Where(b.op.Equal(row, b.i32(number)), case, result)
    return result


@in_section("precedes")
def _precedes(b: Body, key: ir.Value, steps: ir.Value) -> ir.Value:
    """[B, S, S]: position j (last axis) is committed before i; of equal keys the higher index.

    `generate_mask_diffusion` sorts confidences ascending and masks the first ones again: of equal
    ones the lower index, where the sort is stable, as it is on the CPU. Megatron's
    `MaskDiffusionProcess` argsorts the whole row in the same direction.

    A comparison of all pairs: S is small, and no stable sort is needed.
    """
    mine, other = b.unsqueeze(key, 2), b.unsqueeze(key, 1)
    higher = b.op.Greater(b.unsqueeze(steps, 0), b.unsqueeze(steps, 1))  # [S, S]: j > i
    tied = b.op.And(b.op.Equal(other, mine), b.unsqueeze(higher, 0))
    return b.op.Or(b.op.Less(other, mine), tied)


@in_section("wanted")
def _wanted(
    b: Body,
    seen: Seen,
    policy: ir.Value,
    masked: ir.Value,
    before: ir.Value,
    rank: ir.Value,
) -> ir.Value:
    """How many positions a row's policy would commit: up to the furthest that fits; [B] int32.

    `num_above` of `generate_mask_diffusion`; where none fits, the quota commits at least one
    (`tokens_to_commit`).
    """
    number = b.op.Add(rank, b.i32(1))
    earlier = b.op.And(before, b.unsqueeze(masked, 1))
    entropy_before = b.op.ReduceSum(
        b.op.Where(earlier, b.unsqueeze(seen.entropy, 1), b.f32(0.0)), b.i64([2]), keepdims=0
    )
    b.begin("cases")
    order = Order(b.cast(number, FLOAT), entropy_before)
    none = b.op.Mul(rank, b.i32(0))  # [B, S]: a maximum is taken of it
    cases = [
        none
        if rule.fits is None
        else b.op.Where(b.op.And(masked, rule.fits(b, seen, order)), number, b.i32(0))
        for rule in POLICY_RULES.values()
    ]
    return b.op.ReduceMax(_of_policy(b, policy, cases), b.i64([1]), keepdims=0)


@in_section("quota")
def _ceil_div(b: Body, n: ir.Value, steps_left: ir.Value) -> ir.Value:
    """ceil(n / steps_left), at least 1, both int32; steps_left below 1 counts as 1.

    `min_commit` and `remaining_steps` of `generate_mask_diffusion`: a row of n masked positions is
    done when its steps are. n + steps_left might overflow.
    """
    steps = b.op.Max(steps_left, b.i32(1))
    return b.op.Add(b.op.Div(b.op.Sub(n, b.i32(1)), steps), b.i32(1))
