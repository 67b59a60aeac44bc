"""Engines for a GPU, verified as far as a machine without one can.

TensorRT's parser is the real one. The plans are a few made-up bytes: nothing can read a plan
without a GPU, only its digest is looked at. What engines compute is tested with CPU engines in the
place of a GPU's: it is the same code, behind the same interface.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest

from tests.support import TWOTOWER
from tests.support import host_device as host
from twotower_contract.engine_set import (
    BuildRecord,
    EngineFile,
    Limits,
    open_engine_set,
    write_build_record,
)
from twotower_contract.errors import EngineSetError
from twotower_engines.artifacts.engine_interface import (
    Interface,
    TensorSpec,
    differences,
    interface_of,
)
from twotower_engines.artifacts.weights import WeightStore
from twotower_engines.building.build import BuildOptions, build_engines
from twotower_engines.building.flavours.parsing import parse
from twotower_engines.building.flavours.profiles import narrow_profiles
from twotower_engines.building.flavours.tensorrt_rtx import LIBRARY
from twotower_engines.errors import PlanError
from twotower_engines.planning.local_gpu import LocalGpu
from twotower_engines.planning.sku_lookup import find_sku
from twotower_engines.runtime.opening import open_runtime
from twotower_engines.runtime.resident.runtime import Tower
from twotower_engines.runtime.resident.upload import upload_weights
from twotower_engines.verify import running as module
from twotower_engines.verify.differences import TOLERANCES, compare_arrays
from twotower_engines.verify.engines import verify_engines
from twotower_engines.verify.outputs import _as_taken, _decoded, _encoded
from twotower_engines.verify.report import Sources, Verification
from twotower_engines.verify.running import (
    cpu_engines,
    verify_golden,
    verify_loaded,
    verify_outputs,
)
from twotower_engines.verify.runtimes import compare_runtimes
from twotower_export.bundle import write_bundle
from twotower_export.checkpoint import open_checkpoint
from twotower_export.tiny.checkpoints import write_random_checkpoint

LIMITS = Limits(slots=6, context=256, max_tokens_per_call=256, block_size_max=32)
SIZES = {"context": LIMITS.cache_tokens}
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
    return {
        tower: parse(exported / "bundle" / "graphs" / f"{tower}.onnx", LIBRARY, SIZES)
        for tower in TOWERS
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
        plans[tower] = EngineFile(f"{tower}.plan", hashlib.sha256(content).hexdigest())
        graph = (exported / "bundle" / "graphs" / f"{tower}.onnx").read_bytes()
        digests[tower] = hashlib.sha256(graph).hexdigest()
        reports[tower] = {
            "parsed": {
                side: {n: [s.dtype, list(s.shape)] for n, s in specs.items()}
                for side, specs in (
                    ("inputs", parsed[tower].inputs),
                    ("outputs", parsed[tower].outputs),
                )
            }
        }
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
    monkeypatch.setattr(module, "local_gpu", lambda: None)


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
        "digests of the engine files (context, denoiser)",
        "tensors as exported",
        "profiles of the context engine",
        "profiles of the denoiser engine",
        "outputs of the denoiser graph, as TensorRT-RTX parses it",
    ):
        assert what in said
    (note,) = found.not_verified
    assert "no NVIDIA GPU was found here; run the same on a machine with one for h200" in note


def test_without_the_bundle_the_builders_report_is_taken(engines, exported):
    found = verify_engines(open_engine_set(engines), exported / "checkpoint")
    assert found.passed, found.problems
    assert sum("engine, as its builder parsed them" in line for line in found.verified) == 2
    assert len(found.not_verified) == 1, "the GPU alone is missing"


def test_the_parser_agrees_with_the_manifest_in_every_name_dtype_and_shape(engines, parsed):
    manifest = open_engine_set(engines).manifest
    for tower in TOWERS:
        expected = interface_of(manifest, tower, LIMITS.cache_tokens)
        assert differences(parsed[tower], expected) == []
        assert {spec.dtype for spec in expected.inputs.values()} == {"INT32", "FLOAT", "BF16"} or (
            tower == "context"
        )
    # stored as float32, though the checkpoint computes in bfloat16
    assert parsed["context"].inputs["context_tower.layers.0.mixer.A_log"].dtype == "FLOAT"


def test_differences_are_named(engines, parsed):
    expected = interface_of(open_engine_set(engines).manifest, "context", LIMITS.cache_tokens)
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
    del build["extra"]["reports"]["denoiser"]["parsed"]["outputs"]["still_masked"]


def other_input(build):
    build["extra"]["reports"]["context"]["parsed"]["inputs"]["lengths"] = ["INT64", [-1]]


def leave_a_gap(build):
    build["profiles"]["denoiser"] = [
        profile for profile in build["profiles"]["denoiser"] if profile["name"] != "rows-4"
    ]


def promise_more(build):
    build["limits"]["context"] = 512


PROBLEMS = {
    "output": (drop_output, "output still_masked is missing"),
    "input": (other_input, "input lengths is INT64 [-1], not INT32 [-1]"),
    "gap": (leave_a_gap, "take `batch` up to 1, but the limits promise 6"),
    "limit": (promise_more, "have room for 512 tokens, but the limits ask for 768"),
    "profiles": (
        lambda build: build["profiles"].pop("context"),
        "the context engine has no profiles",
    ),
    "capability": (
        lambda build: build.update(compute_capability="8.9"),
        "compute capability 8.9, but h200 has 9.0",
    ),
    "runs on": (
        lambda build: build["extra"].update(compute_capabilities=["8.0"]),
        "the engines run on 8.0, not on h200 (9.0)",
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


def test_a_builder_that_reported_nothing_is_said(engines, exported):
    change_build(engines, lambda build: build["extra"].update(reports={}))
    found = verify_engines(open_engine_set(engines), exported / "checkpoint")
    assert found.passed
    assert sum("its builder reported none" in line for line in found.not_verified) == 2
    report = {"context": {"parsed": {"inputs": {"ids": 3}, "outputs": {}}}}
    change_build(engines, lambda build: build["extra"].update(reports=report))
    with pytest.raises(EngineSetError, match="report of inputs and outputs is malformed"):
        verify_engines(open_engine_set(engines), exported / "checkpoint")


def test_another_bundle_and_another_checkpoint_are_refused(engines, exported, tmp_path):
    write_random_checkpoint(tmp_path / "checkpoint", "M*E", 32, seed=5, float32_suffixes=FLOAT32)
    write_bundle(open_checkpoint(tmp_path / "checkpoint"), tmp_path / "bundle")
    found = verify_engines(open_engine_set(engines), tmp_path / "checkpoint", tmp_path / "bundle")
    problems = "\n".join(found.problems)
    assert "has no context graph with sha256" in problems
    assert "its content changed since export" in problems


def on_a_gpu(monkeypatch, name, capability):
    monkeypatch.setattr(module, "local_gpu", lambda: LocalGpu(name, 1 << 37, capability))


def test_on_another_gpu_nothing_is_loaded(engines, exported, monkeypatch):
    on_a_gpu(monkeypatch, "L40S", "8.9")
    found = verify_engines(open_engine_set(engines), exported / "checkpoint")
    assert found.passed
    assert any(
        "for compute capability 9.0, this machine has NVIDIA L40S" in line
        for line in found.not_verified
    )


def test_on_another_cpu_nothing_is_loaded(engines, exported, monkeypatch):
    on_a_gpu(monkeypatch, "H200", "9.0")
    change_build(engines, lambda build: build.update(machine="sparc64"))
    found = verify_engines(open_engine_set(engines), exported / "checkpoint")
    assert any("they are for sparc64, this machine is" in line for line in found.not_verified)


@pytest.mark.parametrize("name", ["H200", "H200 NVL"])
def test_engines_that_do_not_load_on_their_gpu_fail(engines, exported, monkeypatch, name):
    """Here because the plan is no plan, or the runtime's packages are missing.

    A card that the table does not know is a GPU, too.
    """
    on_a_gpu(monkeypatch, name, "9.0")
    found = verify_engines(open_engine_set(engines), exported / "checkpoint")
    assert not found.passed
    assert "the engines cannot be loaded" in found.problems[0]


GENERATION = [
    "context.logits",
    "denoiser.logits",
    "denoiser.new_ids of the first step",
    "denoiser.still_masked of the first step",
    "denoiser.new_ids of the last step",
    "denoiser.still_masked of the last step",
]


def verified(engines, reference):
    """What is found with CPU engines in the place of a GPU's."""
    found = Verification(engines.folder)
    runtime = open_runtime(engines, threads=1)
    verify_golden(found, engines, runtime)
    verify_loaded(found, engines, runtime, reference)
    runtime.close()
    return found


def test_loaded_engines_are_compared_with_others(exported):
    cpu = open_engine_set(exported / "cpu")
    found = verified(cpu, cpu)
    assert found.passed, found.problems
    assert [one.tensor for one in found.differences] == GENERATION
    assert found.verified[0].startswith("golden answer: 48 tokens as expected")
    assert found.verified[1] == f"generation against {cpu.folder}"


def with_wrong_experts(exported, folder):
    """Two experts' banks change places in the manifest: shapes and digests are right."""
    shutil.copytree(exported / "cpu" / "cpu", folder / "cpu")
    manifest = json.loads((folder / "cpu" / "manifest.json").read_text())
    bank = manifest["weights"]["denoiser"]["denoiser_tower.layers.2.mixer.experts.up_proj"]
    bank["sources"] = bank["sources"][1:] + bank["sources"][:1]
    (folder / "cpu" / "manifest.json").write_text(json.dumps(manifest))
    return open_engine_set(folder / "cpu")


def test_engines_that_compute_something_else_fail(exported, tmp_path):
    found = verified(with_wrong_experts(exported, tmp_path), open_engine_set(exported / "cpu"))
    assert not found.passed
    passed = {one.tensor: one.passed for one in found.differences}
    assert passed["context.logits"]
    assert not passed["denoiser.logits"]
    assert "denoiser.logits is off by" in "\n".join(found.problems)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """Engines of a float32 checkpoint, whose graphs a device of this machine's memory can run."""
    folder = tmp_path_factory.mktemp("outputs")
    write_random_checkpoint(folder / "checkpoint", "M*E", 32, seed=6, dtype="float32")
    write_bundle(open_checkpoint(folder / "checkpoint"), folder / "bundle")
    made, _ = build_engines(folder / "bundle", folder / "cpu", BuildOptions(slots=3, context=64))
    return made


def compared_outputs(engines, reference, spoiled=()):
    """Every output of host engines against the CPU flavour, some of them spoiled."""
    found = Verification(engines.folder)

    @contextlib.contextmanager
    def open_tower(name):
        device = host.HostDevice()
        engine = host.HostEngine(engines.engine_path(name), device)
        engine.session = Spoiled(engine.session, spoiled)
        yield Tower(engine, device, upload_weights(WeightStore(engines.manifest), name, device))
        device.close()

    verify_outputs(found, engines, open_tower, reference)
    return found


class Spoiled:
    """A session some of whose outputs are off by a hundredth of their largest value."""

    def __init__(self, session, outputs):
        self._session, self._outputs = session, outputs

    def run(self, names, feed):
        values = dict(zip(names, self._session.run(names, feed), strict=True))
        for name in values.keys() & set(self._outputs):
            value = values[name]
            off = np.zeros_like(value)
            off.flat[0] = max(1, np.abs(value).max() * 0.01)
            values[name] = value + off
        return list(values.values())


def test_every_output_of_every_call_is_compared(narrow):
    found = compared_outputs(narrow, narrow)
    assert found.passed, found.problems
    names = [one.tensor for one in found.differences]
    for tower in TOWERS:
        for output in interface_of(narrow.manifest, tower).outputs:
            calls = ("chunk", "block", "token") if tower == "context" else ("block", "token")
            assert {f"{tower}.{call}.{output}" for call in calls} <= set(names)
    assert len(names) == 3 * 6 + 2 * 8
    assert found.verified == [
        f"all 18 outputs of context calls against {narrow.folder}",
        f"all 16 outputs of denoiser calls against {narrow.folder}",
    ]


OUTPUTS = (
    *("context.layers.0.ssm_state_new", "context.layers.0.conv_state_new"),
    *("context.layers.1.k_cache_new", "context.layers.1.v_cache_new"),
    *("confidence", "committed", "new_ids", "still_masked", "logits"),
)


@pytest.mark.parametrize("spoiled", [OUTPUTS[::2], OUTPUTS[1::2]])
def test_wrong_outputs_and_no_others_are_found(narrow, spoiled):
    found = compared_outputs(narrow, narrow, spoiled)
    assert not found.passed
    wrong = {one.tensor.rpartition(".")[2] for one in found.differences if not one.passed}
    assert wrong == {output.rpartition(".")[2] for output in spoiled}


def test_bf16_is_rounded_to_nearest_even():
    spec = TensorSpec("BF16", (-1,))
    halves = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0xC0000000], np.uint32).view(np.float32)
    assert _encoded(halves, spec).tolist() == [0x3F80, 0x3F82, 0x3F81, 0xC000]
    np.testing.assert_array_equal(_decoded(_encoded(halves, spec), spec), _as_taken(halves, spec))
    same = np.array([1.5, -2.0, 0.0], np.float32)
    np.testing.assert_array_equal(_as_taken(same, spec), same)


def test_zeros_agree_with_zeros_and_prove_nothing():
    zeros = {"logits": np.zeros((2, 5), np.float32), "ids": np.zeros(3, np.int32)}
    logits, ids = compare_arrays(zeros, zeros, "float32")
    assert not logits.passed
    assert "logits is 0 everywhere on both sides" in str(logits)
    assert ids.passed, "whole numbers may all be 0"


def test_sides_that_do_not_match_are_not_compared():
    one = {"x": np.zeros(3, np.float32)}
    with pytest.raises(ValueError, match=r"\['y'\] are on one side only"):
        compare_arrays(one, {**one, "y": one["x"]}, "bf16")
    infinite = {"x": np.array([1, np.inf, -np.inf], np.float32)}
    assert compare_arrays(infinite, infinite, "float32")[0].passed
    for wrong in (np.inf, np.nan, 5):
        other = {"x": np.array([1, np.inf, wrong], np.float32)}
        assert not compare_arrays(other, infinite, "float32")[0].passed
        assert not compare_arrays(infinite, other, "float32")[0].passed
    with pytest.raises(ValueError, match="x has shapes"):
        compare_arrays(one, {"x": np.zeros(4, np.float32)}, "bf16")


# Where the reference comes from.


def test_engines_beside_are_the_reference(engines, exported):
    shutil.copytree(exported / "cpu" / "cpu", engines.parent / "cpu")
    opened = open_engine_set(engines)
    with cpu_engines(opened, Sources(exported / "checkpoint")) as found:
        assert found.folder == engines.parent / "cpu"
    with cpu_engines(opened, Sources(against=open_engine_set(exported / "cpu"))) as found:
        assert found.folder == exported / "cpu" / "cpu"


def test_a_reference_is_built_from_the_bundle(engines, exported):
    with cpu_engines(open_engine_set(engines), Sources(bundle=exported / "bundle")) as found:
        assert (found.build.flavour, found.build.limits.slots) == ("onnxruntime", 3)
        folder = found.folder
    assert not folder.exists()


def test_a_reference_is_built_from_the_checkpoint(engines, exported, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with cpu_engines(open_engine_set(engines), Sources(exported / "checkpoint")) as found:
        assert found.build.flavour == "onnxruntime"
        assert found.folder.is_relative_to(tmp_path / "cache")


def test_a_reference_that_is_none_is_refused(engines, exported, narrow):
    opened = open_engine_set(engines)
    for against, message in ((opened, "is of flavour tensorrt"), (narrow, "of another checkpoint")):
        with (
            pytest.raises(EngineSetError, match=message),
            cpu_engines(opened, Sources(against=against)),
        ):
            pass


def test_a_reference_that_does_not_fit_is_not_built(engines, exported, monkeypatch):
    small = replace(find_sku("cpu"), memory=9 << 27)
    monkeypatch.setattr(module, "known_skus", lambda: {"cpu": small})
    with (
        pytest.raises(PlanError, match="do not fit on 1 x cpu"),
        cpu_engines(open_engine_set(engines), Sources(bundle=exported / "bundle")),
    ):
        pass


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
        name: passes or name != "context.logits" for name in GENERATION
    }
    assert TOLERANCES.keys() == {"float32", "bf16"}


def test_the_verb_hands_over_engines_for_a_gpu(engines, exported, tmp_path):
    command = [*TWOTOWER, "verify"]
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
