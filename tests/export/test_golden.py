"""The golden answer: what it is, when it is taken from the checkpoint, when there is none."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
from click.testing import CliRunner

from tests.support import reference
from tests.support.reference import ReferenceModel, generate_ar, generate_mask_diffusion
from twotower_contract.errors import TwoTowerError
from twotower_contract.golden import GOLDEN_FILE, read_golden, write_golden
from twotower_contract.policies import POLICIES
from twotower_export.bundle import write_bundle
from twotower_export.checkpoint import open_checkpoint
from twotower_export.cli.golden import golden as command
from twotower_export.reference import golden as module
from twotower_export.reference.golden import (
    BLOCK_SIZE,
    MAX_NEW_TOKENS,
    compute_golden,
    golden_for,
)
from twotower_export.reference.refinement import Rule, gumbel, refine
from twotower_export.tiny.checkpoints import (
    copy_pretrained,
    random_tensors,
    tiny_config,
    write_checkpoint,
    write_random_checkpoint,
)

MASK_ID = reference.MASK_ID


def run(*arguments):
    """Call the verb in this process; errors of the user come back as the exception."""
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


@pytest.fixture
def checkpoint(tmp_path):
    write_random_checkpoint(tmp_path / "checkpoint", "ME*", 32, seed=3)
    return open_checkpoint(tmp_path / "checkpoint")


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """What is computed of the checkpoint, wherever that lies."""
    folder = tmp_path_factory.mktemp("golden")
    write_random_checkpoint(folder, "ME*", 32, seed=3)
    return compute_golden(open_checkpoint(folder))


def test_the_golden_answer_is_an_independent_generation(checkpoint, golden):
    """The loop on the PyTorch towers gives what the slow reference gives, token for token."""
    model = ReferenceModel.load(checkpoint.path)
    answer = generate_mask_diffusion(
        model, golden["prompt_ids"], golden["max_new_tokens"], golden["block_size"]
    )
    new_ids = answer.output_ids[len(golden["prompt_ids"]) :]
    assert golden["output_ids"] == new_ids
    assert golden["denoiser_calls"] == answer.denoiser_calls
    assert golden["tokens_per_call"] == pytest.approx(len(new_ids) / answer.denoiser_calls, 1e-3)
    assert golden["computed_with"].startswith("torch ")
    assert golden["computed_with"].endswith(", float32")


def test_without_a_denoiser_the_answer_is_autoregressive(checkpoint):
    golden, _ = golden_for(checkpoint, ["context"])
    model = ReferenceModel.load(checkpoint.path)
    answer = generate_ar(model, golden["prompt_ids"], golden["max_new_tokens"])
    assert golden["mode"] == "ar"
    assert golden["output_ids"] == answer.output_ids[len(golden["prompt_ids"]) :]
    assert golden["denoiser_calls"] == 0
    assert golden["tokens_per_call"] is None


def test_a_bundle_has_it(checkpoint, golden, tmp_path):
    manifest = write_bundle(checkpoint, tmp_path / "bundle")
    stored = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert stored["golden"] == manifest.golden == golden
    assert stored["golden_missing"] is None


def test_a_checkpoint_brings_its_own(checkpoint, golden, monkeypatch):
    recorded = golden | {"computed_with": "a machine with a GPU"}
    write_golden(checkpoint.path / GOLDEN_FILE, checkpoint.fingerprint, recorded)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # no PyTorch, no tokenizers
    assert golden_for(checkpoint) == (recorded, None)
    found, missing = golden_for(checkpoint, ["context"])  # the file is of another mode
    assert found is None
    assert "PyTorch is not installed" in missing["reason"]
    assert missing["request"]["mode"] == "ar"


@pytest.mark.parametrize("tower", ["context", "denoiser"])
def test_weights_that_are_no_numbers_give_no_answer(tmp_path, tower):
    folder = tmp_path / "checkpoint"
    config = tiny_config("ME*", 32)
    tensors = random_tensors(config, seed=3)
    tensors[{"context": "context_lm_head", "denoiser": "lm_head"}[tower] + ".weight"][7] = np.nan
    write_checkpoint(folder, config, tensors)
    golden, missing = golden_for(open_checkpoint(folder))
    assert golden is None
    assert f"the {tower} tower's logits hold NaN" in missing["reason"]
    refused = run(folder).exception
    assert isinstance(refused, TwoTowerError)
    assert refused.exit_code == 2
    assert "logits hold NaN" in str(refused)
    assert not (folder / "golden.json").exists()


def test_towers_that_are_too_large_have_none(checkpoint, monkeypatch):
    monkeypatch.setattr(module, "FLOAT32_BOUND", 1000)
    golden, missing = golden_for(checkpoint)
    assert golden is None
    assert "twotower golden CHECKPOINT" in missing["reason"]  # a path would change every digest
    assert "\n" not in missing["reason"]
    monkeypatch.undo()
    computed = golden_for(checkpoint)[0]
    assert missing["request"].items() <= computed.items()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fingerprint": "0" * 64}, "fingerprint 000000000000"),
        ({"format": "other"}, "is 'other' version 1, not 'twotower-golden'"),
        ({"golden": {}}, "`golden: output_ids` is missing"),
        ({"golden": {"output_ids": []}}, "holds no answer"),
    ],
)
def test_a_file_of_something_else_is_refused(checkpoint, golden, change, message):
    path = checkpoint.path / GOLDEN_FILE
    write_golden(path, checkpoint.fingerprint, golden)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(TwoTowerError, match=message):
        golden_for(checkpoint)


def test_the_command_writes_the_answer_that_an_export_computes(checkpoint, golden):
    done = run(checkpoint.path)
    assert done.exit_code == 0, done.output
    calls = golden["denoiser_calls"]
    path = checkpoint.path / "golden.json"
    assert done.stdout.startswith(f"{path}: 48 tokens in {calls} denoiser calls, ")
    assert "6 to 51 calls that read about 0.0 GB" in done.stderr
    assert read_golden(checkpoint.path, checkpoint.fingerprint) == golden
    printed = json.loads(run(checkpoint.path, "--json").stdout)
    assert (printed["file"], printed["golden"]) == (str(path), golden)
    assert isinstance(run(checkpoint.path / "nothing").exception, TwoTowerError)


def test_progress_counts_calls_layers_and_bytes(checkpoint):
    told = []
    golden = compute_golden(checkpoint, progress=lambda *what: told.append(what))
    calls = golden["denoiser_calls"] + MAX_NEW_TOKENS // BLOCK_SIZE
    assert len(told) == calls * checkpoint.config.num_layers
    assert told[0] == ("call 1 of at most 51, 0.0 GB read; context layer", 0, 3)
    assert told[-1][0].startswith(f"call {calls} of at most 51, ")
    assert told[-1][0].endswith("denoiser layer")


def test_the_command_needs_pytorch(checkpoint, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "PyTorch is not installed" in str(run(checkpoint.path).exception)


def test_the_trained_checkpoint_ships_a_golden_answer_that_is_still_right(tmp_path):
    copy_pretrained(tmp_path / "trained")
    trained = open_checkpoint(tmp_path / "trained")
    shipped = read_golden(trained.path, trained.fingerprint)
    computed = compute_golden(trained)
    assert shipped is not None, "run: twotower golden export/twotower_export/data/tiny"
    versions = ("computed_with",)
    for name, value in computed.items():
        if name not in versions:
            assert shipped[name] == value, name
    assert shipped["tokens_per_call"] > 2  # a golden answer of one token per call would be no test


@pytest.mark.parametrize("policy", POLICIES)
def test_refinement_follows_the_rules(policy):
    """Against the reference that shares no code, over logits with ties and lengths below the block.

    Equal logits, greedy and sampled, every count of steps left.
    """
    generator = np.random.default_rng(POLICIES[policy])
    for case in range(40):
        size, vocabulary = int(generator.integers(1, 9)), 11
        logits = 3 * generator.standard_normal((size, vocabulary))
        if case % 3 == 0:
            logits[size // 2] = logits[0]  # equal confidences
        ids = np.where(generator.random(size) < 0.7, MASK_ID, 5)
        rule = Rule(
            threshold=float(generator.uniform(0.1, 1.5)),
            steps_left=int(generator.integers(1, 6)),
            temperature=0.8 if case % 2 else 0.0,
            policy=policy,
            seed=int(generator.integers(2**31)),
        )
        noise = gumbel(rule.seed, np.arange(size), vocabulary)
        expected = reference.refine(
            logits, ids, rule.threshold, rule.steps_left, rule.temperature, policy, noise
        )
        refined = refine(logits, ids, rule, mask_id=MASK_ID)
        np.testing.assert_array_equal(refined.ids, expected[0])
        np.testing.assert_allclose(refined.confidence, expected[1], rtol=1e-12)
        np.testing.assert_array_equal(refined.committed, expected[2])
        assert refined.still_masked == expected[3]


def test_refinement_ignores_what_lies_past_the_length_and_refuses_no_numbers():
    logits = np.random.default_rng(0).standard_normal((4, 7))
    ids = np.full(4, MASK_ID)
    refined = refine(logits, ids, Rule(), mask_id=MASK_ID, length=2)
    assert refined.committed.tolist() == [True, True, False, False]
    assert refined.ids[2:].tolist() == [MASK_ID, MASK_ID]
    assert refined.still_masked == 0
    logits[1, 0] = np.nan
    assert refine(logits, ids, Rule(), mask_id=MASK_ID).still_masked == -1
    given = np.array([0.1, 0.9, 0.2, 0.3])
    logits[1, 0] = 0
    quota = Rule(policy="quota", steps_left=4)
    by_given = refine(logits, ids, quota, mask_id=MASK_ID, confidence=given)
    assert by_given.committed.tolist() == [False, True, False, False]
