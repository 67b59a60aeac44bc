"""Files that others wrote: pipes, endless files, pointers and names that steer a terminal."""

from __future__ import annotations

import os

import pytest
import tokenizers

from twotower_contract.digests import file_state
from twotower_contract.errors import CheckpointError, ConfigError, TwoTowerError, printable
from twotower_contract.files import MAX_FILE_BYTES, read_file
from twotower_contract.index import read_index, shard_files
from twotower_contract.json_file import format_of, read_json
from twotower_contract.shards import read_header, read_shard, sample_digest
from twotower_contract.tokenizer import open_tokenizer

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 17\n"


READERS = {
    "json": ("config.json", read_json),
    "header": ("x.safetensors", read_header),
    "shard": ("x.safetensors", lambda path: read_shard(path, path.name, 0)),
    "samples": ("x.safetensors", sample_digest),
    "file": ("x", lambda path: read_file(path, CheckpointError, "download it again")),
    "tokenizer": ("tokenizer.json", lambda path: open_tokenizer(tokenizers, path.parent)),
    "index": ("model.safetensors.index.json", lambda path: read_index(path.parent)),
}
"""Everything that reads a file of a checkpoint: the file's name, and the reader."""


@pytest.fixture(params=READERS)
def name(request):
    return request.param


def test_a_pipe_is_refused_and_not_waited_for(tmp_path, name):
    path, read = tmp_path / READERS[name][0], READERS[name][1]
    os.mkfifo(path)
    with pytest.raises(TwoTowerError, match="is no ordinary file, not a"):
        read(path)
    assert format_of(path) is None
    assert file_state(path, "0" * 64) == "missing"


def test_a_pointer_of_git_lfs_says_what_to_do(tmp_path, name):
    path, read = tmp_path / READERS[name][0], READERS[name][1]
    path.write_bytes(POINTER)
    if name == "samples":  # of bytes, whatever they are: the header is read before
        return
    with pytest.raises(TwoTowerError, match=r"is a Git LFS pointer, .* run `git lfs pull`"):
        read(path)


def test_a_file_of_gigabytes_is_not_read_whole(tmp_path, name):
    path, read = tmp_path / READERS[name][0], READERS[name][1]
    path.touch()
    os.truncate(path, 3 * 10**9)
    if name == "samples":  # 16 of them, whatever the size
        assert len(read(path)) == 64
        return
    with pytest.raises(TwoTowerError, match=r"are read at most|is no safetensors file"):
        read(path)


def test_the_bound_is_exact(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_file(path, ConfigError, "mend it", most=5) == b"12345"
    with pytest.raises(ConfigError, match=r"has 5 bytes, and 4 are read at most.*; mend it"):
        read_file(path, ConfigError, "mend it", most=4)
    assert MAX_FILE_BYTES > 40 * 10**6  # the largest tokenizer that we know


def test_the_index_names_the_shards(tmp_path):
    for name in ("._model-1.safetensors", "optimizer.safetensors", "model-1.safetensors"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"neither model.safetensors.index.json nor"):
        shard_files(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "model-1.safetensors", "b": "model-1.safetensors"}}')
    assert shard_files(tmp_path) == ["model-1.safetensors"]
    index.unlink()
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert shard_files(tmp_path) == ["model.safetensors"]


def test_names_cannot_steer_a_terminal(tmp_path):
    """ESC clears a screen, a bidirectional override turns a name, a newline forges a line."""
    assert printable("a\x1b[2J\u202e\x9b\nb é 漢 x") == r"a\x1b[2J\u202e\x9b\nb é 漢 x"
    assert str(ConfigError("x\x1b[2J\ny")) == "x\\x1b[2J\ny"
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a\\u001b[2J\\nerror: b": "/etc/passwd"}}')
    with pytest.raises(CheckpointError) as caught:
        read_index(tmp_path)
    assert r"a\x1b[2J\nerror: b lies in" in str(caught.value)
