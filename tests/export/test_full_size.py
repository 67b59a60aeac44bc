"""The released model's size, as files of holes: inspected and exported within the promised bounds.

The checkpoint has the real names, shapes, headers and cache layout and no weights, so what is
measured is all that an export does: it never reads them.
"""

from __future__ import annotations

import json
import subprocess

import onnx
import pytest

from tests.support import TWOTOWER
from tests.support.measured import run_measured
from tests.support.sparse_checkpoint import FULL_TENSORS, HUB_ID, REVISION, write_sparse_checkpoint
from twotower_contract.manifest import read_manifest

SECONDS = 60
PEAK_BYTES = 2e9
ADDED_BYTES = 100e6
GRAPH_BYTES = 10e6


def twotower(*arguments):
    """What a verb printed as JSON, and what it took."""
    done = run_measured(*arguments, "--json")
    return json.loads(done.stdout), done


def disk_bytes(folder):
    """What the files take on the disk; holes take nothing, a link is not followed."""
    return sum(file.lstat().st_blocks * 512 for file in folder.rglob("*"))


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory):
    return write_sparse_checkpoint(tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="module")
def exported(snapshot, tmp_path_factory):
    out = tmp_path_factory.mktemp("full") / "bundle"
    return out, *twotower("export", snapshot, out)


def test_checkpoint_is_large_and_takes_no_room(snapshot):
    shards = list(snapshot.glob("*.safetensors"))
    assert len(shards) == 24
    assert all(shard.is_symlink() for shard in shards)
    assert sum(shard.stat().st_size for shard in shards) > 126e9
    assert disk_bytes(snapshot.parent.parent) < 20e6


def test_inspect(snapshot):
    found, done = twotower("inspect", snapshot)
    assert found["tensors"] == FULL_TENSORS
    assert found["shards"] == 24
    assert found["sizes"]["parameters"] == 63_185_902_848
    assert found["sizes"]["dtypes"] == {"BF16": FULL_TENSORS - 184, "F32": 184}
    assert (found["id"], found["revision"]) == (HUB_ID, REVISION)
    assert done.seconds < SECONDS
    assert done.peak_bytes < 500e6


def test_export_is_fast_and_small(exported):
    out, found, done = exported
    assert found["towers"] == ["context", "denoiser"]
    assert done.seconds < SECONDS, f"{done.seconds:.0f} s"
    assert done.peak_bytes < PEAK_BYTES, f"{done.peak_bytes / 1e9:.2f} GB"
    assert disk_bytes(out) < ADDED_BYTES
    graphs = list(out.rglob("*.onnx"))
    assert len(graphs) == 6
    assert all(graph.stat().st_size < GRAPH_BYTES for graph in graphs)


def test_bundle_names_every_tensor_once(exported):
    manifest = read_manifest(exported[0])
    assert (manifest.checkpoint.id, manifest.checkpoint.revision) == (HUB_ID, REVISION)
    used = [
        source
        for inputs in manifest.weights.values()
        for weight in inputs.values()
        for source in weight.sources
    ]
    assert len(used) == len(set(used)) == FULL_TENSORS
    assert set(used) == set(manifest.tensors)
    assert [len(inputs) for inputs in manifest.weights.values()] == [401, 459]


@pytest.mark.parametrize("precision", ["native", "float32"])
def test_graphs_are_valid_and_open_as_layers(exported, precision):
    """One node per layer on the top level, so that a viewer shows the architecture."""
    out = exported[0]
    manifest = read_manifest(out)
    for tower, entry in manifest.graphs[precision].items():
        model = onnx.load(out / entry.file)
        onnx.checker.check_model(model)
        metadata = {one.key: one.value for one in model.metadata_props}
        assert metadata["fingerprint"] == manifest.checkpoint.fingerprint
        if tower != "refine":
            layers = [node for node in model.graph.node if ".layers." in " ".join(node.output)]
            assert len(layers) >= 52
            assert len(model.graph.node) < 1000


def test_context_tower_alone(snapshot, tmp_path):
    found, done = twotower("export", snapshot, tmp_path / "bundle", "--towers", "context")
    assert found["towers"] == ["context"]
    assert done.seconds < SECONDS


def test_refusals_come_before_the_work(snapshot):
    """A shard of another revision among 24 is found in seconds, and named."""
    link = snapshot / "model-00013-of-00024.safetensors"
    target = link.readlink()
    link.unlink()
    link.symlink_to((snapshot / "model-00014-of-00024.safetensors").readlink())
    try:
        command = [*TWOTOWER, "inspect", str(snapshot)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    finally:
        link.unlink()
        link.symlink_to(target)
    assert done.returncode == 2
    assert "not in model-00013-of-00024.safetensors" in done.stderr
    assert "in all)" in done.stderr
    assert done.stderr.count("\n") == 1, "one line, no traceback"
