"""Bundles with one thing changed, digests kept up, so that only a comparison can notice.

The fixtures `exported` and `copied` (tests/export/conftest.py) make what is changed here.
"""

from __future__ import annotations

import hashlib
import json

import onnx

from twotower_export.verification.target import open_target
from twotower_export.verification.verify import verify

PATTERN = "ME*M"


def run(folder, **options):
    return verify(open_target(folder / "bundle"), folder / "checkpoint", **options)


def change_manifest(folder, change):
    path = folder / "bundle" / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def change_graph(folder, tower, change, precision="float32"):
    """Changes a graph of the bundle, and its digest with it."""

    def record(manifest):
        entry = manifest["graphs"][precision][tower]
        path = folder / "bundle" / entry["file"]
        model = onnx.load(str(path))
        change(model)
        onnx.save(model, str(path))
        entry["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()

    change_manifest(folder, record)


def replace_operator(function, old, new, count=1):
    """In a model's function, makes the first `count` nodes of one operator another's."""

    def change(model):
        (body,) = [one for one in model.functions if one.name == function]
        nodes = [node for node in body.node if node.op_type == old][:count]
        assert len(nodes) == count
        for node in nodes:
            node.op_type = new

    return change


def differing(report):
    return {tensor.tensor for tensor in report.outcome.tensors if not tensor.passed}


def change_tensors(checkpoint, change):
    """Rewrites a checkpoint's tensors: change(name, tensor) gives the new one."""
    from safetensors.torch import load_file, save_file

    for path in checkpoint.glob("*.safetensors"):
        tensors = {name: change(name, tensor) for name, tensor in load_file(path).items()}
        save_file(tensors, path, {"format": "pt"})
