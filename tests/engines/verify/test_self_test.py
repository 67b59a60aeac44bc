"""The golden self-test: right engines pass, wrong ones fail, and each failure has its name."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

from twotower_contract.engine_set import open_engine_set
from twotower_contract.errors import BundleError
from twotower_contract.policies import POLICIES
from twotower_engines.building.build import BuildOptions, build_engines
from twotower_engines.cli.self_test import selftest
from twotower_engines.errors import GenerationError
from twotower_engines.generation.generator import Result
from twotower_engines.generation.request import Request
from twotower_engines.runtime.interface import Denoised
from twotower_engines.runtime.opening import open_runtime
from twotower_engines.verify.self_test import GoldenAnswer, golden_request, judge, run_self_test
from twotower_export.bundle import write_bundle
from twotower_export.checkpoint import open_checkpoint
from twotower_export.reference import golden as exporter
from twotower_export.tiny.checkpoints import copy_pretrained, write_random_checkpoint

REQUEST_KEYS = ("prompt_ids", "mode", "max_new_tokens", "block_size", "steps", "threshold")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The trained checkpoint, its bundle and its engines: several tokens per denoiser call."""
    folder = tmp_path_factory.mktemp("self_test")
    copy_pretrained(folder / "checkpoint")
    write_bundle(open_checkpoint(folder / "checkpoint"), folder / "bundle")
    build_engines(folder / "bundle", folder / "engines", BuildOptions(slots=2, context=256))
    return folder


@pytest.fixture
def engines(built, tmp_path):
    """A copy of the engine set, to be damaged."""
    shutil.copytree(built / "engines" / "cpu", tmp_path / "cpu")
    return tmp_path / "cpu"


def outcome_of(folder):
    opened = open_engine_set(folder)
    runtime = open_runtime(opened, threads=1)
    try:
        return run_self_test(opened, runtime)
    finally:
        runtime.close()


def change_manifest(folder, change):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def swap_sources(manifest):
    """Two weights of one tower change places: every digest is right, every shape fits."""
    first, second = (
        manifest["weights"]["denoiser"][f"denoiser_tower.layers.{layer}.mixer.in_proj.weight"]
        for layer in (0, 2)
    )
    first["sources"], second["sources"] = second["sources"], first["sources"]


def test_right_engines_pass(engines):
    result = outcome_of(engines)
    assert result.status == "passed", result.reason
    assert result.ok
    assert result.equal_tokens == result.tokens == 48
    assert result.denoiser_calls == result.expected_calls < 24
    result.require()


def test_wrong_engines_fail_at_start(engines):
    change_manifest(engines, swap_sources)
    result = outcome_of(engines)
    assert result.status == "failed"
    with pytest.raises(GenerationError, match="golden self-test: "):
        result.require()


def test_an_autoregressive_answer_is_tested_too(tmp_path):
    write_random_checkpoint(tmp_path / "checkpoint", "M*E", 32, seed=1)
    checkpoint = open_checkpoint(tmp_path / "checkpoint")
    write_bundle(checkpoint, tmp_path / "bundle", towers=("context",))
    built, _ = build_engines(tmp_path / "bundle", tmp_path / "engines", BuildOptions(slots=1))
    result = outcome_of(built.folder)
    assert result.status == "passed", result.reason
    assert result.denoiser_calls == 0


def forget_the_answer(manifest):
    """The golden block of a model that is too large for an export to answer: the exporter's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporter, "FLOAT32_BOUND", 0)
        patch.setattr(exporter, "read_golden", lambda folder, fingerprint: None)
        checkpoint = open_checkpoint(manifest["checkpoint"]["path"])
        manifest["golden"], manifest["golden_missing"] = exporter.golden_for(checkpoint)


def test_without_a_golden_answer_right_engines_are_plausible(engines):
    request = golden_request(open_engine_set(engines))
    change_manifest(engines, forget_the_answer)
    result = outcome_of(engines)
    assert result.status == "plausible", result.reason
    assert result.ok
    assert "twotower golden" in result.reason
    assert (result.tokens, result.equal_tokens) == (48, 0)
    assert 0 < result.denoiser_calls < 24
    assert golden_request(open_engine_set(engines)) == request


def test_without_a_golden_answer_word_salad_fails(engines):
    """These give two tokens in three calls and many words: only the context tower knows better."""
    change_manifest(engines, forget_the_answer)
    change_manifest(engines, swap_sources)
    result = outcome_of(engines)
    assert result.status == "failed"
    assert result.denoiser_calls < result.tokens
    assert result.reason.startswith("word salad: the context tower finds the answer unlikely")


class Broken:
    """A runtime of right engines, one call of which is replaced."""

    def __init__(self, runtime):
        self.runtime = runtime

    def __getattr__(self, name):
        return getattr(self.runtime, name)


class Blind(Broken):
    """The denoiser sees an empty context."""

    def denoise(self, rows):
        self.runtime.reset(1)
        return self.runtime.denoise([replace(row, slot=1) for row in rows])


class Stuck(Broken):
    """The denoiser has one answer, all at once."""

    def denoise(self, rows):
        return [
            Denoised(np.full_like(row.ids, self.token), 0, np.ones(row.ids.size, np.float32))
            for row in rows
        ]

    token = 7


class Masking(Stuck):
    @property
    def token(self):
        return self.mask_token_id


class Slow(Broken):
    """The denoiser commits one position per call."""

    def denoise(self, rows):
        return self.runtime.denoise([replace(row, policy=POLICIES["quota"]) for row in rows])


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (Blind, "another prompt has the same answer: the context is not seen"),
        (Stuck, "the answer is token 7, 48 times"),
        (Masking, "the answer holds the mask token"),
        (Slow, "exactly one token per denoiser call (48 calls for 48 tokens)"),
    ],
)
def test_each_invariant_has_its_name(engines, broken, message):
    change_manifest(engines, forget_the_answer)
    opened = open_engine_set(engines)
    runtime = open_runtime(opened, threads=1)
    try:
        result = run_self_test(opened, broken(runtime))
    finally:
        runtime.close()
    assert result.status == "failed"
    assert message in result.reason


def test_engines_too_small_for_the_request_are_asked_for_less(built, tmp_path):
    small, _ = build_engines(built / "bundle", tmp_path / "small", BuildOptions(context=40))
    result = outcome_of(small.folder)
    assert result.status == "plausible", result.reason
    assert result.tokens == 16
    assert "these engines hold 40" in result.reason
    tiny, _ = build_engines(built / "bundle", tmp_path / "tiny", BuildOptions(context=24))
    result = outcome_of(tiny.folder)
    assert result.status == "unavailable"
    assert result.ok
    assert "no answer of two blocks fits" in result.reason


def test_without_a_golden_answer_the_context_tower_is_tested_alone(tmp_path):
    write_random_checkpoint(tmp_path / "checkpoint", "M*E", 32, seed=1)
    write_bundle(open_checkpoint(tmp_path / "checkpoint"), tmp_path / "bundle", towers=("context",))
    built, _ = build_engines(tmp_path / "bundle", tmp_path / "engines", BuildOptions(slots=1))

    def forget(manifest):
        request = {name: manifest["golden"][name] for name in REQUEST_KEYS}
        missing = {"reason": "lost", "request": request}
        manifest |= {"golden": None, "golden_missing": missing}

    change_manifest(built.folder, forget)
    result = outcome_of(built.folder)
    assert result.status == "plausible", result.reason
    assert result.denoiser_calls == 0


def test_a_bug_of_ours_is_not_taken_for_a_missing_answer(engines, monkeypatch):
    def broken(*arguments):
        raise KeyError("policy")

    monkeypatch.setattr(Request, "check", broken)
    with pytest.raises(KeyError, match="policy"):
        outcome_of(engines)


def test_a_malformed_golden_block_is_refused(engines):
    change_manifest(engines, lambda manifest: manifest["golden"].pop("output_ids"))
    with pytest.raises(BundleError, match="output_ids"):
        outcome_of(engines)


# `judge` alone from here on: answers are made up, because real engines do not fail on demand.

REQUEST = Request("golden", prompt_ids=(1, 2), max_new_tokens=32, block_size=16)
GOLDEN = GoldenAnswer(REQUEST, tuple(range(10, 42)), 8, "torch 2, float32")


def judged(ids, calls, precision="float32"):
    return judge(GOLDEN, Result((1, 2, *ids), (), calls, 3, "length", 0.5), precision)


def test_word_salad_is_named():
    result = judged([5] * 32, 32)
    assert result.status == "failed"
    assert "word salad: exactly one token per denoiser call" in result.reason
    # An answer that starts right, but at one token per call, is salad as well.
    assert "word salad" in judged([*range(10, 40), 5, 5], 32).reason


def test_late_differences_are_numerics():
    ids = [*range(10, 39), 5, 5, 5]
    result = judged(ids, 9)
    assert result.status == "failed"
    assert result.reason.startswith("numerics: the first 29 of 32 tokens are those of torch 2")
    lower = judged(ids, 9, "bf16")
    assert lower.status == "deviates"
    assert lower.ok
    assert "numerics of bf16 engines" in lower.reason


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_early_differences_and_many_more_calls_are_wrong_in_any_precision(precision):
    early = judged([*range(10, 15), *[5] * 27], 9, precision)
    assert early.status == "failed"
    assert "a wrong answer: tokens differ from number 6 of 32 on" in early.reason
    slow = judged([*range(10, 39), 5, 5, 5], 17, precision)
    assert slow.status == "failed"
    assert "17 denoiser calls for 32 tokens, 8 were expected" in slow.reason


def test_right_tokens_in_another_number_of_calls():
    assert judged(range(10, 42), 8).status == "passed"
    assert "not the number of calls" in judged(range(10, 42), 9).reason
    assert judged(range(10, 42), 9, "bf16").status == "passed"


def test_where_the_golden_answer_takes_one_call_per_token_that_is_no_salad():
    golden = replace(GOLDEN, denoiser_calls=32)
    result = judge(golden, Result((1, 2, *[5] * 32), (), 32, 3, "length", 0.5), "float32")
    assert result.status == "failed"
    assert "word salad" not in result.reason


def test_the_command_reports_and_records(engines, tmp_path):
    run = CliRunner().invoke
    done = run(selftest, [str(engines), "--json", "--threads", "1"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["status"] == "passed"

    file = tmp_path / "golden.json"
    assert run(selftest, [str(engines), "--record", str(file)]).exit_code == 0
    recorded = json.loads(file.read_text())
    stored = json.loads((engines / "manifest.json").read_text())["golden"]
    assert recorded["golden"]["computed_with"].startswith("onnxruntime engines for cpu (")
    assert recorded["golden"] | {"computed_with": ""} == stored | {"computed_with": ""}

    change_manifest(engines, swap_sources)
    done = run(selftest, [str(engines)])
    assert done.stdout.startswith("FAILED: ")
    assert done.exception.exit_code == 1
    refused = tmp_path / "refused.json"
    done = run(selftest, [str(engines), "--record", str(refused)])
    assert done.exception.exit_code == 1
    assert "word salad" in str(done.exception)
    assert "Nothing was recorded" in str(done.exception)
    assert not refused.exists()


def test_the_command_reports_engines_without_a_golden_answer(engines):
    change_manifest(engines, forget_the_answer)
    done = CliRunner().invoke(selftest, [str(engines), "--threads", "1"])
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("PLAUSIBLE: 48 tokens in ")


def test_a_recorded_answer_is_taken_by_the_next_export(built, tmp_path):
    shutil.copytree(built / "checkpoint", tmp_path / "checkpoint")
    file = tmp_path / "checkpoint" / "golden.json"
    done = CliRunner().invoke(selftest, [str(built / "engines"), "--record", str(file)])
    assert done.exit_code == 0, done.output
    manifest = write_bundle(open_checkpoint(tmp_path / "checkpoint"), tmp_path / "bundle")
    assert manifest.golden["computed_with"].startswith("onnxruntime engines for cpu (")
