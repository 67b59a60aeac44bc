"""Quantized matrices: the tensors that a checkpoint stores for one, and how to tell them.

FP8 and NVFP4 lie as NVIDIA's ModelOpt writes them (`modelopt/torch/export`), INT4 as the format
`pack-quantized` of compressed-tensors, which vLLM reads. A matrix has the shape [out, in]; its name
is that of the unquantized tensor, `X.weight`.

- `fp8`: codes [out, in] in E4M3 and one float32 scale.
- `nvfp4`: two E2M1 codes per byte, the lower half first; an E4M3 scale for each 16 weights of a
  row, and one float32 scale of the scales.
- `int4`: eight codes per int32, the lowest bits first, each 8 more than the weight's integer; a
  scale for each group of a row's weights.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from typing import Any, Final, Literal

from twotower_contract.bfloat16 import from_bfloat16
from twotower_contract.errors import ConfigError

Format = Literal["fp8", "nvfp4", "int4"]
Shape = tuple[int, ...]

HF_QUANT_FILE: Final = "hf_quant_config.json"
"""ModelOpt's settings, beside the `quantization_config` of `config.json`."""

FORMATS: Final[tuple[Format, ...]] = ("fp8", "nvfp4", "int4")

NVFP4_BLOCK: Final = 16
"""Weights of a row that share an E4M3 scale."""

INT4_GROUPS: Final = (128, 64, 32, 16)
"""Numbers of weights that may share a scale; the released sizes are multiples of 64, not 128."""

INT4_OFFSET: Final = 8
"""Added to an integer of -8 to 7 to make its code."""

E2M1: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of the codes 0 to 7; bit 3 of a code is the sign."""

E2M1_MAX: Final = 6.0
E4M3_MAX: Final = 448.0

FORMAT_OF_DTYPE: Final[Mapping[str, Format]] = {"F8_E4M3": "fp8", "U8": "nvfp4", "I32": "int4"}
"""Formats by the dtype of the codes."""

CODES_PER_WORD: Final = 8
"""Codes of 4 bits in 32, the lowest bits first."""

WEIGHTS_PER_ITEM: Final[Mapping[str, int]] = {"U8": 2, "I32": CODES_PER_WORD}
"""Weights in one element of the codes, where there are several."""

QUANTIZED_DTYPES: Final = (*FORMAT_OF_DTYPE, "I64")
"""Dtypes that a checkpoint may hold for quantized matrices: codes, scales, and a shape."""

SCALE_DTYPES: Final = ("BF16", "F32")
"""Dtypes of the scales of `int4`."""

PACKED: Final = "_packed"
"""End of the name of `int4` codes, after the matrix's own."""

IGNORED: Final = ("input_scale", "k_scale", "v_scale")
"""Scales of activations and caches, which are not quantized here."""


ALGORITHMS: Final = ("FP8", "NVFP4", "W4A16_NVFP4", "MIXED_PRECISION")
"""ModelOpt's names of the formats that are read; NVFP4 adds scales of activations to W4A16."""

_BESIDE: Final = (
    *("weight_scale", "weight_scale_2", "weight_shape"),
    *(f".{name}" for name in IGNORED),
)
"""Ends of the names of what lies beside a matrix's codes."""


def e4m3_value(code: int) -> float:
    """Return the number that a byte means in E4M3 (sign, 4 bits of exponent, 3 of mantissa).

    It has no infinities; 0x7F and 0xFF are NaN.
    """
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    small = mantissa * 2.0**-9
    magnitude = small if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    return -magnitude if sign else magnitude


def check_quantization_config(value: Any, source: str) -> None:
    """Refuse a `quantization_config` of another format than those that are read here.

    Raises:
        ConfigError: Names its value, and what is read.
    """
    if value is None:
        return
    settings = value if isinstance(value, dict) else {}
    if settings.get("quant_method") == "modelopt" and settings.get("quant_algo") in ALGORITHMS:
        return
    groups = settings.get("config_groups")
    weights = [one.get("weights") for one in groups.values()] if isinstance(groups, dict) else []
    is_packed = settings.get("format") == "pack-quantized" and all(
        isinstance(one, dict) and one.get("num_bits") == 4 and one.get("symmetric") is True
        for one in weights
    )
    if not is_packed or settings.get("quant_method") != "compressed-tensors":
        raise ConfigError(
            f"{source}: quantization_config is {value!r:.120}, but only ModelOpt's "
            f"{', '.join(ALGORITHMS)} and symmetric 4-bit pack-quantized of compressed-tensors are "
            "read; take the BF16 weights, and `twotower quantize` them"
        )


def is_quantizable(name: str) -> bool:
    """Whether a tensor is a matrix of a product, which a format can hold; by its name."""
    return name.endswith(("_proj.weight", "lm_head.weight"))


def codes_name(matrix: str, stored: Container[str]) -> str:
    """Return the name of the tensor that holds a matrix or its codes, among those stored."""
    packed = matrix + PACKED
    return packed if packed in stored and matrix not in stored else matrix


def matrix_name(codes: str) -> str:
    """Return the name of the matrix that a tensor's codes are of; any other name as it is."""
    return codes.removesuffix(PACKED)


def scale_names(codes: str, dtype: str) -> tuple[str, ...]:
    """Return the names of the scales of a tensor; none where it is no tensor of codes.

    Args:
        codes: The tensor's name.
        dtype: Its stored dtype.
    """
    name = matrix_name(codes)
    match FORMAT_OF_DTYPE.get(dtype) if name.endswith(".weight") else None:
        case None:
            return ()
        case "nvfp4":
            return (f"{name}_scale", f"{name}_scale_2")
        case _:
            return (f"{name}_scale",)


def tensors_of(name: str, stored: Container[str]) -> list[str]:
    """Return the stored tensors that one of the model's is made of, and those beside it."""
    beside = (f"{name}_scale", f"{name}_scale_2", f"{name}_shape", *ignored_names(name))
    return [codes_name(name, stored), *(one for one in beside if one in stored)]


def ignored_names(matrix: str) -> tuple[str, ...]:
    """Return the names of the tensors that may lie beside a matrix and say nothing about it."""
    module = matrix.removesuffix(".weight")
    return tuple(f"{module}.{end}" for end in IGNORED)


def unpacked_shape(dtype: str, shape: Shape) -> Shape:
    """Return the shape of the weights of a tensor, which packed codes multiply along the row."""
    count = WEIGHTS_PER_ITEM.get(dtype, 1)
    return (*shape[:-1], shape[-1] * count) if shape else shape


def input_forms(
    name: str, dtype: str, shape: Shape, computed: str, group: int = 0
) -> dict[str, tuple[str, Shape]]:
    """Return the inputs that a native graph has for a weight, dtype and shape by name.

    FP8 codes lie as [in, out], where TensorRT dequantizes them inside of the product; the scale of
    each matrix comes in the dtype that is computed in. Codes of 4 bits lie as they are stored, in
    words of 32 bits: TensorRT's plugins take no bytes. So do the E4M3 scales of `nvfp4`, one row
    after the other.

    Args:
        name: The weight's input.
        dtype: Stored dtype of its sources.
        shape: Its shape, [out, in] or [matrices, out, in] where it is quantized.
        computed: Dtype that the graph computes in, `BF16` or `F32`.
        group: Weights of a row that share a scale in `int4`.

    Raises:
        ConfigError: The scales of a matrix do not fill words.
    """
    format_ = FORMAT_OF_DTYPE.get(dtype)
    if format_ is None:
        return {name: (dtype, shape)}
    *bank, out, into = shape
    if format_ == "fp8":
        return {
            name: (dtype, (*bank, into, out)),
            f"{name}_scale": (computed, tuple(bank)),
        }
    codes = ("I32", (*bank, out, into // CODES_PER_WORD))
    if format_ == "int4":
        return {name: codes, f"{name}_scale": (computed, (*bank, out, into // group))}
    words, rest = divmod(out * into, 4 * NVFP4_BLOCK)
    if rest:
        raise ConfigError(
            f"{name}: a matrix of {out} x {into} has {out * into // NVFP4_BLOCK} E4M3 scales, "
            "which is no multiple of 4; quantize it to int4 or fp8"
        )
    return {
        name: codes,
        f"{name}_scale": ("I32", (*bank, words)),
        f"{name}_scale_2": ("F32", tuple(bank)),
    }


def decode(numpy: Any, dtype: str, codes: Any, scales: Sequence[Any]) -> Any:
    """Return the weights of a matrix in float32, [out, in].

    Args:
        numpy: The module, which the contract does not import.
        dtype: Stored dtype of the codes.
        codes: As they are stored: uint8 or int32.
        scales: As they are stored, in the order of `scale_names`; bfloat16 as the bits in uint16.

    Raises:
        ValueError: A scale of a block is negative or no number.
    """
    e4m3 = numpy.array([e4m3_value(code) for code in range(256)], numpy.float32)
    if dtype == "F8_E4M3":
        return numpy.take(e4m3 * scales[0].reshape(()), codes)
    if dtype == "U8":
        block = e4m3[scales[0]] * scales[1].reshape(())
        values = [*E2M1, *(-one for one in E2M1)]
    else:
        codes = codes.view(numpy.uint8)
        block = from_bfloat16(scales[0]) if scales[0].dtype == numpy.uint16 else scales[0]
        values = [code - INT4_OFFSET for code in range(16)]
    if not (block >= 0).all():
        raise ValueError("a scale of a block is negative or no number")
    pairs = numpy.array([(values[b & 15], values[b >> 4]) for b in range(256)], numpy.float32)
    weights = numpy.take(pairs, codes, axis=0).reshape(*block.shape, -1)
    weights *= block[..., None]
    return weights.reshape(codes.shape[0], -1)


def weights_in(name: str, dtype: str, shape: Shape) -> int:
    """Return how many of the model's weights a tensor holds; a scale and a shape hold none."""
    return 0 if name.endswith(_BESIDE) else math.prod(unpacked_shape(dtype, tuple(shape)))


def stored_tensors(
    format_: Format, matrix: str, shape: Shape, group: int, scale_dtype: str = "BF16"
) -> dict[str, tuple[str, Shape]]:
    """Return dtype and shape of the tensors of a quantized matrix, in the order of their writing.

    Args:
        format_: The format.
        matrix: The matrix's name, `X.weight`.
        shape: Its shape, [out, in].
        group: Weights of a row that share a scale in `int4`.
        scale_dtype: Dtype of those scales.
    """
    out, into = shape
    if format_ == "fp8":
        return {matrix: ("F8_E4M3", shape), f"{matrix}_scale": ("F32", ())}
    if format_ == "nvfp4":
        return {
            matrix: ("U8", (out, into // 2)),
            f"{matrix}_scale": ("F8_E4M3", (out, into // NVFP4_BLOCK)),
            f"{matrix}_scale_2": ("F32", ()),
        }
    return {
        matrix + PACKED: ("I32", (out, into // 8)),
        f"{matrix}_scale": (scale_dtype, (out, into // group)),
        f"{matrix}_shape": ("I64", (2,)),
    }
