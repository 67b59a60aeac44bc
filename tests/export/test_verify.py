"""`twotower verify` passes what is right, and names what is wrong.

Wrong graphs are made by changing one thing in a right one, with digests and fingerprint kept up, so
that only the comparison can notice.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

from tests.support.command import twotower
from tests.support.sabotage import (
    PATTERN,
    change_graph,
    change_manifest,
    differing,
    replace_operator,
    run,
)
from twotower_contract.engine_set import (
    BuildRecord,
    EngineFile,
    Limits,
    open_engine_set,
    write_build_record,
)
from twotower_contract.errors import BundleError, TwoTowerError
from twotower_contract.shards import read_header
from twotower_export.bundle import write_bundle
from twotower_export.checkpoint import open_checkpoint
from twotower_export.cli.verify import verify as verify_command
from twotower_export.tiny.checkpoints import write_random_checkpoint
from twotower_export.verification.calls import call_shapes, random_feed
from twotower_export.verification.comparison import compare
from twotower_export.verification.target import open_target
from twotower_export.verification.verify import verify


@pytest.mark.parametrize("options", [{}, {"whole_bytes": 0}], ids=["whole", "by-part"])
def test_what_was_exported_passes(exported, options):
    report = run(exported, layers=range(4) if not options else (), **options)
    assert report.outcome.passed
    assert report.by_part == bool(options)
    tensors = {tensor.tensor for tensor in report.outcome.tensors}
    new = {
        "0.conv_state_new",
        "0.ssm_state_new",
        "2.k_cache_new",
        "2.v_cache_new",
        "3.ssm_state_new",
    }
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
    worst = max(t.max_rel for t in report.outcome.tensors if t.precision == "float32")
    assert worst < 1e-5
    native = {tensor.part for tensor in report.outcome.tensors if tensor.precision == "bfloat16"}
    parts = ("embeddings", *(f"layers.{i}" for i in range(4)), "head")
    assert native == {f"{tower}.{part}" for tower in ("context", "denoiser") for part in parts}
    assert any("bfloat16 graphs were run part by part" in note for note in report.notes)


def test_layers_of_a_large_model_are_verified_alone(exported):
    report = run(exported, layers=[2], whole_bytes=0)
    assert report.outcome.passed
    assert {tensor.part for tensor in report.outcome.tensors} == {
        "context.layers.2",
        "denoiser.layers.2",
    }
    with pytest.raises(TwoTowerError, match="no layer 4: the model has 4"):
        run(exported, layers=[4])


def test_parts_are_verified_alone_whatever_the_size(exported):
    report = run(exported, parts=["head", "embeddings", 1])
    assert report.outcome.passed
    assert report.by_part
    found = {(tensor.part, tensor.precision) for tensor in report.outcome.tensors}
    assert found == {
        (f"{tower}.{part}", precision)
        for tower in ("context", "denoiser")
        for part in ("head", "embeddings", "layers.1")
        for precision in ("float32", "bfloat16")
    }
    assert any("only head, embeddings, 1" in note for note in report.notes)
    with pytest.raises(TwoTowerError, match="no layer 4: the model has 4"):
        run(exported, parts=[4])


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
    failed = {(t.part, t.precision) for t in report.outcome.tensors if not t.passed}
    assert failed == {
        ("denoiser", "float32"),
        ("denoiser.layers.0", "bfloat16"),
        ("denoiser.layers.3", "bfloat16"),
    }


def test_shuffled_experts_are_found(copied):
    def shuffle(manifest):
        weights = manifest["weights"]["context"]["context_tower.layers.1.mixer.experts.down_proj"]
        weights["sources"] = weights["sources"][1:] + weights["sources"][:1]

    change_manifest(copied, shuffle)
    assert "logits" in differing(run(copied))


@pytest.mark.parametrize("name", ["logits", "context.layers.2.v_cache_new"])
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


def test_an_output_that_one_side_lacks_fails_by_name():
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


def test_outputs_that_are_zero_everywhere_prove_nothing(tmp_path):
    """An unfinished, preallocated download: exported as it is, with a warning."""
    folder = tmp_path / "checkpoint"
    write_random_checkpoint(folder, "M*E", 32, dtype="float32")
    for path in folder.glob("*.safetensors"):
        start = read_header(path)[1]
        with path.open("r+b") as file:
            size = os.fstat(file.fileno()).st_size
            file.truncate(start)
            file.truncate(size)
    opened = open_checkpoint(folder)
    assert any("matrices hold only zeros where they were sampled" in one for one in opened.warnings)
    manifest = write_bundle(opened, tmp_path / "bundle")
    assert "logits are 0 everywhere" in manifest.golden_missing["reason"]
    outcome = run(tmp_path).outcome
    assert not outcome.passed
    assert any("logits is 0 everywhere, which proves nothing" in one for one in outcome.problems)


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
        plans[tower] = EngineFile(f"{tower}.onnx", hashlib.sha256(content).hexdigest())
    shutil.copy(folder / "bundle" / "manifest.json", engines)
    limits = Limits(slots=2, context=256, max_tokens_per_call=256, block_size_max=32)
    write_build_record(engines, BuildRecord("cpu", "onnxruntime", "float32", limits, plans))
    return folder / "engines"


def test_the_command_verifies_engines_and_fails_with_a_reason(copied):
    engines = as_engines(copied)
    done = twotower("verify", engines, copied / "checkpoint", "--json", "--layer", 1)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["passed"]
    assert result["worst"]["max_rel"] < 1e-5
    assert "context.layers.1.hidden" in {tensor["tensor"] for tensor in result["tensors"]}

    change_graph(copied, "denoiser", replace_operator("SparseExperts", "Relu", "Abs"))
    done = twotower("verify", copied / "bundle", copied / "checkpoint", "--layers")
    assert done.returncode == 1
    assert "FAILED" in done.stdout
    assert "first after denoiser.layers.1" in done.stderr

    done = verify_here(engines, copied / "checkpoint", "--json", "--part", "head", "--part", "2")
    assert done.exit_code == 0, done.stderr
    parts = {tensor["part"] for tensor in json.loads(done.stdout)["tensors"]}
    assert parts == {
        f"{t}.{part}" for t in ("context", "denoiser") for part in ("head", "layers.2")
    }
    done = verify_here(engines, copied / "checkpoint", "--part", "tail")
    assert done.exit_code == 2
    assert "'tail' is neither embeddings, head nor a layer's number" in done.stderr


def verify_here(*arguments):
    """Run the verb in this process, which has loaded PyTorch already."""
    return CliRunner().invoke(verify_command, [str(one) for one in arguments])


def test_plans_have_no_parts_to_choose(copied):
    engines, checkpoint = as_engines(copied) / "cpu", copied / "checkpoint"
    write_build_record(engines, replace(open_engine_set(engines).build, flavour="tensorrt-rtx"))
    refused = verify_here(engines, checkpoint, "--part", "head").exception
    assert isinstance(refused, TwoTowerError)
    assert "plans cannot be read layer by layer; verify the bundle with --layers" in str(refused)
    refused = verify_here(engines, checkpoint, "--reference", "torch").exception
    assert isinstance(refused, TwoTowerError)
    assert "leave out --reference" in str(refused)


def test_ties_of_the_router_are_drawn_again_and_that_is_said(exported, monkeypatch):
    """A mismatch is believed only where no token's routing was nearly a tie."""
    from twotower_export.verification import comparison
    from twotower_export.verification import verify as module

    attempts = []

    def failing(part, graph, reference, feeds, complete, precision):
        if (part, precision) != ("context.layers.1", "bfloat16"):
            return comparison.Comparison()
        attempts.append(feeds["block"]["hidden"].tobytes())
        reference.margins.append(1e-9 if len(attempts) < 3 else 0.1)
        return comparison.Comparison(problems=["differs"])

    monkeypatch.setattr(module, "compare", failing)
    report = run(exported)
    assert not report.outcome.passed
    assert len(attempts) == len(set(attempts)) == 3
    (redraw,) = report.as_json()["redraws"]
    assert redraw == {
        "part": "context.layers.1",
        "precision": "bfloat16",
        "draws": 3,
        "margin": 1e-9,
    }
    (note,) = [note for note in report.notes if "router" in note]
    assert note.startswith("context.layers.1 in bfloat16: the router was within 1e-09 of another")
    assert note.endswith("draw 3 of the inputs counts")


def test_inputs_have_ragged_rows_and_stale_values(exported):
    config = open_checkpoint(exported / "checkpoint").config
    for tower in ("context", "denoiser"):
        for shape in call_shapes(tower, 256):
            feed = random_feed(config, tower, shape, 0)
            assert feed["ids"].shape == (len(shape.lengths), shape.tokens)
            assert len(set(shape.lengths)) > 1
            assert np.abs(feed["context.layers.2.k_cache"]).min(axis=(1, 3)).all()
    assert {shape.tokens for shape in call_shapes("context", 256)} == {256, 16, 1}
