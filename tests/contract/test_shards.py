"""Headers of safetensors files: what is refused, and in which words."""

from __future__ import annotations

import struct

import pytest

from tests.support.checkpoint_files import RawTensor, write_shard
from twotower_contract.errors import CheckpointError
from twotower_contract.shards import read_header, read_shard, sample_digest


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no safetensors file: it has 0 bytes"),
        (b"1234567", "is no safetensors file: it has 7 bytes"),
        (b"\xff" * 100, "is no safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        (struct.pack("<Q", 50) + b"{}", "is truncated: 10 bytes, but its header alone takes 58"),
        (struct.pack("<Q", 2) + b"[]", "its header holds a list, not an object"),
        (struct.pack("<Q", 100_000) + b"[" * 100_000, "its header nests too deeply"),
        (struct.pack("<Q", 8) + b'{"a": 1}', "the header's entry for a is malformed: 1"),
        (struct.pack("<Q", 2) + b"{}more", "has 4 bytes after its last tensor"),
        (
            struct.pack("<Q", 69)
            + b'{"a\\u001b[2J": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}',
            r"entry for a\\x1b\[2J is malformed",
        ),
    ],
    ids=range(10),
)
def test_what_is_no_safetensors_file_is_refused(tmp_path, content, message):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    for read in (read_header, lambda path: read_shard(path, path.name, 0)):
        with pytest.raises(CheckpointError, match=message) as caught:
            read(path)
        assert str(path) in str(caught.value)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    for read in (read_header, sample_digest):
        with pytest.raises(CheckpointError, match="this shard is missing"):
            read(path)
        with pytest.raises(CheckpointError, match="is a folder, not a shard"):
            read(tmp_path)
    path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"is a link to .*the download did not finish"):
        read_header(path)


@pytest.mark.parametrize("count", [3, 5000])
def test_a_tensor_of_zeros_is_seen_in_its_sample(tmp_path, count):
    def tensor(content):
        write_shard(tmp_path / "x.safetensors", {"a": RawTensor("F32", (count,), content)})
        return read_shard(tmp_path / "x.safetensors", "x.safetensors", 0)[1]["a"]

    assert tensor(bytes(4 * count)).is_zero
    assert not tensor(b"\1" * (4 * count)).is_zero
