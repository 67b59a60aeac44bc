"""Opening a checkpoint: what it tells, and every kind of broken one, refused by name."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct

import numpy as np
import pytest

from tests.support.checkpoint_files import (
    INDEX,
    RawTensor,
    edit_index,
    random_raw,
    random_tensors,
    write_checkpoint,
    write_raw_shard,
    write_shard,
)
from tests.support.sparse_checkpoint import HUB_ID, REVISION, write_sparse_checkpoint
from twotower_contract.config import config_json
from twotower_contract.errors import CheckpointError, ConfigError
from twotower_export.checkpoint import open_checkpoint, with_full_digests
from twotower_export.tiny.checkpoints import tiny_config

CONFIG = tiny_config("ME*", hidden=16)
FIRST = "model-00001-of-00003.safetensors"
EXPERT = "context_tower.layers.1.mixer.experts.3.up_proj.weight"


@pytest.fixture
def tensors():
    return random_tensors(CONFIG)


@pytest.fixture
def folder(tmp_path, tensors):
    return write_checkpoint(tmp_path / "checkpoint", CONFIG, tensors)


def test_whole_checkpoint_is_described(folder, tensors):
    opened = open_checkpoint(folder)
    assert opened.config == CONFIG
    assert opened.towers == ("context", "denoiser")
    assert (opened.id, opened.revision, opened.base) == (None, None, False)
    assert opened.tensors.keys() == tensors.keys()
    for name, tensor in opened.tensors.items():
        shard = opened.shards[tensor.shard]
        content = (folder / shard.file).read_bytes()[shard.data_start :][tensor.begin : tensor.end]
        assert content == tensors[name].data, name
        assert tensor.shape == tensors[name].shape


def test_fingerprint_is_of_the_tensors_not_of_the_files(tmp_path, tensors):
    many = open_checkpoint(write_checkpoint(tmp_path / "three", CONFIG, tensors, shards=3))
    few = open_checkpoint(write_checkpoint(tmp_path / "two", CONFIG, tensors, shards=2))
    other = open_checkpoint(write_checkpoint(tmp_path / "other", CONFIG, random_tensors(CONFIG, 1)))
    assert many.fingerprint == few.fingerprint
    assert many.fingerprint != other.fingerprint


@pytest.mark.parametrize("name", ["scale_shift_tables.2", EXPERT, "context_tower.layers.0.mixer.D"])
def test_fingerprint_sees_one_changed_tensor(tmp_path, folder, tensors, name):
    changed = tensors | {name: random_raw(tensors[name].shape, np.random.default_rng(9))}
    other = write_checkpoint(tmp_path / "changed", CONFIG, changed)
    assert open_checkpoint(other).fingerprint != open_checkpoint(folder).fingerprint


def test_single_file_needs_no_index(tmp_path, tensors):
    folder = write_checkpoint(tmp_path / "one", CONFIG, tensors, shards=1)
    (folder / "model-00001-of-00001.safetensors").rename(folder / "model.safetensors")
    (folder / INDEX).unlink()
    assert len(open_checkpoint(folder).shards) == 1


def test_mixed_dtypes_are_accepted(tmp_path):
    tensors = random_tensors(CONFIG, float32=("A_log", "mixer.D", "gate.weight"))
    opened = open_checkpoint(write_checkpoint(tmp_path / "mixed", CONFIG, tensors))
    assert opened.tensors["denoiser_tower.layers.0.mixer.D"].dtype == "F32"
    assert opened.tensors["denoiser_tower.layers.0.norm.weight"].dtype == "BF16"


def test_end_of_text_is_the_configurations_and_the_tokenizers(folder):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 2]}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    added = [{"content": "<|im_end|>", "id": 11}]
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": added, "model": {}}))
    assert open_checkpoint(folder).config.eos_token_ids == (2, 5, 11)


@pytest.mark.parametrize(
    ("eos", "message"),
    [
        ([[2]], r"eos_token_id is \[\[2\]\], not a token id"),
        ({"a": 1}, "eos_token_id is {'a': 1}, not a token id"),
        (True, "eos_token_id is True, not a token id"),
        (99_999, "eos_token_id 99999 is outside the vocabulary"),
        (-1, "eos_token_id -1 is outside the vocabulary"),
        ([2, 3], "eos_token_id 3 is the mask"),
    ],
)
def test_end_of_text_is_refused_by_the_file_that_names_it(folder, eos, message):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(ConfigError, match=rf"generation_config\.json: {message}"):
        open_checkpoint(folder)


def test_broken_tokenizer_is_refused(folder):
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    (folder / "tokenizer.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match=r"tokenizer\.json: is no tokenizer: RecursionError"):
        open_checkpoint(folder)


def test_huggingface_cache_names_itself(tmp_path):
    snapshot = write_sparse_checkpoint(tmp_path, config_json(CONFIG), shards=2)
    assert (snapshot / "config.json").is_symlink()
    opened = open_checkpoint(snapshot)
    assert (opened.id, opened.revision) == (HUB_ID, REVISION)
    assert open_checkpoint(snapshot, revision=REVISION[:9]).revision == REVISION


def test_wrong_revision_is_refused(tmp_path, folder):
    snapshot = write_sparse_checkpoint(tmp_path / "cache", config_json(CONFIG), shards=1)
    with pytest.raises(CheckpointError, match=f"is revision {REVISION}, not {'b' * 40}"):
        open_checkpoint(snapshot, revision="b" * 40)
    with pytest.raises(CheckpointError, match="cannot be checked: this is a plain folder"):
        open_checkpoint(folder, revision="b" * 40)


def test_branch_of_a_snapshot_is_the_caches(tmp_path):
    """`refs/main` names the commit that main had when the cache was filled."""
    snapshot = write_sparse_checkpoint(tmp_path, config_json(CONFIG), shards=1)
    assert open_checkpoint(snapshot, revision="main").revision == REVISION
    main = snapshot.parent.parent / "refs" / "main"
    main.write_text("c" * 40)
    with pytest.raises(CheckpointError, match=f"{REVISION}, not main, which is {'c' * 40} in this"):
        open_checkpoint(snapshot, revision="main")
    for unknown in ("dev", "../refs/main/..", f"../snapshots/{REVISION}/config.json", str(main)):
        with pytest.raises(CheckpointError, match=f"is revision {REVISION}, not "):
            open_checkpoint(snapshot, revision=unknown)


def test_unknown_revision_is_warned_about(tmp_path, folder):
    (warning,) = open_checkpoint(folder).warnings
    assert f"{folder}: its revision is unknown" in warning
    snapshot = write_sparse_checkpoint(tmp_path / "cache", config_json(CONFIG), shards=1)
    (warning,) = open_checkpoint(snapshot).warnings  # its revision is known; it has no weights
    assert "matrices hold only zeros where they were sampled" in warning


@pytest.mark.parametrize(
    "file", ["config.json", INDEX, "generation_config.json", "tokenizer.json", "chat.jinja"]
)
def test_unfinished_download_of_a_small_file_is_named(folder, file):
    (folder / file).unlink(missing_ok=True)
    (folder / file).symlink_to(f"../../blobs/{'0' * 40}")
    with pytest.raises(CheckpointError, match=f"{file}: is a link to .*download did not finish"):
        open_checkpoint(folder)


def test_unfinished_download_is_told_from_a_missing_shard(tmp_path):
    snapshot = write_sparse_checkpoint(tmp_path, config_json(CONFIG), shards=2)
    shard = snapshot / "model-00002-of-00002.safetensors"
    shard.resolve().unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-00002.*the download did not finish"):
        open_checkpoint(snapshot)


def test_git_lfs_pointer_is_recognised(folder):
    (folder / FIRST).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        open_checkpoint(folder)


@pytest.mark.parametrize("missing", ["config.json", INDEX, FIRST])
def test_missing_files_are_named(folder, missing):
    (folder / missing).unlink()
    with pytest.raises(CheckpointError, match=missing.replace(".", r"\.")):
        open_checkpoint(folder)


def test_folders_of_other_kinds_are_recognised(tmp_path):
    with pytest.raises(CheckpointError, match="there is no such folder"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"has no config\.json; "):
        open_checkpoint(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match="looks like a bundle"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="is a file"):
        open_checkpoint(tmp_path / "manifest.json")
    snapshot = write_sparse_checkpoint(tmp_path / "cache", config_json(CONFIG), shards=1)
    with pytest.raises(CheckpointError, match=f"try .*snapshots/{REVISION}"):
        open_checkpoint(snapshot.parent.parent)


@pytest.mark.parametrize("kept", [0, 5, 300, -1])
def test_truncated_shard_is_refused(folder, kept):
    content = (folder / FIRST).read_bytes()
    (folder / FIRST).write_bytes(content[:kept])
    with pytest.raises(CheckpointError, match=f"{FIRST}: is (truncated|no safetensors file)"):
        open_checkpoint(folder)


def test_folder_or_pipe_in_the_place_of_a_shard_is_refused(folder):
    (folder / FIRST).unlink()
    (folder / FIRST).mkdir()
    with pytest.raises(CheckpointError, match=f"{FIRST}: is a folder, not a shard"):
        open_checkpoint(folder)
    (folder / FIRST).rmdir()
    os.mkfifo(folder / FIRST)
    with pytest.raises(CheckpointError, match=f"{FIRST}: is no ordinary file"):
        open_checkpoint(folder)


def test_key_that_comes_twice_is_refused_by_name(folder, tensors):
    """Python's parser would take the last one in silence."""
    index = (folder / INDEX).read_text()
    twice = index.replace('{"weight_map": {', f'{{"weight_map": {{"{EXPERT}": "x.safetensors", ')
    (folder / INDEX).write_text(twice)
    with pytest.raises(CheckpointError, match=f"{INDEX}: has the key '{EXPERT}' twice"):
        open_checkpoint(folder)
    (folder / INDEX).write_text(index)
    content = (folder / FIRST).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = content[8 : 8 + length]
    name = next(iter(json.loads(header)))
    entry = json.dumps({name: json.loads(header)[name]})[1:-1].encode()
    header = b"{" + entry + b", " + header[1:]
    data = content[8 + length :]
    (folder / FIRST).write_bytes(struct.pack("<Q", len(header)) + header + data)
    with pytest.raises(CheckpointError, match=f"{FIRST}: its header has the key '{name}' twice"):
        open_checkpoint(folder)


def test_full_digests_are_of_the_whole_content(folder):
    seen = []
    hashed = with_full_digests(open_checkpoint(folder), lambda *now: seen.append(now))
    assert [shard.sha256 for shard in open_checkpoint(folder).shards] == [None] * 3
    for shard in hashed.shards:
        assert shard.sha256 == hashlib.sha256((folder / shard.file).read_bytes()).hexdigest()
    assert {what for what, _, _ in seen} == {"hashing megabytes"}
    assert seen[-1][1] == seen[-1][2]


def test_cache_names_the_digest_and_a_damaged_blob_is_found(tmp_path):
    snapshot = write_sparse_checkpoint(tmp_path, config_json(CONFIG), shards=2)
    opened = open_checkpoint(snapshot)
    for shard in opened.shards:
        assert shard.sha256 == (snapshot / shard.file).resolve().name
    with pytest.raises(CheckpointError, match=r"00001-of-00002.*but the cache names it .*damaged"):
        with_full_digests(opened)  # holes are not what their names say
    for shard in opened.shards:
        path = snapshot / shard.file
        blob = path.resolve()
        renamed = blob.rename(blob.with_name(hashlib.sha256(blob.read_bytes()).hexdigest()))
        path.unlink()
        path.symlink_to(renamed)
    opened = open_checkpoint(snapshot)
    assert with_full_digests(opened) == opened


def test_lengthened_shard_is_refused(folder):
    with (folder / FIRST).open("ab") as stream:
        stream.write(b"12345")
    with pytest.raises(CheckpointError, match="has 5 bytes after its last tensor"):
        open_checkpoint(folder)


def test_file_that_is_no_shard_is_refused(folder):
    (folder / FIRST).write_bytes(b"PK\x03\x04" + bytes(500))
    with pytest.raises(CheckpointError, match=r"is no safetensors file|is truncated"):
        open_checkpoint(folder)
    (folder / FIRST).write_bytes(struct.pack("<Q", 16) + b"x" * 16)
    with pytest.raises(CheckpointError, match="header is not JSON"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "BF16", "shape": [4], "data_offsets": [0, 6]}, "8 bytes, but its header gives"),
        ({"dtype": "BF16", "shape": [4], "data_offsets": [2, 10]}, "follows a gap"),
        ({"dtype": "BF16", "shape": [-4], "data_offsets": [0, 8]}, "is malformed"),
        ({"dtype": "BF16", "shape": [4]}, "is malformed"),
        ({"dtype": ["BF16"], "shape": [4], "data_offsets": [0, 8]}, "is malformed"),
        (7, "is malformed"),
    ],
)
def test_inconsistent_header_is_refused(folder, entry, message):
    write_raw_shard(folder / FIRST, {"x.weight": entry}, b"0" * 10)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_overlapping_tensors_are_refused(folder):
    entry = {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}
    write_raw_shard(folder / FIRST, {"a": entry, "b": entry}, b"0" * 8)
    with pytest.raises(CheckpointError, match="b overlaps another tensor"):
        open_checkpoint(folder)


def test_header_and_index_must_agree(folder):
    edit_index(folder, lambda index: index.update({EXPERT: "model-00003-of-00003.safetensors"}))
    with pytest.raises(CheckpointError, match="disagrees") as caught:
        open_checkpoint(folder)
    assert f"{EXPERT}: in {FIRST}, but the index says model-00003" in str(caught.value)
    assert f"{EXPERT}: not in model-00003" in str(caught.value)


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", 3])
def test_index_must_stay_in_the_folder(folder, file):
    edit_index(folder, lambda index: index.update({EXPERT: file}))
    with pytest.raises(CheckpointError, match="no safetensors file of this folder"):
        open_checkpoint(folder)


def test_missing_and_unknown_tensors_are_named(tmp_path, tensors):
    changed = {name: t for name, t in tensors.items() if name != EXPERT} | {
        "context_tower.layers.9.norm.weight": tensors["context_tower.norm_f.weight"]
    }
    folder = write_checkpoint(tmp_path / "changed", CONFIG, changed)
    with pytest.raises(CheckpointError, match=f"{EXPERT} is missing; .*layers.9.* is unknown"):
        open_checkpoint(folder)


def test_at_most_ten_problems_are_listed(tmp_path, tensors):
    kept = {name: tensor for name, tensor in tensors.items() if "experts.1." not in name}
    kept = {name: tensor for name, tensor in kept.items() if "scale_shift" not in name}
    gone = [name for name in tensors if name not in kept]
    kept = {name: t for name, t in kept.items() if "norm" not in name}
    gone = [name for name in tensors if name not in kept]
    assert len(gone) > 10
    folder = write_checkpoint(tmp_path / "few", CONFIG, kept)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert str(caught.value).count("is missing") == 10
    assert f"and {len(gone) - 10} more ({len(gone)} in all)" in str(caught.value)


def test_wrong_shape_is_refused(tmp_path, tensors):
    raw = tensors[EXPERT]
    turned = RawTensor(raw.dtype, (8, raw.shape[0] * raw.shape[1] // 8), raw.data)
    folder = write_checkpoint(tmp_path / "shape", CONFIG, tensors | {EXPERT: turned})
    with pytest.raises(CheckpointError, match=rf"{EXPERT} has shape \[8, 32\], not \[16, 16\]"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("dtype", "message"), [("F16", "is float16, not bfloat16 or float32"), ("I16", "is I16, not")]
)
def test_wrong_dtype_is_refused(tmp_path, tensors, dtype, message):
    changed = tensors | {EXPERT: RawTensor(dtype, tensors[EXPERT].shape, tensors[EXPERT].data)}
    folder = write_checkpoint(tmp_path / "dtype", CONFIG, changed)
    with pytest.raises(CheckpointError, match=f"{EXPERT} {message}"):
        open_checkpoint(folder)


def test_experts_of_one_layer_share_a_dtype(tmp_path, tensors):
    changed = tensors | {EXPERT: random_raw((16, 16), np.random.default_rng(0), "F32")}
    folder = write_checkpoint(tmp_path / "dtype", CONFIG, changed)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mixer\.experts\.up_proj mixes BF16"):
        open_checkpoint(folder)


def test_swapped_names_of_towers_of_other_shapes_are_refused(tmp_path, tensors):
    """Names that changed places with others of another shape: time conditioning under a head."""
    names = ("lm_head.weight", "t_embedder.mlp.2.weight")
    changed = tensors | {names[0]: tensors[names[1]], names[1]: tensors[names[0]]}
    folder = write_checkpoint(tmp_path / "swapped", CONFIG, changed)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight has shape \[16, 16\]"):
        open_checkpoint(folder)


def test_base_checkpoint_is_recognised(tmp_path):
    tensors = random_tensors(CONFIG, towers=("context",), base=True)
    assert all(name.startswith(("backbone.", "lm_head.")) for name in tensors)
    folder = write_checkpoint(tmp_path / "base", CONFIG, tensors)
    opened = open_checkpoint(folder)
    assert (opened.towers, opened.base) == (("context",), True)
    with pytest.raises(CheckpointError, match=r"single-tower base checkpoint.*--towers context"):
        open_checkpoint(folder, towers=("context", "denoiser"))


def test_configuration_of_another_model_is_refused(folder):
    values = json.loads((folder / "config.json").read_text())
    values |= {"hybrid_override_pattern": "MEM", "num_hidden_layers": 3}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"layers\.2\.mixer\.in_proj\.weight is missing"):
        open_checkpoint(folder)


def test_refused_configuration_names_its_file(folder):
    shutil.copyfile(folder / INDEX, folder / "config.json")
    with pytest.raises(ConfigError, match=r"config\.json: hybrid_override_pattern is None"):
        open_checkpoint(folder)


def test_progress_counts_every_shard(folder):
    seen = []
    open_checkpoint(folder, progress=lambda what, done, total: seen.append((done, total)))
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_files_outside_the_index_are_ignored(folder, tensors):
    write_shard(folder / "extra.safetensors", {})
    assert len(open_checkpoint(folder).tensors) == len(tensors)
