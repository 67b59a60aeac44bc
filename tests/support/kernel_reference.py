"""The three ops in NumPy and float64, written from their definitions, slowly and plainly.

Nothing here is shared with the kernels or with the ONNX functions. Where an op rounds to its type T
on the way, `rounded` does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import ml_dtypes
import numpy as np

PRIME = 2**31 - 1


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """x rounded to T and back to float64; T is "bf16" or "fp32"."""
    kind = ml_dtypes.bfloat16 if dtype == "bf16" else np.float32
    return x.astype(np.float32).astype(kind).astype(np.float64)


def gumbel(seed: int, position: int, token: int) -> float:
    """Noise of one token at one position, by Python's integers."""
    first = pow((seed + 1 + 7919 * (position + 1)) % PRIME, 5, PRIME)
    second = pow((first + 104729) % PRIME, 5, PRIME)
    mixed = pow((pow((token + first) % PRIME, 5, PRIME) + second) % PRIME, 5, PRIME)
    uniform = (mixed // 256 + 0.5) * 2.0**-23
    return -math.log(-math.log(uniform))


@dataclass
class Row:
    """What one row of a batch asks for."""

    length: int
    threshold: float = 0.9
    steps_left: int = 16
    temperature: float = 0.0
    policy: int = 0
    seed: int = 0


def refine_row(
    logits: np.ndarray, ids: np.ndarray, row: Row, mask_id: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """One row: logits [S, V], ids [S] -> new ids, confidence, committed, still masked."""
    S, V = logits.shape
    masked = [i for i in range(S) if i < row.length and ids[i] == mask_id]
    new_ids, committed = ids.copy(), np.zeros(S, dtype=np.int32)
    confidence = np.full(S, np.inf)
    prediction, entropy, broken = {}, {}, False
    for i in masked:
        x = {v: float(logits[i, v]) for v in range(V) if v != mask_id}
        peak = max(x.values())
        if any(math.isnan(v) for v in x.values()) or math.isinf(peak):
            confidence[i], broken = math.nan, True
            continue
        total = sum(math.exp(v - peak) for v in x.values())
        entropy[i] = math.log(total)
        entropy[i] -= sum(math.exp(v - peak) * max(v - peak, -1e12) for v in x.values()) / total
        score = x
        if row.temperature > 0:
            score = {v: x[v] / row.temperature + gumbel(row.seed, i, v) for v in x}
        best = max(score.values())
        prediction[i] = min(v for v in score if score[v] == best)
        confidence[i] = math.exp(x[prediction[i]] - peak) / total
    if broken:
        return new_ids, confidence, committed, -1
    n = len(masked)
    order, k = _policy(row, masked, confidence, entropy)
    k = n if row.steps_left <= 1 else min(n, max(k, 1, math.ceil(n / row.steps_left)))
    for i in order[:k]:
        new_ids[i], committed[i] = prediction[i], 1
    return new_ids, confidence, committed, n - k


def _policy(
    row: Row, masked: list[int], confidence: np.ndarray, entropy: dict[int, float]
) -> tuple[list[int], int]:
    """Masked positions, first to be committed first, and how many the policy would commit."""
    bound, counts = row.threshold, range(1, len(masked) + 1)
    order = sorted(masked, key=lambda i: (-confidence[i], -i))
    if row.policy == 0:
        return order, sum(confidence[i] > bound for i in order)
    if row.policy == 1:
        return order, 0
    if row.policy == 2:
        fits = [k for k in counts if (k + 1) * (1 - confidence[order[k - 1]]) < bound]
        return order, max(fits, default=0)
    if row.policy == 3:
        order = sorted(masked, key=lambda i: (entropy[i], -i))
        fits = [k for k in counts if sum(entropy[i] for i in order[: k - 1]) <= bound]
        return order, max(fits, default=0)
    if row.policy == 4:
        return masked, 0
    raise ValueError(f"no policy {row.policy}")


def sparse_experts(
    x: np.ndarray,
    indices: np.ndarray,
    weights: np.ndarray,
    up: np.ndarray,
    down: np.ndarray,
    dtype: str,
) -> np.ndarray:
    """y = sum over k of weight * down(relu(up x)^2); rounded to T before the square and after."""
    y = np.zeros_like(x)
    for n, k in np.ndindex(indices.shape):
        expert = indices[n, k]
        if expert < 0:
            continue
        inner = rounded(rounded(np.maximum(up[expert] @ x[n], 0.0), dtype) ** 2, dtype)
        y[n] += weights[n, k] * (down[expert] @ inner)
    return y


def mamba_block_step(
    projected: np.ndarray,
    conv_state: np.ndarray,
    ssm_state: np.ndarray,
    lengths: np.ndarray,
    conv_weight: np.ndarray,
    conv_bias: np.ndarray,
    dt_bias: np.ndarray,
    A_log: np.ndarray,
    D: np.ndarray,
    norm_weight: np.ndarray,
    n_groups: int,
    epsilon: float,
    dtype: str,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token by token: the recurrence itself. y is 0 past a row's length."""
    B, L, _ = projected.shape
    H, P, N = ssm_state.shape[1:]
    d_inner, conv_dim = H * P, conv_state.shape[2]
    y = np.zeros((B, L, d_inner))
    conv_state, ssm_state = conv_state.copy(), ssm_state.copy()
    for b in range(B):
        for t in range(min(int(lengths[b]), L)):
            z, raw, dt = np.split(projected[b, t], [d_inner, d_inner + conv_dim])
            window = np.concatenate([conv_state[b], raw[None]])  # [4, conv_dim], newest last
            conv_state[b] = window[1:]
            conv = conv_bias + (window * conv_weight.T).sum(axis=0)
            conv = rounded(conv / (1 + np.exp(-conv)), dtype)
            x, b_, c_ = np.split(conv, [d_inner, d_inner + n_groups * N])
            x = x.reshape(H, P)
            b_ = np.repeat(b_.reshape(n_groups, N), H // n_groups, axis=0)
            c_ = np.repeat(c_.reshape(n_groups, N), H // n_groups, axis=0)
            step = np.logaddexp(0.0, dt + dt_bias)
            decay = np.exp(-np.exp(A_log) * step)
            ssm_state[b] *= decay[:, None, None]
            ssm_state[b] += (step[:, None] * x)[:, :, None] * b_[:, None, :]
            out = (ssm_state[b] * c_[:, None, :]).sum(axis=2) + D[:, None] * x
            gated = rounded(out.reshape(-1), dtype) * (z / (1 + np.exp(-z)))
            groups = gated.reshape(n_groups, -1)
            scale = np.sqrt((groups**2).mean(axis=1, keepdims=True) + epsilon)
            y[b, t] = (groups / scale).reshape(-1) * norm_weight
    return y, conv_state, ssm_state
