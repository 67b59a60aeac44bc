"""The released model's size through `inspect`, `export` and `verify`, as a user would.

126 GB of checkpoint as files of holes, in which every part that is verified is filled with random
weights, in both towers: 8 GB on the disk, for as long as the test runs. With TWOTOWER_RESULTS set
to a folder, what it took is written there.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import tempfile
from pathlib import Path

import pytest

from tests.support.measured import run_measured
from tests.support.sparse_checkpoint import FULL_TENSORS, fill_random, write_sparse_checkpoint

LAYERS = (0, 1, 5)
"""A Mamba, a MoE and an attention layer."""

PARTS = ("embeddings", *map(str, LAYERS), "head")
# 5.1 GB are one layer's experts; their down-projections lie there again, as the body takes them.
PEAK_BYTES = 9e9
SECONDS = 600


@pytest.fixture(scope="module")
def folder():
    """Removed at the end: pytest would keep the gigabytes of its last three runs."""
    with tempfile.TemporaryDirectory(prefix="twotower-full-size-") as name:
        yield Path(name)


@pytest.mark.slow
def test_the_full_size_model_is_inspected_exported_and_verified(folder):
    snapshot = write_sparse_checkpoint(folder / "cache")
    assert 7e9 < fill_random(snapshot, LAYERS) < 9e9
    bundle = folder / "bundle"
    inspected = run_measured("inspect", snapshot, "--json")
    exported = run_measured("export", snapshot, bundle, "--json")
    parts = [word for part in PARTS for word in ("--part", part)]
    verified = run_measured("verify", bundle, snapshot, *parts, "--json", timeout=SECONDS)
    print(write_figures(inspect=inspected, export=exported, verify=verified))

    assert json.loads(inspected.stdout)["tensors"] == FULL_TENSORS
    assert json.loads(exported.stdout)["towers"] == ["context", "denoiser"]
    result = json.loads(verified.stdout)
    assert result["passed"]
    names = ("embeddings", *(f"layers.{layer}" for layer in LAYERS), "head")
    expected = {
        (f"{tower}.{name}", precision)
        for tower in ("context", "denoiser")
        for name in names
        for precision in ("float32", "bfloat16")
    }
    assert {(tensor["part"], tensor["precision"]) for tensor in result["tensors"]} == expected
    computed = {
        (tensor["part"], tensor["precision"])
        for tensor in result["tensors"]
        if tensor["max_abs"] > 0
    }
    # Sums in another order differ in the last bit, but not where everything is zero.
    assert computed >= {
        (f"{tower}.{name}", "float32")
        for tower in ("context", "denoiser")
        for name in names
        if name != "embeddings"
    }
    assert verified.peak_bytes < PEAK_BYTES, f"{verified.peak_bytes / 1e9:.2f} GB"


def write_figures(**verbs):
    """Seconds and gigabytes of each verb, as JSON; to a file where one is wanted."""
    figures = {
        verb: {"seconds": round(took.seconds, 1), "peak_gb": round(took.peak_bytes / 1e9, 2)}
        for verb, took in verbs.items()
    }
    today = datetime.date.today().isoformat()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, no GPU"
    text = json.dumps({"date": today, "machine": machine, "parts": PARTS} | figures, indent=2)
    if wanted := os.environ.get("TWOTOWER_RESULTS"):
        (Path(wanted) / f"full-size-{today}.json").write_text(text + "\n", encoding="utf-8")
    return text
