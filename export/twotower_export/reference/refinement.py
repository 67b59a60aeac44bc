"""One refinement step of a block in NumPy, float64: the rules, written as they are said.

Golden answers are made with it, and the graphs' `twotower::RefineBlock` is checked against it.
The rules are those of a step of NVIDIA's `generate_mask_diffusion`
(`modeling_nemotron_twotower.py`; policy `threshold`), with its variables named at each; `factor` is
Fast-dLLM's dynamic threshold (Wu et al. 2025, section 3.3), `entropy` the bound of EB-Sampler
(Ben-Hamu et al. 2025). `twotower_export.graph.refine` lists what differs from NVIDIA's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from twotower_contract.policies import POLICIES

Array = npt.NDArray[Any]

_PRIME: Final = 2**31 - 1


@dataclass(frozen=True)
class Rule:
    """How a row of a denoiser call is refined.

    Attributes:
        threshold: Confidence threshold; policy `factor`: the factor; `entropy`: the bound in nats.
        steps_left: Denoiser calls left for the block, this one included.
        temperature: Sampling temperature; 0 takes the most likely token.
        policy: One of `POLICIES`.
        seed: Seed of the Gumbel noise, 0 to 2**31 - 1.
    """

    threshold: float = 0.9
    steps_left: int = 1
    temperature: float = 0.0
    policy: str = "threshold"
    seed: int = 0


@dataclass(frozen=True)
class Refined:
    """A refined row.

    Attributes:
        ids: (block,) int32.
        confidence: (block,) float64; +inf where nothing was masked.
        committed: (block,) bool.
        still_masked: Positions still masked; -1 where the logits held a NaN.
    """

    ids: Array
    confidence: Array
    committed: Array
    still_masked: int


def refine(
    logits: Array,
    ids: Array,
    rule: Rule,
    *,
    mask_id: int,
    length: int | None = None,
    confidence: Array | None = None,
) -> Refined:
    """Predict every masked position and commit the most certain ones.

    Args:
        logits: (block, vocabulary), any float dtype.
        ids: (block,), the mask id where a token is still unknown.
        rule: How many are committed, and in which order.
        mask_id: The mask token; it is never predicted.
        length: Valid positions; all by default.
        confidence: (block,); where given, positions are ordered and counted by it. Confidences
            that are equal but for rounding order differently in another arithmetic: with the
            other's own confidences its decisions can be checked exactly.
    """
    ids = np.asarray(ids, np.int32)
    inside = np.arange(len(ids)) < (len(ids) if length is None else length)
    masked = np.flatnonzero(inside & (ids == mask_id))
    scores = np.array(logits, np.float64)
    scores[:, mask_id] = -np.inf  # `_mdlm_forward`, where it is -1e12
    certain = np.full(len(ids), np.inf)
    if np.isnan(scores[masked]).any():
        return Refined(ids, certain, np.zeros(len(ids), bool), -1)
    log_p = scores[masked] - _logsumexp(scores[masked])[:, None]
    # `predicted`: the most likely token, or Gumbel-max at the temperature (`_gumbel_sample`).
    predicted = ids.copy()
    noisy = scores[masked]
    if rule.temperature > 0:
        noisy = noisy / rule.temperature + gumbel(rule.seed, masked, scores.shape[1])
    predicted[masked] = noisy.argmax(axis=1)
    # `confidence`: of the unscaled distribution; infinite where a token is decided.
    certain[masked] = np.exp(np.take_along_axis(log_p, predicted[masked, None], 1)[:, 0])
    entropy = -(np.exp(log_p) * np.maximum(log_p, -1e12)).sum(axis=1)  # 0 * -inf is no number
    order, count = _order(rule, masked, certain if confidence is None else confidence, entropy)
    if rule.steps_left <= 1:  # `is_last_step`
        count = len(masked)
    else:  # `tokens_to_commit`: those above the threshold or one, `min_commit` at least
        count = min(len(masked), max(count, 1, math.ceil(len(masked) / rule.steps_left)))
    committed = np.zeros(len(ids), bool)
    committed[order[:count]] = True
    new_ids = np.where(committed, predicted, ids).astype(np.int32)
    return Refined(new_ids, certain, committed, len(masked) - count)


def gumbel(seed: int, positions: Array, vocabulary: int) -> Array:
    """Gumbel noise as a function of (seed, position, token), (positions, vocabulary) float64.

    A keyed permutation of the integers below 2**31 - 1 (x -> x^5 with round keys): no state, so
    an answer does not depend on what it is batched with.
    """
    first = _fifth_power((seed + 1 + 7919 * (positions.astype(np.int64) + 1)) % _PRIME)[:, None]
    second = _fifth_power((first + 104729) % _PRIME)
    token = np.arange(vocabulary, dtype=np.int64)
    mixed = _fifth_power((_fifth_power((token + first) % _PRIME) + second) % _PRIME)
    rest = (2**23 - mixed // 256 - 0.5) * 2.0**-23  # 1 - U
    noise: Array = -np.log(-np.log1p(-rest))
    return noise


def _order(rule: Rule, masked: Array, confidence: Array, entropy: Array) -> tuple[list[int], int]:
    """Masked positions, first to be committed first, and how many the policy asks for."""
    if rule.policy == "leftmost":
        return [int(i) for i in masked], 0
    if rule.policy == "entropy":
        # Equal ones: the later position first, as NVIDIA's stable ascending sort remasks the lower.
        ranked = sorted(range(len(masked)), key=lambda j: (entropy[j], -j))
        before = np.cumsum([0.0, *(entropy[j] for j in ranked)])[:-1]
        return [int(masked[j]) for j in ranked], int((before <= rule.threshold).sum())
    # `masked_conf.sort()`, ascending, stable on the CPU: its first ones are masked again, so of
    # equal confidences the later position is committed first.
    order = sorted((int(i) for i in masked), key=lambda i: (-confidence[i], -i))
    sorted_confidence = confidence[order]
    if rule.policy == "threshold":  # `num_above`: strictly
        return order, int((sorted_confidence > rule.threshold).sum())
    if rule.policy == "factor":
        ranks = np.arange(1, len(order) + 1)
        fits = np.flatnonzero((ranks + 1) * (1 - sorted_confidence) < rule.threshold)
        return order, int(fits[-1]) + 1 if fits.size else 0
    if rule.policy != "quota":
        raise ValueError(f"policy {rule.policy!r} is none of {', '.join(POLICIES)}")
    return order, 0


def _logsumexp(scores: Array) -> Array:
    top = scores.max(axis=1)
    total: Array = top + np.log(np.exp(scores - top[:, None]).sum(axis=1))
    return total


def _fifth_power(x: Array) -> Array:
    square = x * x % _PRIME
    made: Array = square * square % _PRIME * x % _PRIME
    return made
