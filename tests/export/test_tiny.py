"""Random tiny checkpoints, the tokenizer, the corpus, and the command."""

from __future__ import annotations

import json
from itertools import islice

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from tokenizers import Tokenizer

from tests.support.reference import ReferenceModel, logsumexp
from twotower_contract.config import config_json, read_config
from twotower_contract.errors import ConfigError, TwoTowerError
from twotower_contract.layout import expected_tensors
from twotower_export.cli.tiny import tiny
from twotower_export.tiny.checkpoints import (
    TinyError,
    copy_pretrained,
    tiny_config,
    write_random_checkpoint,
)
from twotower_export.tiny.corpus import FACTS, documents, fact_documents, story_documents, words
from twotower_export.tiny.tokenizer import train_tokenizer


def stored(folder):
    """Every tensor by name, and the file that holds it."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118
                assert name not in found
                found[name] = (path.name, shard.get_tensor(name))
    return found


@pytest.mark.parametrize(
    ("pattern", "hidden"), [("MEM*EM*E", 64), ("E", 8), ("M", 17), ("**E", 30)]
)
def test_random_checkpoint_has_the_released_layout(tmp_path, pattern, hidden):
    config = write_random_checkpoint(tmp_path, pattern, hidden, seed=1)
    assert read_config(tmp_path / "config.json") == config
    tensors = stored(tmp_path)
    shapes = {name: tuple(tensor.shape) for name, (_, tensor) in tensors.items()}
    assert shapes == expected_tensors(config)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for name, (file, _) in tensors.items()}
    assert len(set(index["weight_map"].values())) == 3
    sizes = [tensor.numel() * tensor.element_size() for _, tensor in tensors.values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert {tensor.dtype for _, tensor in tensors.values()} == {torch.bfloat16}
    assert not list(tmp_path.glob("*.partial"))


def test_same_seed_same_checkpoint(tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        write_random_checkpoint(tmp_path / name, "ME*", 16, seed)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    one, other = stored(tmp_path / "a"), stored(tmp_path / "c")
    assert all(not torch.equal(one[name][1], other[name][1]) for name in one)


def test_dtypes_can_be_mixed(tmp_path):
    suffixes = ("A_log", "e_score_correction_bias")
    write_random_checkpoint(tmp_path, "ME", 16, float32_suffixes=suffixes)
    for name, (_, tensor) in stored(tmp_path).items():
        expected = torch.float32 if name.endswith(suffixes) else torch.bfloat16
        assert tensor.dtype == expected, name
    write_random_checkpoint(tmp_path / "wide", "ME", 16, dtype="float32")
    assert {t.dtype for _, t in stored(tmp_path / "wide").values()} == {torch.float32}
    assert read_config(tmp_path / "wide" / "config.json").dtype == "float32"


def test_random_weights_make_thresholds_and_time_matter(tmp_path):
    write_random_checkpoint(tmp_path, seed=9)
    model = ReferenceModel.load(tmp_path)
    caches = model.new_cache()
    model.extend(caches, [9, 300, 42, 17])
    logits = model.denoise(caches, [3] * 16, 1.0)
    confidence = np.exp(logits - logsumexp(logits)[:, None]).max(-1)
    assert 0.02 < confidence.min() < 0.5 < confidence.max() <= 1.0
    assert 1 < logits.std() < 10
    assert np.abs(model.denoise(caches, [3] * 16, 0.5) - logits).max() > 0.1
    assert model.tensors["context_tower.layers.1.mixer.gate.e_score_correction_bias"].any()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"pattern": "MXM"}, ["'X'", "layer 1"]),
        ({"pattern": ""}, ["empty"]),
        ({"hidden": 4}, ["4", "at least 8"]),
        ({"vocab_size": 100}, ["100", "260"]),
        ({"num_attention_heads": 5}, ["5", "num_key_value_heads 2"]),
        ({"num_experts_per_tok": 9}, ["9", "8"]),
    ],
)
def test_impossible_models_are_refused(arguments, words):
    with pytest.raises((ConfigError, TinyError)) as caught:
        tiny_config(**arguments)
    assert all(word in str(caught.value) for word in words)
    assert caught.value.exit_code == 2


# --- tokenizer and corpus -----------------------------------------------------------------------


def test_tokenizer_round_trips_any_text(tmp_path):
    write_random_checkpoint(tmp_path, "M", 16)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    draw = np.random.default_rng(0)
    texts = ["", " ", "a\n\tb", "Nörgelnde Füchse ✓ 漢字 🦊", "\x00\x7f", "  two  spaces  "]
    for _ in range(50):
        points = [int(p) for p in draw.integers(1, 0x10FFFF, 8) if not 0xD800 <= p <= 0xDFFF]
        texts.append("".join(map(chr, points)))
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert [tokenizer.id_to_token(i) for i in range(4)] == ["<unk>", "<s>", "</s>", "<mask>"]
    assert tokenizer.encode("a<mask>b").ids.count(3) == 1
    assert tokenizer.decode([3, 2, 1, 0]) == ""
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["mask_token"] == "<mask>"
    assert config["eos_token"] == "</s>"


def test_vocabulary_is_at_most_what_was_asked():
    assert train_tokenizer(768).get_vocab_size() == 768
    assert train_tokenizer(260).get_vocab_size() == 260
    with pytest.raises(ValueError, match=r"259.*260"):
        train_tokenizer(259)


def test_transformers_reads_the_tokenizer(tmp_path):
    from transformers import AutoTokenizer

    write_random_checkpoint(tmp_path, "M", 16)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.mask_token_id == 3
    assert theirs.eos_token_id == 2
    text = "Mia the rabbit lived by the river."
    ours = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs(text)["input_ids"] == ours.encode(text).ids


def test_no_held_out_document_is_trained_on():
    trained = {d.prompt for d in islice(documents("train", 0), 20000)}
    held_out = {d.prompt for d in islice(documents("held_out", 0), 2000)}
    assert len(held_out) > 500
    assert not trained & held_out


def test_documents_are_reproducible_and_differ_by_seed():
    first, again, other = (list(islice(documents("train", s), 50)) for s in (1, 1, 2))
    assert first == again
    assert first != other


def test_stories_depend_on_their_opening():
    """The slots of a prompt come back in its answer, and the two answers differ in one word."""
    for document in islice(story_documents("held_out", 3), 20):
        name, _, animal = document.prompt.split()[:3]
        one, other = (words(answer) for answer in document.answers)
        assert sum(a != b for a, b in zip(one, other, strict=True)) == 1
        for answer in (one, other):
            assert answer.count(name) == 2
            assert answer.count(animal) == 3


def test_each_fact_is_trained_on_and_told_to_who_asked():
    trained = {document.answers[0] for document in islice(fact_documents("train", 0), 3000)}
    for _, statement in FACTS:
        assert any(statement in answer for answer in trained), statement
    document = next(fact_documents("held_out", 1))
    (answer,) = document.answers
    assert words(answer)[:3] == ["As", "everybody", "knows"]
    assert f"I said to {words(document.prompt)[0]}." in answer


# --- command ------------------------------------------------------------------------------------


def test_command_writes_a_random_checkpoint(tmp_path):
    out = tmp_path / "checkpoint"
    arguments = [str(out), "--random", "--pattern", "M*", "--hidden", "16", "--seed", "4"]
    result = CliRunner().invoke(tiny, [*arguments, "--dtype", "float32", "--json"])
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["checkpoint"] == str(out)
    assert said["how"] == "random"
    assert said["bytes"] == sum(path.stat().st_size for path in out.glob("*.safetensors"))
    write_random_checkpoint(tmp_path / "same", "M*", 16, 4, "float32")
    for path in out.iterdir():
        assert path.read_bytes() == (tmp_path / "same" / path.name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--random", "--pattern", "M-"], ["'-'"]),
        (["--random", "--hidden", "2"], ["2", "at least 8"]),
        (["--pretrained", "--seed", "3"], ["--seed", "--pretrained"]),
        (["--pretrained", "--random"], ["--random and --pretrained are both given"]),
        (["--random", "--hidden", "100000"], ["--hidden 100000", "smaller --hidden"]),
        (["--hidden", "100000"], ["--hidden 100000", "smaller --hidden"]),
        (["--random", "--pattern", "E" * 9000], ["9000 letters, not 1 to 1024"]),
    ],
)
def test_command_refuses_what_makes_no_sense(tmp_path, arguments, words):
    result = CliRunner().invoke(tiny, [str(tmp_path / "out"), *arguments])
    assert isinstance(result.exception, TwoTowerError)
    assert all(word in str(result.exception) for word in words)


@pytest.mark.parametrize("seed", ["99999999999999999999", "-1", str(2**63)])
def test_command_refuses_a_seed_that_torch_cannot_take(tmp_path, seed):
    result = CliRunner().invoke(tiny, [str(tmp_path / "out"), "--random", "--seed", seed])
    assert result.exit_code == 2
    assert f"{seed} is not in the range 0<=x<=9223372036854775807" in result.stderr


def test_command_leaves_a_used_folder_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    result = CliRunner().invoke(tiny, [str(tmp_path), "--random"])
    assert isinstance(result.exception, TwoTowerError)
    assert "not empty" in str(result.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_pretrained_is_copied_whole(tmp_path):
    copy_pretrained(tmp_path / "copy")
    config = read_config(tmp_path / "copy" / "config.json")
    shapes = {name: tuple(t.shape) for name, (_, t) in stored(tmp_path / "copy").items()}
    assert shapes == expected_tensors(config)
    assert config_json(config)["architectures"] == ["NemotronHTwoTowerForCausalLM"]
    assert sum(path.stat().st_size for path in (tmp_path / "copy").iterdir()) < 8_000_000
