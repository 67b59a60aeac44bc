"""The three ops in NumPy and float64, written from their definitions, slowly and plainly.

Nothing here is shared with the kernels or with the ONNX functions. Where an op rounds to its type T
on the way, `rounded` does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from tests.support.reference import refine
from twotower_contract.policies import POLICY_NAMES

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
    noise = None
    if row.temperature > 0:
        noise = np.array([[gumbel(row.seed, i, v) for v in range(V)] for i in range(S)])
    rule = row.threshold, row.steps_left, row.temperature, POLICY_NAMES[row.policy]
    return refine(logits, ids, *rule, noise, mask_id, row.length)


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
