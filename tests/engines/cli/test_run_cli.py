"""`twotower run`: answers as text, as ids and as JSON, and every refusal."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from click.testing import CliRunner

from tests.support import ROOT, TWOTOWER
from tests.support.command import twotower
from twotower_client.cli import cli
from twotower_contract.engine_set import BUILD_FILE
from twotower_contract.errors import CheckpointError, EngineSetError, TwoTowerError
from twotower_engines.artifacts.tokenizer import Tokenizer
from twotower_engines.building.checkpoint_engines import cached_engines, is_hub_id
from twotower_engines.cli.run import run

COMMAND = [*TWOTOWER, "run"]


@pytest.fixture(scope="module")
def made(random_engines):
    return random_engines()


def invoke(*arguments):
    return CliRunner().invoke(run, [str(argument) for argument in arguments])


def answer(*arguments):
    result = invoke(*arguments, "--threads", 1, "--json")
    assert result.exception is None, result.exception
    return json.loads(result.stdout)


@pytest.mark.parametrize("mode", ["mask_diffusion", "ar", "mock_ar"])
def test_json_is_the_reference_answer(made, reference, mode):
    found = answer(made.folder, "--prompt-ids", "5,6,7", "--mode", mode, "--max-new-tokens", 20)
    loop = getattr(reference, f"generate_{mode}")
    expected = loop(made.reference, [5, 6, 7], 20)
    expected = reference.cut_at_end(expected, 2, (299, 298, reference.END_ID))
    assert found["output_ids"] == expected.output_ids
    assert found["blocks"] == expected.masked_counts
    assert found["denoiser_calls"] == expected.denoiser_calls
    assert found["context_calls"] == {"mask_diffusion": 2, "ar": 20, "mock_ar": 21}[mode]
    assert found["finish_reason"] == "length"
    assert found["seconds"] > 0
    assert found["text"] == Tokenizer(made.folder).decode(expected.output_ids[3:])
    assert set(found) == {
        "output_ids", "text", "denoiser_calls", "context_calls", "blocks", "seconds",
        "finish_reason",
    }  # fmt: skip


def test_options_reach_the_request(made, reference):
    found = answer(
        made.folder.parent, "--sku", "cpu", "--prompt-ids", "5, 6", "--max-new-tokens", 21,
        "--block-size", 7, "--steps", 3, "--threshold", 0.4, "--policy", "leftmost",
        "--eos-id", 299, "--eos-id", 298,
    )  # fmt: skip
    expected = reference.generate_mask_diffusion(
        made.reference, [5, 6], 21, 7, 3, 0.4, policy="leftmost", eos_ids=(299, 298)
    )
    expected = reference.cut_at_end(expected, 2, (299, 298, reference.END_ID))
    assert found["output_ids"] == expected.output_ids
    assert found["blocks"] == expected.masked_counts
    drawn = ["--prompt-ids", 5, "--mode", "ar", "--temperature", 1, "--top-k", 9, "--top-p", 0.9]
    one, same, other = (answer(made.folder, *drawn, "--seed", seed) for seed in (1, 1, 2))
    assert one["output_ids"] == same["output_ids"] != other["output_ids"]


def test_an_end_token_ends_the_answer(made):
    prompt = ["--prompt-ids", "5,6", "--mode", "ar"]
    whole = answer(made.folder, *prompt)["output_ids"][2:]
    found = answer(made.folder, *prompt, "--eos-id", whole[5])
    assert found["finish_reason"] == "eos"
    assert found["output_ids"][2:] == whole[: whole.index(whole[5]) + 1]


def test_a_prompt_of_text_is_its_ids(made):
    ids = Tokenizer(made.folder).encode("Nora has a boat")
    by_text = answer(made.folder, "--prompt", "Nora has a boat", "--max-new-tokens", 8)
    by_ids = answer(made.folder, "--prompt-ids", ",".join(map(str, ids)), "--max-new-tokens", 8)
    assert by_text["output_ids"] == by_ids["output_ids"]


def test_a_prompt_that_holds_the_mask_is_warned_about(made):
    mask = Tokenizer(made.folder).decode([made.engines.manifest.model.mask_token_id]) or "<mask>"
    options = [made.folder, "--max-new-tokens", 4, "--prompt"]
    assert "holds the mask token" in invoke(*options, f"Nora {mask} boat").stderr
    assert "warning" not in invoke(*options, "Nora has a boat").stderr
    options[-1] = "--prompt-ids"
    assert "holds the mask token" in invoke(*options, "5,3,6").stderr
    assert "warning" not in invoke(*options, "5,6").stderr


def test_people_get_the_text_and_a_line_of_figures(made):
    options = [made.folder, "--prompt", "Nora", "--max-new-tokens", 40]
    result = invoke(*options)
    assert result.stdout == answer(*options)["text"] + "\n"
    assert "40 tokens in " in result.stderr
    single = invoke(*options[:-1], 1, "--steps", 1).stderr
    assert "1 token in " in single
    assert "1 denoiser call (1.00 tokens per call), 1 context call, " in single
    assert "tokens per call)" in result.stderr


def test_without_a_tokenizer_ids_go_in_and_out(made, tmp_path):
    shutil.copytree(made.folder, tmp_path / "cpu")
    (tmp_path / "cpu" / "tokenizer.json").unlink()
    found = answer(tmp_path, "--prompt-ids", "5,6", "--max-new-tokens", 4)
    assert found["text"] is None
    printed = invoke(tmp_path, "--prompt-ids", "5,6", "--max-new-tokens", 4).stdout
    assert [int(word) for word in printed.split()] == found["output_ids"][2:]
    refused = invoke(tmp_path, "--prompt", "text").exception
    assert "the checkpoint had no tokenizer" in str(refused)


def test_a_broken_tokenizer_matters_to_text_only(made, tmp_path):
    shutil.copytree(made.folder, tmp_path / "cpu")
    (tmp_path / "cpu" / "tokenizer.json").write_text("garbage")
    options = [tmp_path, "--max-new-tokens", 4]
    assert answer(*options, "--prompt-ids", "5,6")["text"] is None
    assert "the answer has no text: " in invoke(*options, "--prompt-ids", "5,6").stderr
    assert "cannot be read as a tokenizer" in str(invoke(*options, "--prompt", "text").exception)


def test_a_moved_checkpoint_is_named(made, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(made.folder, tmp_path / "cpu")
    shutil.copytree(made.checkpoint, moved)
    manifest = tmp_path / "cpu" / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace(str(made.checkpoint), str(tmp_path / "old place")))
    arguments = [tmp_path / "cpu", "--prompt-ids", "5", "--max-new-tokens", 2]
    assert "--checkpoint PATH" in str(invoke(*arguments).exception)
    assert answer(*arguments, "--checkpoint", moved)["output_ids"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no prompt; give --prompt TEXT or --prompt-ids 5,6,7"),
        (["--prompt", "a", "--prompt-ids", "5"], "both given; leave one of them out"),
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt-ids", ""], "the prompt is empty"),
        (["--prompt-ids", "5,x"], "--prompt-ids is '5,x'; give whole numbers"),
        (["--prompt-ids", "5,300"], "token 300 at place 1 is outside the vocabulary"),
        (["--prompt-ids", "5", "--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--prompt-ids", "5", "--threshold", "0"], "threshold is 0.0"),
        (["--prompt-ids", "5", "--steps", "0"], "steps is 0"),
        (["--prompt-ids", "5", "--mode", "fast"], "mode is 'fast'"),
        (["--prompt-ids", "5", "--max-new-tokens", "99999"], "shorten one of them, or build with"),
    ],
)
def test_bad_requests_are_refused_before_engines_are_loaded(made, monkeypatch, arguments, message):
    monkeypatch.setattr("twotower_engines.generation.generator.open_runtime", None)
    problem = invoke(made.folder, *arguments).exception
    assert isinstance(problem, TwoTowerError)
    assert message in str(problem)
    assert problem.exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no prompt"),
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt-ids", "5,x"], "give whole numbers"),
        (["--prompt", "a", "--threshold", "9"], "threshold is 9.0"),
        (["--prompt", "a", "--policy", "best"], "policy is 'best'"),
        (["--prompt", "a", "--mode", "fast"], "mode is 'fast'"),
        (["--prompt", "a", "--block-size", "0"], "block_size is 0"),
        (["--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--prompt", "a", "--temperature", "1e-7"], "it must be 0 (greedy), or at least 1e-06"),
        (["--prompt", "a", "--seed", "-1"], "seed is -1"),
    ],
)
def test_bad_requests_are_refused_before_a_checkpoint_is_exported(
    made, monkeypatch, arguments, message
):
    monkeypatch.setattr("twotower_engines.building.checkpoint_engines.cached_engines", None)
    problem = invoke(made.checkpoint, *arguments).exception
    assert isinstance(problem, TwoTowerError)
    assert message in str(problem)


def test_a_prompt_is_utf8_whatever_the_locale(made):
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [
        *COMMAND,
        made.folder,
        "--max-new-tokens",
        "4",
        "--json",
        "--prompt",
        "Łódź".encode(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **locale})
    assert done.returncode == 0, done.stderr
    expected = answer(made.folder, "--max-new-tokens", 4, "--prompt", "Łódź")
    assert json.loads(done.stdout)["output_ids"] == expected["output_ids"]
    done = subprocess.run(
        [*command[:-1], b"a\xff"], capture_output=True, text=True, env={**os.environ, **locale}
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: --prompt is not valid UTF-8")


def test_what_is_no_source_is_refused(made, tmp_path):
    def problem(source):
        return invoke(source, "--prompt-ids", "5").exception

    assert "no such folder" in str(problem(tmp_path / "nothing"))
    assert isinstance(problem(tmp_path), CheckpointError)  # an empty folder
    assert "neither a checkpoint" in str(problem(tmp_path))
    bundle = problem(made.checkpoint.parent / "bundle")
    assert isinstance(bundle, EngineSetError)
    assert "is a bundle; build it first" in str(bundle)


def test_help_loads_nothing_heavy():
    code = (
        "import sys, twotower_engines.cli.run; "
        "print({'numpy', 'onnxruntime', 'tokenizers', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    assert "Examples:" in invoke("--help").stdout


def test_the_readmes_prompt_is_answered_in_the_words_of_the_corpus(tmp_path, monkeypatch):
    """The line as it stands, on what the lines before it make of the checkpoint that is shipped."""
    from twotower_export.tiny.checkpoints import copy_pretrained
    from twotower_export.tiny.corpus import vocabulary, words

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^twotower run engines .*$", readme, re.M)
    monkeypatch.chdir(tmp_path)
    copy_pretrained("checkpoint")
    for verb in ("export checkpoint bundle", "build bundle --sku cpu engines"):
        cli.main(verb.split(), standalone_mode=False)
    result = invoke(*shlex.split(line, comments=True)[2:])
    assert result.exception is None, result.exception
    said = words(result.stdout)
    assert len(said) > 30
    known = vocabulary()
    assert sum(word in known for word in said) > 0.9 * len(said), result.stdout
    assert said.count("Mia") >= 2


def test_a_checkpoint_is_exported_and_built_once(random_engines, tmp_path):
    """With the real verbs, in processes of their own."""
    made = random_engines("M")
    words = ["run", made.checkpoint, "--prompt-ids", "5,6,7", "--max-new-tokens", 8, "--json"]

    def answer_of_command():
        done = twotower(*words, XDG_CACHE_HOME=str(tmp_path / "cache"))
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["output_ids"], done.stderr

    first, said = answer_of_command()
    assert "exporting and building" in said
    assert (
        first == answer(made.folder, "--prompt-ids", "5,6,7", "--max-new-tokens", 8)["output_ids"]
    )
    (built,) = (tmp_path / "cache" / "twotower").rglob(BUILD_FILE)
    time_built = built.stat().st_mtime_ns
    second, said = answer_of_command()
    assert (second, built.stat().st_mtime_ns) == (first, time_built)
    assert "exporting" not in said
    assert not list((tmp_path / "cache").rglob("*.partial"))


def test_another_checkpoint_has_engines_of_its_own(made, random_engines, tmp_path):
    from twotower_engines.building.checkpoint_engines import _key

    other = random_engines(seed=11)
    assert _key(str(made.checkpoint)) != _key(str(other.checkpoint))
    shutil.copytree(made.checkpoint, tmp_path / "copy")
    assert _key(str(made.checkpoint)) == _key(str(tmp_path / "copy"))
    config = tmp_path / "copy" / "config.json"
    config.write_text(config.read_text().replace("1e-05", "1e-06"))
    assert _key(str(made.checkpoint)) != _key(str(tmp_path / "copy"))


def test_files_that_the_index_does_not_name_are_not_read(made, tmp_path):
    from twotower_engines.building.checkpoint_engines import _key

    copy = shutil.copytree(made.checkpoint, tmp_path / "copy")
    for name in ("._model-00001-of-00002.safetensors", "optimizer.safetensors"):
        (copy / name).write_bytes(b"no shard")
    assert _key(str(made.checkpoint)) == _key(str(copy))


def test_a_checkpoint_that_cannot_be_exported_leaves_nothing(made, tmp_path):
    shutil.copytree(made.checkpoint, tmp_path / "bad")
    config = tmp_path / "bad" / "config.json"
    config.write_text(config.read_text().replace("MEM*EM*E", "MEM*EM*X"))
    with pytest.raises(CheckpointError, match="X"):
        cached_engines(str(tmp_path / "bad"), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_hub_ids_are_told_from_paths():
    assert is_hub_id("nvidia/Nemotron-Labs-TwoTower-30B-A3B-Base-BF16@abc123")
    assert is_hub_id("owner/name")
    for name in ("name", "./a/b", "/a/b", "a/b/c", "../up/there", "a/b@"):
        assert not is_hub_id(name)
