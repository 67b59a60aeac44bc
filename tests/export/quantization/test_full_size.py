"""A layer of each kind in the released size: quantized in bounded memory, errors as expected."""

from __future__ import annotations

import json

import pytest

from tests.support.measured import run_measured
from tests.support.sparse_checkpoint import FULL_CONFIG, fill_random, write_sparse_checkpoint
from twotower_export.checkpoint import open_checkpoint
from twotower_export.quantization.recipe import default_recipe

PATTERN = "MM*E"
PEAK_BYTES = 2e9
ERRORS = {"fp8": 0.028, "nvfp4": 0.084, "int4": 0.098}
"""Relative RMS of normal weights with searched scales, rounded up."""


@pytest.fixture(scope="module")
def layers(tmp_path_factory):
    values = FULL_CONFIG | {
        "hybrid_override_pattern": PATTERN,
        "num_hidden_layers": len(PATTERN),
        "vocab_size": 4096,
    }
    snapshot = write_sparse_checkpoint(tmp_path_factory.mktemp("hub"), values, shards=3)
    fill_random(snapshot, tuple(range(len(PATTERN))))
    return snapshot


@pytest.mark.slow
@pytest.mark.parametrize(
    "format_", ["fp8", "int4", pytest.param("nvfp4", marks=pytest.mark.nightly)]
)
def test_a_layer_of_each_kind(layers, tmp_path, format_):
    done = run_measured(
        "quantize", layers, tmp_path / "out", "--format", format_, "--json", timeout=900
    )
    report = json.loads(done.stdout)
    assert done.peak_bytes < PEAK_BYTES, f"{done.peak_bytes / 1e9:.2f} GB"
    for part in report["parts"]:
        assert 0.02 < part["relative_rms"] < ERRORS[format_], part
    wanted = default_recipe(open_checkpoint(layers), format_).formats
    assert sum(part["matrices"] for part in report["parts"]) == len(wanted) == 2 * (2 + 2 * 129)
    print(format_, report["megabytes_per_second"], "MB/s,", f"{done.peak_bytes / 1e9:.2f} GB")
