"""The functions that decode weights of 4 bits, on ONNX Runtime, against `ml_dtypes`."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto

from twotower_contract.errors import ConfigError
from twotower_contract.quantized import input_forms
from twotower_export.graph.body import DOMAIN, OPSET
from twotower_export.graph.quantized_weights import decoder

TYPES = {"I32": TensorProto.INT32, "F32": TensorProto.FLOAT, "BF16": TensorProto.BFLOAT16}
STORED = {"int4": "I32", "nvfp4": "U8"}


@pytest.mark.parametrize("computed", ["F32", "BF16"])
@pytest.mark.parametrize("shape", [(12, 80), (3, 20, 48), (1, 4, 16)])
@pytest.mark.parametrize(("format_", "group"), [("int4", 16), ("nvfp4", 16)])
def test_codes_are_decoded_and_rounded_once(format_, group, shape, computed):
    """Every bit of every weight; NaN codes of E4M3 have no meaning and are left out."""
    rng = np.random.default_rng(sum(shape))
    forms = input_forms("w", STORED[format_], shape, computed, group)
    codes = rng.integers(0, 16, shape).astype(np.uint8)
    given = {"w": packed(codes, 4).reshape(forms["w"][1])}
    if format_ == "int4":
        scale = rng.uniform(0.01, 2, forms["w_scale"][1])
        scale = scale.astype(ml_dtypes.bfloat16 if computed == "BF16" else np.float32)
        given["w_scale"] = scale
        exact = (codes.astype(np.float32) - 8) * scale.astype(np.float32).repeat(group, -1)
    else:
        blocks = (*shape[:-1], shape[-1] // 16)
        scale = rng.integers(0, 0x7F, blocks).astype(np.uint8)
        scale_2 = rng.uniform(0.5, 2, shape[:-2]).astype(np.float32)
        given |= {"w_scale": packed(scale, 8).reshape(forms["w_scale"][1]), "w_scale_2": scale_2}
        block = scale.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale_2[..., None, None]
        values = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
        exact = values * block.repeat(16, -1)
    assert {name: array.shape for name, array in given.items()} == {
        name: shape for name, (_, shape) in forms.items()
    }
    got = run(decoder(format_, ir.DataType(TYPES[computed])), forms, given, TYPES[computed])
    want = exact.astype(ml_dtypes.bfloat16) if computed == "BF16" else exact
    np.testing.assert_array_equal(got, want.astype(np.float32))


def test_scales_that_fill_no_words_are_refused():
    with pytest.raises(ConfigError, match=r"w: a matrix of 3 x 16 has 3 E4M3 scales"):
        input_forms("w", "U8", (3, 16), "BF16")


def packed(codes, bits):
    """Words of codes, the first one in the lowest bits."""
    words = codes.astype(np.uint32).reshape(-1, 32 // bits) << np.arange(0, 32, bits)
    return np.bitwise_or.reduce(words.astype(np.uint32), axis=1).view(np.int32)


def run(function, forms, given, to):
    """The function's result in float32."""
    helper = onnx.helper
    call = helper.make_node(function.name, list(forms), ["made"], domain=DOMAIN)
    wide = helper.make_node("Cast", ["made"], ["y"], to=TensorProto.FLOAT)
    inputs = [
        helper.make_tensor_value_info(name, TYPES[dtype], shape)
        for name, (dtype, shape) in forms.items()
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    graph = helper.make_graph([call, wide], "decoded", inputs, [output])
    proto = [ir.to_proto(function)]
    model = helper.make_model(graph, opset_imports=opsets, functions=proto, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    of = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type
    values = {
        name: of(array.view(np.uint16) if dtype == "BF16" else array, TYPES[dtype])
        for (name, array), (dtype, _) in zip(given.items(), forms.values(), strict=True)
    }
    (made,) = session.run_with_ort_values(["y"], values)
    return made.numpy()
