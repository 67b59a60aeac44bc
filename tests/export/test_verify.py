"""`twotower verify` passes what is right, and names what is wrong.

Wrong graphs are made by changing one thing in a right one, with digests and fingerprint kept up, so
that only the comparison can notice.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest
from sparse_checkpoint import write_sparse_checkpoint

from twotower_engines.engine_set import BuildRecord, Limits, PlanFile, write_build_record
from twotower_export.bundle import write_bundle
from twotower_export.checkpoint import open_checkpoint
from twotower_export.errors import BundleError, ExportError
from twotower_export.tiny import write_random_checkpoint
from twotower_export.verification.calls import call_shapes, random_feed
from twotower_export.verification.comparison import compare
from twotower_export.verification.target import open_target
from twotower_export.verify import verify

PATTERN = "ME*M"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A checkpoint with tensors in both dtypes, and its bundle."""
    folder = tmp_path_factory.mktemp("verify")
    write_random_checkpoint(
        folder / "checkpoint", PATTERN, 32, seed=5, float32_suffixes=("A_log", "gate.weight")
    )
    write_bundle(open_checkpoint(folder / "checkpoint"), folder / "bundle")
    return folder


@pytest.fixture
def copied(exported, tmp_path):
    """The same, to be damaged."""
    shutil.copytree(exported / "bundle", tmp_path / "bundle")
    (tmp_path / "checkpoint").symlink_to(exported / "checkpoint")
    return tmp_path


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


@pytest.mark.parametrize("options", [{}, {"whole_bytes": 0}], ids=["whole", "by-part"])
def test_what_was_exported_passes(exported, options):
    report = run(exported, layers=range(4) if not options else (), **options)
    assert report.outcome.passed
    assert report.by_part == bool(options)
    tensors = {tensor.tensor for tensor in report.outcome.tensors}
    new = {"0.conv_state_new", "0.ssm_state_new", "2.k_new", "2.v_new", "3.ssm_state_new"}
    assert {f"context.layers.{name}" for name in new} <= tensors
    assert {"logits", "new_ids", "confidence", "committed", "still_masked"} <= tensors
    for tower in ("context", "denoiser"):
        assert {f"{tower}.layers.{i}.hidden" for i in range(4)} <= tensors
    assert {tensor.call for tensor in report.outcome.tensors} == {
        "chunk",
        "block",
        "token",
        "mixed",
    }
    assert report.outcome.worst.max_rel < 1e-5
    assert any("bfloat16 graphs were not run" in note for note in report.notes)


def test_layers_of_a_large_model_are_verified_alone(exported):
    report = run(exported, layers=[2], whole_bytes=0)
    assert report.outcome.passed
    assert {tensor.part for tensor in report.outcome.tensors} == {
        "context.layers.2",
        "denoiser.layers.2",
    }
    with pytest.raises(ExportError, match="no layer 4: the model has 4"):
        run(exported, layers=[4])


def test_a_wrong_operator_is_found_whole_and_by_part(copied):
    change_graph(copied, "context", replace_operator("MambaBlockStep", "Neg", "Identity"))
    report = run(copied, layers=range(4))
    assert not report.outcome.passed
    assert "context.layers.0.ssm_state_new" in differing(report)
    assert "new_ids" not in differing(report)  # the denoiser's graph is another file
    by_part = run(copied, whole_bytes=0)
    failed = {tensor.part for tensor in by_part.outcome.tensors if not tensor.passed}
    assert failed == {"context.layers.0", "context.layers.3"}


def test_a_wrong_commit_is_found(copied):
    """One position too many is committed: ids differ, logits do not."""

    def change(model):
        (body,) = [one for one in model.functions if one.name == "RefineBlock"]
        (last,) = [node for node in body.node if "committed" in node.output]
        producers = {name: node for node in body.node for name in node.output}
        both = producers[last.input[0]]  # masked and rank < count
        assert both.op_type == "And"
        comparison = producers[both.input[1]]
        assert comparison.op_type == "Less"
        comparison.op_type = "LessOrEqual"

    change_graph(copied, "denoiser", change)
    report = run(copied)
    assert differing(report) == {"new_ids", "committed"}


def test_swapped_tensors_are_found_and_located(copied):
    """The manifest feeds layer 3's projection to layer 0: same shape, same dtype, same graph."""

    def swap(manifest):
        name = "denoiser_tower.layers.{}.mixer.in_proj.weight"
        weights = manifest["weights"]["denoiser"]
        weights[name.format(0)]["sources"], weights[name.format(3)]["sources"] = (
            weights[name.format(3)]["sources"],
            weights[name.format(0)]["sources"],
        )

    change_manifest(copied, swap)
    report = run(copied, layers=range(4))
    first = next(t.tensor for t in report.outcome.tensors if not t.passed and "hidden" in t.tensor)
    assert first == "denoiser.layers.0.hidden"
    assert {t.part for t in report.outcome.tensors if not t.passed} == {"denoiser"}


def test_shuffled_experts_are_found(copied):
    def shuffle(manifest):
        weights = manifest["weights"]["context"]["context_tower.layers.1.mixer.experts.down_proj"]
        weights["sources"] = weights["sources"][1:] + weights["sources"][:1]

    change_manifest(copied, shuffle)
    assert "logits" in differing(run(copied))


@pytest.mark.parametrize("name", ["logits", "context.layers.2.v_new"])
def test_a_missing_output_fails_by_name(copied, name):
    def remove(model):
        kept = [output for output in model.graph.output if output.name != name]
        del model.graph.output[:]
        model.graph.output.extend(kept)

    change_graph(copied, "context", remove)
    report = run(copied)
    assert not report.outcome.passed
    assert f"context graph: output {name} is missing" in report.outcome.problems


class Side:
    """One half of a comparison, from fixed outputs."""

    def __init__(self, name, outputs):
        self.name, self.outputs = name, outputs

    def open(self):
        pass

    def run(self, feed):
        return dict(self.outputs)

    def close(self):
        pass


def compared(ours, theirs):
    feed = {"ids": np.zeros((1, 2), np.int32), "lengths": np.array([2], np.int32)}
    return compare("part", Side("graph", ours), Side("reference", theirs), {"call": feed})


def test_a_comparison_fails_where_polygraphy_would_pass():
    logits, state = np.ones((1, 3), np.float32), np.ones(2, np.float32)
    both = {"logits": logits, "state": state}
    assert compared(both, both).passed
    for ours, theirs, missing in (
        ({"logits": logits}, both, "the graph has no output state"),
        (both, {"logits": logits}, "the reference has no output state"),
        ({"logits": logits, "states": state}, both, "the graph has no output state"),
    ):
        outcome = compared(ours, theirs)
        assert not outcome.passed
        assert missing in outcome.problems[0]
    assert (
        "has shape [3, 1] in the graph"
        in compared({"logits": logits.T}, {"logits": logits}).problems[0]
    )
    assert not compared({}, {}).passed  # nothing compared is nothing verified


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf, 1.001])
def test_one_wrong_element_fails(wrong):
    right = np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 64)
    ours = right.copy()
    ours[0, 63] = wrong
    outcome = compared({"logits": ours}, {"logits": right})
    assert not outcome.passed
    assert outcome.worst.tensor == "logits"


def test_infinite_confidences_are_equal_and_counts_are_exact():
    confidence = np.array([np.inf, 0.5], np.float32)
    assert compared({"confidence": confidence}, {"confidence": confidence.copy()}).passed
    count = np.array([100000], np.int32)
    assert not compared({"still_masked": count}, {"still_masked": count + 1}).passed


def test_a_native_graph_with_other_nodes_fails(copied):
    change_graph(copied, "denoiser", replace_operator("SparseExperts", "Relu", "Abs"), "native")
    report = run(copied)
    assert not report.outcome.passed
    assert not differing(report)
    (problem,) = report.outcome.problems
    assert problem == "denoiser graph: the one in bfloat16 has other nodes than the float32 one"


def test_a_changed_file_and_another_checkpoint_are_refused(copied, tmp_path):
    write_random_checkpoint(tmp_path / "other", PATTERN, 32, seed=6)
    with pytest.raises(BundleError, match="is not the checkpoint of this bundle"):
        verify(open_target(copied / "bundle"), tmp_path / "other")
    path = copied / "bundle" / "graphs" / "float32" / "context.onnx"
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(BundleError, match="was changed since"):
        open_target(copied / "bundle")
    with pytest.raises(BundleError):
        open_target(tmp_path / "nothing")


def as_engines(folder):
    """The bundle's float32 graphs as an engine set of the CPU flavour."""
    engines = folder / "engines" / "cpu"
    engines.mkdir(parents=True)
    plans = {}
    for tower in ("context", "denoiser"):
        content = (folder / "bundle" / "graphs" / "float32" / f"{tower}.onnx").read_bytes()
        (engines / f"{tower}.onnx").write_bytes(content)
        plans[tower] = PlanFile(f"{tower}.onnx", hashlib.sha256(content).hexdigest())
    shutil.copy(folder / "bundle" / "manifest.json", engines)
    limits = Limits(slots=2, context=256, max_tokens_per_call=256, block_size_max=32)
    write_build_record(engines, BuildRecord("cpu", "onnxruntime", "float32", limits, plans))
    return folder / "engines"


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "twotower_client.cli", "verify", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_the_command_verifies_engines_and_fails_with_a_reason(copied):
    engines = as_engines(copied)
    done = command(engines, copied / "checkpoint", "--json", "--layer", 1)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["passed"]
    assert result["worst"]["max_rel"] < 1e-5
    assert "context.layers.1.hidden" in {tensor["tensor"] for tensor in result["tensors"]}

    change_graph(copied, "denoiser", replace_operator("SparseExperts", "Relu", "Abs"))
    done = command(copied / "bundle", copied / "checkpoint", "--layers")
    assert done.returncode == 1
    assert "FAILED" in done.stdout
    assert "first after denoiser.layers.1" in done.stderr
    assert "Traceback" not in done.stderr


def test_ties_of_the_router_are_drawn_again(exported, monkeypatch):
    """A mismatch is believed only where no token's routing was nearly a tie."""
    from twotower_export import verify as module
    from twotower_export.verification import comparison
    from twotower_export.verification.towers import TowerSide

    attempts = []

    def failing(part, graph, reference, feeds, complete=None, tolerance=0.0):
        assert isinstance(reference, TowerSide)
        attempts.append(feeds["block"]["ids"].tobytes())
        reference.margins.append(1e-9 if len(attempts) < 3 else 0.1)
        return comparison.Comparison(problems=["differs"])

    monkeypatch.setattr(module, "compare", failing)
    report = run(exported)
    assert not report.outcome.passed
    assert len(attempts) == 4  # three for the context tower, whose third was clear, one more
    assert len(set(attempts[:3])) == 3


def test_inputs_have_ragged_rows_and_stale_values(exported):
    config = open_checkpoint(exported / "checkpoint").config
    for tower in ("context", "denoiser"):
        for shape in call_shapes(tower, 256):
            feed = random_feed(config, tower, shape, 0)
            assert feed["ids"].shape == (len(shape.lengths), shape.tokens)
            assert len(set(shape.lengths)) > 1
            assert np.abs(feed["context.layers.2.k_cache"]).min(axis=(1, 3)).all()
    assert {shape.tokens for shape in call_shapes("context", 256)} == {256, 16, 1}


FILLED = ("0", "1", "5")  # a Mamba, a MoE and an attention layer


def fill(snapshot):
    """Fills three layers and the time conditioning of a sparse checkpoint with random weights.

    The context tower's MoE layer stays a hole: 2.6 GB of zeros are a case as well.
    """
    checkpoint = open_checkpoint(snapshot)
    generator = np.random.default_rng(0)
    # Not a divisor of an expert's size, so that no two experts are equal.
    block = generator.standard_normal(4_000_037, dtype=np.float32)
    for name, tensor in checkpoint.tensors.items():
        layer = name.partition(".layers.")[2].partition(".")[0] or name.rpartition(".")[2]
        conditioning = name.startswith(("t_embedder", "t_block"))
        if not (conditioning or layer in FILLED) or name.startswith("context_tower.layers.1."):
            continue
        values = block
        if name.endswith(("norm.weight", "mixer.D")):
            values = 1 + 0.1 * block[: tensor.parameters]
        elif name.endswith(("A_log", "dt_bias")):
            values = block[: tensor.parameters] - 1
        elif name.endswith(".weight"):
            values = block / np.sqrt(np.float32(tensor.shape[-1]))
        write(checkpoint.shards[tensor.shard], tensor, values)


def write(shard, tensor, values):
    """Writes a tensor's elements, `values` over and over."""
    content = values.tobytes()
    if tensor.dtype == "BF16":  # cut off, which is a rounding as good as any here
        content = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    with shard.path.open("r+b") as file:
        file.seek(shard.data_start + tensor.begin)
        left = tensor.end - tensor.begin
        while left:
            left -= file.write(content[:left])


@pytest.mark.slow
def test_full_size_layers_are_verified_within_eight_gigabytes(tmp_path):
    """Three layers of both full-size towers; of the 126 GB, nothing else is read."""
    snapshot = write_sparse_checkpoint(tmp_path / "cache")
    fill(snapshot)
    write_bundle(open_checkpoint(snapshot), tmp_path / "bundle")
    code = (
        "import resource, sys; from twotower_export.verify_cli import verify\n"
        "try: verify(sys.argv[1:])\n"
        "finally: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)\n"
    )
    layers = [word for layer in FILLED for word in ("--layer", layer)]
    arguments = [tmp_path / "bundle", snapshot, *layers, "--json"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["passed"]
    assert result["by_part"]
    assert {tensor["part"] for tensor in result["tensors"]} == {
        f"{tower}.layers.{layer}" for tower in ("context", "denoiser") for layer in FILLED
    }
    assert 0 < result["worst"]["max_rel"] < 1e-4
    assert int(done.stderr.split()[-1]) * 1024 < 8e9
