"""The layout of quantized matrices, decoded a second time with ml_dtypes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from twotower_contract.errors import ConfigError
from twotower_contract.quantized import (
    E2M1,
    check_quantization_config,
    codes_name,
    decode,
    e4m3_value,
    scale_names,
    stored_tensors,
    tensors_of,
    unpacked_shape,
    weights_in,
)

X = "context_tower.layers.1.mixer.up_proj.weight"


def test_every_e4m3_code_means_what_ml_dtypes_says():
    ours = np.array([e4m3_value(code) for code in range(256)], np.float32)
    theirs = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(ours, theirs)


def test_every_e2m1_code_means_what_ml_dtypes_says():
    theirs = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    np.testing.assert_array_equal([*E2M1, *(-value for value in E2M1)], theirs)


def random_arrays(format_, shape, group, seed=0):
    """Random bytes for each stored tensor, with scales that are numbers above 0."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, (dtype, size) in stored_tensors(format_, X, shape, group).items():
        if dtype == "F32":
            arrays[name] = np.float32(rng.uniform(0.01, 2.0)).reshape(size)
        elif dtype == "BF16":
            arrays[name] = (rng.uniform(0.1, 2, size).astype(np.float32).view("<u4") >> 16).astype(
                "<u2"
            )
        elif name.endswith("_scale"):
            arrays[name] = rng.integers(1, 127, size).astype(np.uint8)
        elif dtype == "F8_E4M3":  # all codes but the two that are no number
            codes = [code for code in range(256) if code & 0x7F != 0x7F]
            arrays[name] = rng.choice(codes, size).astype(np.uint8)
        elif dtype == "U8":
            arrays[name] = rng.integers(0, 256, size).astype(np.uint8)
        elif dtype == "I32":
            arrays[name] = rng.integers(-(2**31), 2**31, size).astype("<i4")
    return arrays


def decoded_apart(format_, arrays, group):
    """The same, written plainly with ml_dtypes' types and loops over rows."""
    names = list(arrays)
    codes = arrays[names[0]]
    scale = arrays[f"{X}_scale"]
    if format_ == "fp8":
        return codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    rows = []
    for row, scales in zip(codes.view(np.uint8).reshape(len(codes), -1), scale, strict=True):
        nibbles = np.array([half for byte in row for half in (byte & 15, byte >> 4)], np.uint8)
        if format_ == "nvfp4":
            values = nibbles.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
            steps = scales.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
            steps = steps * arrays[f"{X}_scale_2"]
        else:
            values = nibbles.astype(np.float32) - 8
            steps = scales.view(ml_dtypes.bfloat16).astype(np.float32)
        rows.append(values * np.repeat(steps, group))
    return np.array(rows)


@pytest.mark.parametrize(("format_", "group"), [("fp8", 0), ("nvfp4", 16), ("int4", 32)])
def test_matrices_decode_as_ml_dtypes_says(format_, group):
    arrays = random_arrays(format_, (6, 64), group)
    codes, *_ = arrays
    dtype = stored_tensors(format_, X, (6, 64), group)[codes][0]
    scales = [arrays[name] for name in scale_names(codes, dtype)]
    ours = decode(np, dtype, arrays[codes], scales)
    assert ours.shape == (6, 64) == unpacked_shape(dtype, arrays[codes].shape)
    np.testing.assert_array_equal(ours, decoded_apart(format_, arrays, group))


@pytest.mark.parametrize("code", [0x80 | 56, 0x7F])
def test_a_scale_that_is_negative_or_no_number_is_refused(code):
    arrays = random_arrays("nvfp4", (2, 32), 16)
    arrays[f"{X}_scale"][1, 1] = code
    scales = [arrays[f"{X}_scale"], arrays[f"{X}_scale_2"]]
    with pytest.raises(ValueError, match="a scale of a block is negative or no number"):
        decode(np, "U8", arrays[X], scales)


def test_names_and_counts():
    for format_, group in (("fp8", 0), ("nvfp4", 16), ("int4", 64)):
        stored = stored_tensors(format_, X, (32, 128), group)
        codes = codes_name(X, stored)
        assert {codes, *scale_names(codes, stored[codes][0])} <= set(stored)
        assert tensors_of(X, {*stored, "other"}) == list(stored)
        held = [weights_in(name, dtype, shape) for name, (dtype, shape) in stored.items()]
        assert sum(held) == held[0] == 32 * 128
    assert scale_names(X, "BF16") == scale_names(f"{X}_scale", "F8_E4M3") == ()


@pytest.mark.parametrize(
    "value",
    [
        {"quant_method": "fp8"},
        {"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ"},
        {"quant_method": "compressed-tensors", "format": "float-quantized"},
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"weights": {"num_bits": 4, "symmetric": False}}},
        },
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"weights": {"num_bits": 8, "symmetric": True}}},
        },
        [],
    ],
)
def test_other_quantizations_are_refused(value):
    with pytest.raises(ConfigError, match=r"config\.json: quantization_config is .* are read"):
        check_quantization_config(value, "config.json")
