"""Chooses tokens from logits on the host, and makes the seeds of the denoiser graph's noise.

The autoregressive modes sample here; mask diffusion samples inside its graph. Every random number
is a function of the request's seed and of a position, never of a generator's state, so that an
answer does not depend on the other requests of the batch.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

MASK_64 = (1 << 64) - 1
GOLDEN_GAMMA = 0x9E3779B97F4A7C15


def row_seed(seed: int, block_start: int, step: int) -> int:
    """Return the seed of one row of one denoiser call.

    Two rounds of splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
    generators", 2014): `mix(mix(seed) + block_start) + step`, mixed again, top 31 bits.

    Args:
        seed: Seed of the request, any integer; its low 64 bits count.
        block_start: Position of the block's first token in the sequence, prompt included.
        step: Number of earlier denoiser calls of the block.

    Returns:
        An integer from 0 to 2**31 - 1.
    """
    return _keyed(seed, block_start, step) >> 33


def uniform(seed: int, position: int) -> float:
    """Return the uniform number in [0, 1) that a request draws at a position: 53 random bits."""
    return (_keyed(seed, position, -1) >> 11) * 2.0**-53


def sample(
    logits: npt.NDArray[np.float32],
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    position: int,
) -> int:
    """Choose the next token: the largest logit, or a draw from the filtered distribution.

    Args:
        logits: (vocab,) float32, without NaN.
        temperature: 0 or less for the largest logit (lowest index of equals).
        top_k: Keep the k most likely tokens; 0 keeps all.
        top_p: Keep the most likely tokens up to this mass; 1 keeps all.
        seed: Seed of the request.
        position: Position of the token in the sequence.
    """
    if temperature <= 0:
        return int(np.argmax(logits))
    probabilities = filtered_probabilities(logits, temperature, top_k, top_p)
    cumulative = np.cumsum(probabilities)
    # the sum may end a rounding error away from 1, so the draw is scaled to it
    drawn = np.searchsorted(cumulative, uniform(seed, position) * cumulative[-1], side="right")
    # a draw within rounding of the end must not fall on a trailing token of no probability
    return int(min(drawn, np.flatnonzero(probabilities)[-1]))


def likeliest(
    logits: npt.NDArray[np.float32], token: int, count: int
) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Return the log-probability of a token, and id and log-probability of the most likely ones.

    Args:
        logits: (vocab,) float32.
        token: The token that was chosen.
        count: Number of the most likely tokens; of equals the lowest ids.
    """
    shifted = logits.astype(np.float64) - logits.max()
    log_p = shifted - np.log(np.exp(shifted).sum())
    if not count:
        return float(log_p[token]), ()
    count = min(count, log_p.size)
    likely = np.flatnonzero(log_p >= np.partition(log_p, -count)[-count])
    order = likely[np.argsort(-log_p[likely], kind="stable")][:count]
    return float(log_p[token]), tuple((int(one), float(log_p[one])) for one in order)


def filtered_probabilities(
    logits: npt.NDArray[np.float32], temperature: float, top_k: int, top_p: float
) -> npt.NDArray[np.float64]:
    """Return softmax(logits / temperature) restricted to top-k, then to the nucleus of top-p.

    As NVIDIA's `generate_ar`: top-k keeps every probability that is not below the k-th largest, so
    ties are all kept; the nucleus drops a token when the mass *before* it already exceeds `top_p`.
    Equal probabilities enter the nucleus lowest index first.

    Args:
        logits: (vocab,) float32.
        temperature: More than 0.
        top_k: 0 for no restriction.
        top_p: 1 for no restriction.

    Returns:
        (vocab,) float64 that sums to 1.
    """
    scaled = logits.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    probabilities: npt.NDArray[np.float64] = weights / weights.sum()
    if 0 < top_k < probabilities.size:
        least = np.partition(probabilities, -top_k)[-top_k]
        probabilities = np.where(probabilities >= least, probabilities, 0.0)
        probabilities /= probabilities.sum()
    if top_p < 1:
        order = np.argsort(-probabilities, kind="stable")
        ordered = probabilities[order]
        before = np.cumsum(ordered) - ordered
        probabilities[order[before > top_p]] = 0.0
        probabilities /= probabilities.sum()
    return probabilities


def _keyed(seed: int, first: int, second: int) -> int:
    """Return 64 mixed bits of three integers."""
    return _mix(_keyed_pair(seed, first) + second)


@functools.lru_cache(maxsize=1024)  # a block asks for its own at each step
def _keyed_pair(seed: int, first: int) -> int:
    return _mix(_mix(seed) + first)


def _mix(value: int) -> int:
    """Return the next output of splitmix64 from a state."""
    value = (value + GOLDEN_GAMMA) & MASK_64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK_64
    return value ^ (value >> 31)
