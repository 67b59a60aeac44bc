"""Engines for a GPU, verified as far as a machine without one can.

TensorRT's parser is the real one. The plans are a few made-up bytes: nothing can read a plan
without a GPU, only its digest is looked at. What engines compute is tested with CPU engines in the
place of a GPU's: it is the same code, behind the same interface.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from twotower_engines import verify_engines as module
from twotower_engines.build import BuildOptions, build_engines
from twotower_engines.compare_runtimes import compare_runtimes
from twotower_engines.engine_set import (
    BuildRecord,
    Limits,
    PlanFile,
    open_engine_set,
    write_build_record,
)
from twotower_engines.errors import EngineSetError
from twotower_engines.flavours.parsing import parse
from twotower_engines.flavours.profiles import narrow_profiles
from twotower_engines.flavours.rtx_library import find_library
from twotower_engines.interface import Interface, differences, interface_of
from twotower_engines.runtime import open_runtime
from twotower_engines.skus import find_sku
from twotower_engines.verify_engines import Verification, verify_engines, verify_loaded
from twotower_export.bundle import write_bundle
from twotower_export.checkpoint import open_checkpoint
from twotower_export.tiny import write_random_checkpoint

LIMITS = Limits(slots=6, context=256, max_tokens_per_call=256, block_size_max=32)
TOWERS = ("context", "denoiser")
FLOAT32 = ("A_log", "gate.weight")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A checkpoint with both stored dtypes, its bundle, CPU engines, and what TensorRT parses."""
    folder = tmp_path_factory.mktemp("verify_engines")
    write_random_checkpoint(folder / "checkpoint", "M*E", 32, seed=4, float32_suffixes=FLOAT32)
    write_bundle(open_checkpoint(folder / "checkpoint"), folder / "bundle")
    build_engines(folder / "bundle", folder / "cpu", BuildOptions(slots=3, context=128))
    return folder


@pytest.fixture(scope="module")
def parsed(exported):
    library = find_library()
    return {
        tower: parse(exported / "bundle" / "graphs" / f"{tower}.onnx", library) for tower in TOWERS
    }


@pytest.fixture
def engines(exported, parsed, tmp_path):
    """An engine set for an H200, but for the content of its plans."""
    folder = tmp_path / "engines" / "h200"
    folder.mkdir(parents=True)
    plans, digests, reports = {}, {}, {}
    for tower in TOWERS:
        content = f"plan of {tower}".encode()
        (folder / f"{tower}.plan").write_bytes(content)
        plans[tower] = PlanFile(f"{tower}.plan", hashlib.sha256(content).hexdigest())
        graph = (exported / "bundle" / "graphs" / f"{tower}.onnx").read_bytes()
        digests[tower] = hashlib.sha256(graph).hexdigest()
        outputs = {n: [s.dtype, list(s.shape)] for n, s in parsed[tower].outputs.items()}
        reports[tower] = {"inputs": len(parsed[tower].inputs), "outputs": outputs}
    shutil.copy(exported / "bundle" / "manifest.json", folder)
    record = BuildRecord(
        sku="h200",
        flavour="tensorrt",
        precision="bf16",
        limits=LIMITS,
        plans=plans,
        compute_capability=find_sku("h200").compute_capability,
        graph_sha256=digests,
        profiles={t: [p.as_json() for p in narrow_profiles(t, LIMITS)] for t in TOWERS},
        extra={"compute_capabilities": ["9.0"], "reports": reports},
    )
    write_build_record(folder, record)
    return folder


@pytest.fixture(autouse=True)
def _without_gpu(monkeypatch):
    """The same test on a machine with a GPU: these plans are none."""

    def none():
        raise module.PlanError("no GPU")

    monkeypatch.setattr(module, "local_sku", none)


def change_build(folder, change):
    path = folder / "build.json"
    build = json.loads(path.read_text())
    change(build)
    path.write_text(json.dumps(build))


def test_a_sound_engine_set_passes_and_says_what_was_not_verified(engines, exported):
    found = verify_engines(open_engine_set(engines), exported / "checkpoint", exported / "bundle")
    assert found.passed, found.problems
    said = "\n".join(found.verified)
    for what in (
        "digests of the plans (context, denoiser)",
        "tensors as exported",
        "profiles of the context plan",
        "profiles of the denoiser plan",
        "outputs of the denoiser graph, as TensorRT-RTX parses it",
    ):
        assert what in said
    (note,) = found.not_verified
    assert "no GPU of the table was found here; run the same on a machine with one for h200" in note


def test_without_the_bundle_the_builders_report_is_taken(engines, exported):
    found = verify_engines(open_engine_set(engines), exported / "checkpoint")
    assert found.passed, found.problems
    assert any("as its builder reported them" in line for line in found.verified)
    assert any("--bundle lets TensorRT parse" in line for line in found.not_verified)


def test_the_parser_agrees_with_the_manifest_in_every_name_dtype_and_shape(engines, parsed):
    manifest = open_engine_set(engines).manifest
    for tower in TOWERS:
        expected = interface_of(manifest, tower)
        assert differences(parsed[tower], expected) == []
        assert {spec.dtype for spec in expected.inputs.values()} == {"INT32", "FLOAT", "BF16"} or (
            tower == "context"
        )
    # stored as float32, though the checkpoint computes in bfloat16
    assert parsed["context"].inputs["context_tower.layers.0.mixer.A_log"].dtype == "FLOAT"


def test_differences_are_named(engines, parsed):
    expected = interface_of(open_engine_set(engines).manifest, "context")
    found = parsed["context"]
    outputs = {name: spec for name, spec in found.outputs.items() if name != "logits"}
    inputs = dict(found.inputs)
    inputs["more"] = inputs["ids"]
    inputs["lengths"] = replace(inputs["lengths"], dtype="INT64")
    inputs["context.layers.0.ssm_state"] = replace(
        inputs["context.layers.0.ssm_state"], dtype="BF16"
    )
    problems = differences(Interface(inputs, outputs), expected)
    assert "output logits is missing" in problems
    assert "input more is not one of the model's" in problems
    assert "input lengths is INT64 [-1], not INT32 [-1]" in problems
    assert any("context.layers.0.ssm_state is BF16" in problem for problem in problems)
    assert len(problems) == 4


def drop_output(build):
    del build["extra"]["reports"]["denoiser"]["outputs"]["still_masked"]


def leave_a_gap(build):
    build["profiles"]["denoiser"] = [
        profile for profile in build["profiles"]["denoiser"] if profile["name"] != "rows-4"
    ]


def promise_more(build):
    build["limits"]["context"] = 512


PROBLEMS = {
    "output": (drop_output, "output still_masked is missing"),
    "gap": (leave_a_gap, "take `batch` up to 1, but the limits promise 6"),
    "limit": (promise_more, "take `context` up to 256, but the limits promise 512"),
    "profiles": (
        lambda build: build["profiles"].pop("context"),
        "the context plan has no profiles",
    ),
    "capability": (
        lambda build: build.update(compute_capability="8.9"),
        "compute capability 8.9, but h200 has 9.0",
    ),
    "runs on": (
        lambda build: build["extra"].update(compute_capabilities=["8.0"]),
        "the plans run on 8.0, not on h200 (9.0)",
    ),
    "digest": (
        lambda build: build["plans"]["context"].update(sha256="0" * 64),
        "its sha256 is not the one in build.json",
    ),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_what_is_wrong_is_said(engines, exported, name):
    change, message = PROBLEMS[name]
    change_build(engines, change)
    found = verify_engines(open_engine_set(engines), exported / "checkpoint")
    assert not found.passed
    assert message in "\n".join(found.problems)


def test_a_malformed_profile_is_refused(engines):
    change_build(engines, lambda build: build["profiles"]["context"][0].update(batch=[1, 2]))
    with pytest.raises(EngineSetError, match="not three sizes"):
        verify_engines(open_engine_set(engines))


def test_another_bundle_and_another_checkpoint_are_refused(engines, exported, tmp_path):
    write_random_checkpoint(tmp_path / "checkpoint", "M*E", 32, seed=5, float32_suffixes=FLOAT32)
    write_bundle(open_checkpoint(tmp_path / "checkpoint"), tmp_path / "bundle")
    found = verify_engines(open_engine_set(engines), tmp_path / "checkpoint", tmp_path / "bundle")
    problems = "\n".join(found.problems)
    assert "has no context graph with sha256" in problems
    assert "its content changed since export" in problems


def on_a_gpu(monkeypatch, name):
    monkeypatch.setattr(module, "local_sku", lambda: find_sku(name))


def test_on_another_gpu_nothing_is_loaded(engines, exported, monkeypatch):
    on_a_gpu(monkeypatch, "l40s")
    found = verify_engines(open_engine_set(engines), exported / "checkpoint")
    assert found.passed
    assert any("for compute capability 9.0, this machine's" in line for line in found.not_verified)


def test_engines_that_do_not_load_on_their_gpu_fail(engines, exported, monkeypatch):
    """Here because the plan is no plan, or the runtime's packages are missing."""
    on_a_gpu(monkeypatch, "h200")
    found = verify_engines(open_engine_set(engines), exported / "checkpoint")
    assert not found.passed
    assert "the engines cannot be loaded" in found.problems[0]


def test_loaded_engines_are_compared_with_others(exported):
    cpu = open_engine_set(exported / "cpu")
    found = Verification(cpu.folder)
    runtime = open_runtime(cpu, threads=1)
    verify_loaded(found, cpu, runtime, against=cpu)
    runtime.close()
    assert found.passed, found.problems
    assert [one.tensor for one in found.differences] == [
        "context.logits",
        "denoiser.logits",
        "denoiser.new_ids",
    ]
    assert found.verified[0].startswith("golden answer: 48 tokens as expected")


def test_engines_that_compute_something_else_fail(exported, tmp_path):
    """Two experts' banks change places in the manifest: shapes and digests are right."""
    shutil.copytree(exported / "cpu" / "cpu", tmp_path / "cpu")
    manifest = json.loads((tmp_path / "cpu" / "manifest.json").read_text())
    bank = manifest["weights"]["denoiser"]["denoiser_tower.layers.2.mixer.experts.up_proj"]
    bank["sources"] = bank["sources"][1:] + bank["sources"][:1]
    (tmp_path / "cpu" / "manifest.json").write_text(json.dumps(manifest))
    wrong = open_engine_set(tmp_path / "cpu")
    found = Verification(wrong.folder)
    runtime = open_runtime(wrong, threads=1)
    verify_loaded(found, wrong, runtime, against=open_engine_set(exported / "cpu"))
    runtime.close()
    assert not found.passed
    passed = {one.tensor: one.passed for one in found.differences}
    assert passed["context.logits"]
    assert not passed["denoiser.logits"]
    assert "denoiser.logits is off by" in "\n".join(found.problems)


class Perturbed:
    """A runtime whose logits are off by a share of their largest, as other precisions' are."""

    def __init__(self, runtime, share):
        self._runtime, self._share = runtime, share

    def __getattr__(self, name):
        return getattr(self._runtime, name)

    def extend(self, rows):
        noise = np.random.default_rng(0)
        return [
            None
            if logits is None
            else (
                logits + self._share * np.abs(logits).max() * noise.choice([-1, 1], logits.shape)
            ).astype(np.float32)
            for logits in self._runtime.extend(rows)
        ]


@pytest.mark.parametrize(
    ("precision", "share", "passes"),
    [("float32", 5e-5, True), ("float32", 1e-3, False), ("bf16", 1e-2, True), ("bf16", 0.1, False)],
)
def test_tolerances_depend_on_the_precision(exported, precision, share, passes):
    runtime = open_runtime(open_engine_set(exported / "cpu"), threads=1)
    found = compare_runtimes(Perturbed(runtime, share), runtime, precision)
    runtime.close()
    assert {one.tensor: one.passed for one in found} == {
        "context.logits": passes,
        "denoiser.logits": True,
        "denoiser.new_ids": True,
    }


def test_the_verb_hands_over_engines_for_a_gpu(engines, exported, tmp_path):
    command = [sys.executable, "-m", "twotower_client.cli", "verify"]
    arguments = [engines.parent, exported / "checkpoint", "--bundle", exported / "bundle"]

    def run(*more):
        # an empty PATH: no nvidia-smi, so no GPU
        return subprocess.run(
            [*command, *map(str, arguments), *more],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PATH": str(tmp_path)},
        )

    done = run("--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["passed"]
    change_build(engines, drop_output)
    arguments = arguments[:2]
    done = run()
    assert done.returncode == 1
    assert "FAILED   output still_masked is missing" in done.stdout
    assert "error: " in done.stderr
    assert "Traceback" not in done.stderr
