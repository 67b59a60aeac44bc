"""FP8 weights on their way to a device: laid out as the compiler reads them without a copy."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import onnx
import pytest

from tests.support import host_device as host
from tests.support.checkpoint_files import random_tensors, write_checkpoint
from twotower_contract.layout import expected_tensors
from twotower_contract.quantized import scale_names
from twotower_engines.artifacts.engine_interface import interface_of
from twotower_engines.artifacts.weights import WeightStore
from twotower_engines.runtime.resident.upload import input_sizes, upload_weights
from twotower_export.bundle import write_bundle
from twotower_export.checkpoint import open_checkpoint
from twotower_export.quantization.recipe import default_recipe
from twotower_export.quantization.writing import quantize_checkpoint
from twotower_export.tiny.checkpoints import tiny_config

pytestmark = pytest.mark.usefixtures("quick_exports")


@pytest.mark.parametrize("window", [4096, 1 << 20])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_upload_lays_fp8_matrices_out_for_the_compiler(tmp_path, window, dtype):
    """Codes as [in, out], a scale of each matrix in the model's dtype; the graph says the same."""
    config = tiny_config("ME", hidden=32, dtype=dtype)
    every = tuple(expected_tensors(config)) if dtype == "float32" else ()
    tensors = random_tensors(config, float32=every)
    source = open_checkpoint(write_checkpoint(tmp_path / "source", config, tensors))
    quantize_checkpoint(source, tmp_path / "fp8", default_recipe(source, "fp8"))
    manifest = write_bundle(open_checkpoint(tmp_path / "fp8"), tmp_path / "bundle")
    graph = onnx.load(tmp_path / "bundle" / manifest.graph("native", "context").file).graph
    sizes = {one.name: [d.dim_value for d in one.type.tensor_type.shape.dim] for one in graph.input}
    store = WeightStore(manifest)
    device = host.HostDevice()  # which holds the memory
    addresses = upload_weights(store, "context", device, window=window)
    assert set(addresses) <= set(sizes)
    narrow = [one for one in manifest.weights["context"].values() if one.format == "fp8"]
    assert len(narrow) == 2 + 4
    for weight in narrow:
        codes, scales = input_sizes(manifest, weight)
        there = host.view(addresses[codes], math.prod(sizes[codes])).reshape(sizes[codes])
        stored = np.stack([store.raw(one) for one in weight.sources])
        np.testing.assert_array_equal(there, stored.reshape(weight.shape).swapaxes(-1, -2))
        wanted = np.stack([store.raw(f"{one}_scale") for one in weight.sources])
        item = np.float32 if dtype == "float32" else ml_dtypes.bfloat16
        count = len(weight.sources) * np.dtype(item).itemsize
        given = host.view(addresses[scales], count).view(item).astype(np.float32)
        np.testing.assert_array_equal(given, wanted)  # a scale that was searched is exact in both
        assert sizes[scales] == ([len(wanted)] if weight.how == "stack" else [])


@pytest.mark.parametrize(
    ("format_", "dtype"), [("int4", "bfloat16"), ("nvfp4", "bfloat16"), ("int4", "float32")]
)
def test_upload_brings_codes_of_4_bits_as_they_are_stored(tmp_path, format_, dtype):
    """In the types and shapes of the graph, and of what an engine's interface must be."""
    config = tiny_config("ME", hidden=64, dtype=dtype)
    every = tuple(expected_tensors(config)) if dtype == "float32" else ()
    tensors = random_tensors(config, float32=every)
    source = open_checkpoint(write_checkpoint(tmp_path / "source", config, tensors))
    quantize_checkpoint(source, tmp_path / "out", default_recipe(source, format_))
    manifest = write_bundle(open_checkpoint(tmp_path / "out"), tmp_path / "bundle")
    graph = onnx.load(tmp_path / "bundle" / manifest.graph("native", "context").file).graph
    types = {one.name: one.type.tensor_type for one in graph.input}
    interface = interface_of(manifest, "context").inputs
    assert set(interface) == set(types)
    store, device = WeightStore(manifest), host.HostDevice()
    addresses = upload_weights(store, "context", device, window=4096)
    narrow = [one for one in manifest.weights["context"].values() if one.format == format_]
    assert len(narrow) == 2 + 4
    for weight in narrow:
        stored = [(one, *scale_names(one, weight.dtype)) for one in weight.sources]
        sizes = input_sizes(manifest, weight)
        for (name, size), parts in zip(sizes.items(), zip(*stored, strict=True), strict=True):
            shape = tuple(dim.dim_value for dim in types[name].shape.dim)
            kind = onnx.TensorProto.DataType.Name(types[name].elem_type)
            assert interface[name].shape == shape
            assert interface[name].dtype == {"BFLOAT16": "BF16"}.get(kind, kind)
            item = 2 if kind == "BFLOAT16" else 4
            assert size == item * math.prod(shape)
            wanted = b"".join(store.raw(one).tobytes() for one in parts)
            assert host.view(addresses[name], size).tobytes() == wanted
