"""Random banks of 8 and 4 bits, and what they mean by `ml_dtypes`, which knows nothing of ours."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import torch

import tests.support.kernel_reference as reference
from tests.support.kernel_launches import Bank


def decoded(codes: np.ndarray, form: str) -> np.ndarray:
    """What the codes of a bank mean without their scales, float64."""
    if form == "fp8":
        return codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    nibbles = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], -1)
    if form == "int4":
        return nibbles.astype(np.float64) - 8
    return nibbles.view(ml_dtypes.float4_e2m1fn).astype(np.float64)


def words(tensor: torch.Tensor) -> torch.Tensor:
    """Bytes as words of 32 bits; the last axis must have a multiple of four."""
    return tensor.contiguous().view(torch.int32)


def as_given(bank: Bank) -> list[torch.Tensor]:
    """A bank as a graph's inputs have it, and so its plugins."""
    if bank.form == "fp8":
        return [bank.codes.view(torch.float8_e4m3fn), bank.scale]
    if bank.form == "int4":
        return [words(bank.codes), bank.scale]
    return [words(bank.codes), words(bank.scale.flatten(1)), bank.scale_2]


def draw_bank(
    generator: np.random.Generator, form: str, shape: tuple[int, int, int], group: int
) -> tuple[Bank, np.ndarray]:
    """A bank of random codes, all but E4M3's NaN, and its weights in float64."""
    E, features, depth = shape
    if form == "fp8":
        codes = generator.integers(0, 256, (E, depth, features)).astype(np.uint8)
        codes[(codes & 0x7F) == 0x7F] = 0x7E
        scale = torch.from_numpy(generator.uniform(0.5, 2, E) / 2000).bfloat16()
        weights = decoded(codes, form).transpose(0, 2, 1) * scale.double().numpy()[:, None, None]
        return Bank(torch.from_numpy(codes), form, scale), weights
    codes = generator.integers(0, 256, (E, features, depth // 2)).astype(np.uint8)
    groups = (E, features, depth // group)
    if form == "int4":
        scale = torch.from_numpy(generator.uniform(0.01, 0.05, groups)).bfloat16()
        each = scale.double().numpy().repeat(group, axis=2)
        weights = reference.rounded(decoded(codes, form) * each, "bf16")
        return Bank(torch.from_numpy(codes), form, scale), weights
    bytes_ = generator.integers(1, 0x7F, groups).astype(np.uint8)  # from the least to the largest
    factor = generator.uniform(1, 2, E).astype(np.float32) / 500
    each = bytes_.view(ml_dtypes.float8_e4m3fn).astype(np.float64).repeat(group, axis=2)
    weights = decoded(codes, form) * each * factor[:, None, None].astype(np.float64)
    scales = torch.from_numpy(bytes_), torch.from_numpy(factor)
    return Bank(torch.from_numpy(codes), form, *scales), weights
