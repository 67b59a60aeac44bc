"""Codes and scales: the nearest codes, the best of the scales, and those of NVIDIA's formulas."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from twotower_contract.quantized import E2M1, decode
from twotower_export.quantization.encoding import as_float32, encode

FORMATS = {"fp8": "F8_E4M3", "nvfp4": "U8", "int4": "I32"}
GROUP = 32


def weights(seed=0, shape=(24, 192), kind="plain"):
    """Bits of bfloat16: numbers of very different sizes, with blocks of zeros."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape).astype(np.float32) * 0.02
    if kind == "wild":
        values *= np.exp(3 * rng.standard_normal(shape)).astype(np.float32)
    values[0, :64] = 0
    values[1, 5] = -0.0
    return values.astype(ml_dtypes.bfloat16).view(np.uint16)


def decoded(format_, encoded):
    codes, *scales = encoded.arrays
    return decode(np, FORMATS[format_], codes, scales[:2] if format_ == "nvfp4" else scales[:1])


@pytest.mark.parametrize("kind", ["plain", "wild"])
@pytest.mark.parametrize("scales", ["search", "amax"])
@pytest.mark.parametrize("format_", FORMATS)
def test_the_reported_error_is_that_of_the_decoded_matrix(format_, scales, kind):
    bits = weights(kind=kind)
    encoded = encode(bits, format_, GROUP, scales)
    exact = as_float32(bits).astype(np.float64)
    error = ((decoded(format_, encoded) - exact) ** 2).sum()
    assert encoded.error == pytest.approx(error, rel=1e-5)
    assert encoded.energy == pytest.approx((exact**2).sum(), rel=1e-6)


@pytest.mark.parametrize("kind", ["plain", "wild"])
@pytest.mark.parametrize("format_", FORMATS)
def test_every_code_is_the_nearest_under_its_scale(format_, kind):
    bits = weights(1, kind=kind)
    encoded = encode(bits, format_, GROUP)
    exact = as_float32(bits).astype(np.float64)
    if format_ == "fp8":
        codes = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
        values, scale = codes[np.isfinite(codes)], np.full(exact.shape, float(encoded.arrays[1]))
    elif format_ == "nvfp4":
        values = np.array([*E2M1, *(-value for value in E2M1)])
        scale = encoded.arrays[1].view(ml_dtypes.float8_e4m3fn).astype(np.float64)
        scale = np.repeat(scale * float(encoded.arrays[2]), 16, axis=1)
    else:
        values = np.arange(-8.0, 8.0)
        scale = np.repeat(as_float32(encoded.arrays[1]).astype(np.float64), GROUP, axis=1)
    least = np.abs(values * scale[..., None] - exact[..., None]).min(-1)
    ours = np.abs(decoded(format_, encoded) - exact)
    np.testing.assert_allclose(ours, least, atol=1e-6 * np.abs(exact).max())


@pytest.mark.parametrize("format_", FORMATS)
def test_searched_scales_are_better_in_each_block(format_):
    bits = weights(2, (8, 256))
    exact = as_float32(bits)
    block = {"fp8": 8 * 256, "nvfp4": 16, "int4": GROUP}[format_]
    errors = {
        scales: ((decoded(format_, encode(bits, format_, GROUP, scales)) - exact) ** 2)
        .reshape(-1, block)
        .sum(-1)
        for scales in ("search", "amax")
    }
    assert (errors["search"] <= errors["amax"] * (1 + 1e-5)).all()
    assert errors["search"].sum() < 0.999 * errors["amax"].sum()


def test_fp8_of_amax_is_modelopts():
    """`FP8QTensor.quantize`: the scale is the largest weight over 448."""
    exact = as_float32(weights(3, kind="wild"))
    codes, scale = encode(weights(3, kind="wild"), "fp8", 0, "amax").arrays
    assert scale == np.abs(exact).max() / np.float32(448)
    theirs = (exact / scale).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    np.testing.assert_array_equal(codes, theirs)


def test_nvfp4_of_amax_is_modelopts():
    """`NVFP4QTensor.quantize`: largest weight over 6 x 448, then largest of the block over 6."""
    exact = as_float32(weights(4, kind="wild"))
    packed, scale, scale_2 = encode(weights(4, kind="wild"), "nvfp4", 0, "amax").arrays
    assert scale_2 == np.abs(exact).max() / np.float32(6 * 448)
    wanted = np.abs(exact).reshape(len(exact), -1, 16).max(-1) / (np.float32(6) * scale_2)
    wanted[wanted == 0] = 1
    wanted = np.clip(wanted, 2.0**-9, 448).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(scale, wanted.view(np.uint8))
    steps = np.repeat(wanted.astype(np.float32) * scale_2, 16, axis=1)
    codes = (exact / steps).astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & 15
    codes[(exact == 0) & (codes == 8)] = 0  # NVIDIA gives a sign to what is below 0 only
    np.testing.assert_array_equal(packed, codes[:, 0::2] | codes[:, 1::2] << 4)


def test_ties_go_to_the_even_code():
    """A block whose scale is exactly 1: the middles between neighbours."""
    middles = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0] * 2
    row = np.array([*middles, 6 * 448.0, *[0.0] * 15], np.float32)[None]
    packed, scale, scale_2 = encode(row, "nvfp4", 0, "amax").arrays
    assert (scale_2, scale[0, 0]) == (1, 56)  # E4M3's 1
    nibbles = np.stack([packed & 15, packed >> 4], -1).reshape(1, -1)[0, :8]
    np.testing.assert_array_equal([E2M1[code] for code in nibbles], [0, 1, 1, 2, 2, 4, 4, 6])


@pytest.mark.parametrize("format_", FORMATS)
def test_float32_weights_and_bfloat16_weights_give_the_same_codes(format_):
    bits = weights(5)
    narrow, wide = encode(bits, format_, GROUP), encode(as_float32(bits), format_, GROUP)
    if format_ == "int4":  # scales are stored as wide as the weights were
        assert wide.arrays[1].dtype == np.float32
        assert wide.error == pytest.approx(narrow.error, rel=0.01)
    else:
        for one, other in zip(narrow.arrays, wide.arrays, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("format_", FORMATS)
def test_zeros_stay_zeros(format_):
    encoded = encode(np.zeros((4, 64), np.uint16), format_, GROUP)
    assert (encoded.error, encoded.energy) == (0, 0)
    assert not decoded(format_, encoded).any()


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
@pytest.mark.parametrize("format_", FORMATS)
def test_what_is_no_finite_number_is_refused(format_, dtype, value):
    values = np.ones((4, 64), np.float32)
    values[2, 3] = value
    stored = values if dtype == np.float32 else values.astype(ml_dtypes.bfloat16).view(np.uint16)
    with pytest.raises(ValueError, match="infinite or not a number"):
        encode(stored, format_, GROUP)
