"""Quantized checkpoints as ModelOpt writes them, by hand: the layout of the released Nano files."""

from __future__ import annotations

import math
from pathlib import Path

import ml_dtypes
import numpy as np

from tests.support.checkpoint_files import RawTensor, random_tensors, write_checkpoint
from twotower_contract.config import ModelConfig

SETTINGS = {"quant_method": "modelopt", "quant_algo": "NVFP4", "producer": {"name": "modelopt"}}


def as_modelopt(name: str, tensor: RawTensor, algorithm: str) -> dict[str, RawTensor]:
    """A matrix in FP8 or NVFP4 by ModelOpt's formulas, with the scales that lie beside it."""
    bits = np.frombuffer(tensor.data, ml_dtypes.bfloat16).reshape(tensor.shape)
    weights = bits.astype(np.float32)
    largest = np.abs(weights).max()
    scalar = np.float32(largest / (448 if algorithm == "FP8" else 6 * 448))
    module = name.removesuffix(".weight")
    beside = {f"{module}.input_scale": RawTensor("F32", (), np.float32(0.5).tobytes())}
    if algorithm == "FP8":
        codes = (weights / scalar).astype(ml_dtypes.float8_e4m3fn)
        return {
            name: RawTensor("F8_E4M3", tensor.shape, codes.tobytes()),
            f"{name}_scale": RawTensor("F32", (), scalar.tobytes()),
            **beside,
        }
    blocks = weights.reshape(len(weights), -1, 16)
    scales = (np.abs(blocks).max(-1) / (6 * scalar)).astype(ml_dtypes.float8_e4m3fn)
    steps = scales.astype(np.float32)[..., None] * scalar
    codes = (blocks / steps).astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & 15
    codes = codes.reshape(len(weights), -1)
    packed = codes[:, 0::2] | codes[:, 1::2] << 4
    return {
        name: RawTensor("U8", packed.shape, packed.tobytes()),
        f"{name}_scale": RawTensor("F8_E4M3", scales.shape, scales.tobytes()),
        f"{name}_scale_2": RawTensor("F32", (), scalar.tobytes()),
        **beside,
    }


def write_nano(folder: Path, config: ModelConfig, algorithm: str, seed: int = 0) -> Path:
    """A single-tower checkpoint with the base model's names, experts and Mamba quantized."""
    tensors: dict[str, RawTensor] = {}
    for name, tensor in random_tensors(config, seed, ("context",), base=True).items():
        is_narrow = name.endswith("_proj.weight") and ".q_proj" not in name
        is_attention = any(f".{one}_proj" in name for one in "qkvo")
        if is_narrow and not is_attention and math.prod(tensor.shape) > 1:
            tensors |= as_modelopt(name, tensor, algorithm)
        else:
            tensors[name] = tensor
    attention = config.layers_of_kind["*"][0]
    scale = RawTensor("F32", (), np.float32(1).tobytes())
    tensors[f"backbone.layers.{attention}.mixer.k_proj.k_scale"] = scale
    tensors[f"backbone.layers.{attention}.mixer.v_proj.v_scale"] = scale
    settings = SETTINGS | {"quant_algo": algorithm}
    return write_checkpoint(folder, config, tensors, quantization_config=settings)
