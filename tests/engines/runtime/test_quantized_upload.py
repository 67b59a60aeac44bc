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
from twotower_engines.artifacts.weights import WeightStore
from twotower_engines.runtime.resident.upload import input_sizes, upload_weights
from twotower_export.bundle import write_bundle
from twotower_export.checkpoint import open_checkpoint
from twotower_export.quantization.recipe import default_recipe
from twotower_export.quantization.writing import quantize_checkpoint
from twotower_export.tiny.checkpoints import tiny_config


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
