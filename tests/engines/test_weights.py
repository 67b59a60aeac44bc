"""Weights out of mapped shards: the right bytes, little memory, only of the right checkpoint."""

from __future__ import annotations

import json
import math
import shutil
import struct
import tracemalloc

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from twotower_engines.errors import CheckpointError
from twotower_engines.weights import WeightStore, _widen, read_header


@pytest.fixture(scope="module")
def made(random_engines):
    return random_engines(
        "ME*E", seed=6, dtype="bfloat16", float32_suffixes=("A_log", "up_proj.weight")
    )


@pytest.fixture(scope="module")
def tensors(made):
    """Every tensor as safetensors itself reads it."""
    return {
        name: tensor
        for path in made.checkpoint.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


@pytest.fixture
def copied(made, tmp_path):
    """A store over a copy of the checkpoint, to be damaged."""
    shutil.copytree(made.checkpoint, tmp_path / "copy")
    return WeightStore(made.engines.manifest, tmp_path / "copy")


def expected(tensors, weight):
    parts = [tensors[source].to(torch.float32) for source in weight.sources]
    return (torch.stack(parts) if weight.how == "stack" else parts[0]).numpy()


@pytest.mark.parametrize("tower", ["context", "denoiser"])
def test_every_weight_has_the_checkpoints_values(made, tensors, tower):
    store = WeightStore(made.engines.manifest)
    store.check()
    weights = made.engines.manifest.weights[tower]
    ways = set()
    for name, array in store.all_float32(tower):
        wanted = expected(tensors, weights[name])
        assert array.dtype == np.float32
        assert array.shape == weights[name].shape
        assert array.flags.c_contiguous
        np.testing.assert_array_equal(array, wanted.reshape(array.shape))
        ways.add((weights[name].how, weights[name].dtype))
    assert ways >= {("as_is", "F32"), ("as_is", "BF16"), ("stack", "BF16"), ("stack", "F32")}
    assert ("squeeze", "BF16") in ways


def test_raw_bits_are_the_files(made, tensors):
    store = WeightStore(made.engines.manifest)
    for name, tensor in tensors.items():
        raw = store.raw(name)
        bits = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
        np.testing.assert_array_equal(raw, bits.numpy())


def test_widening_keeps_special_values(made):
    """NaN, infinities, zeros of both signs and subnormals: bf16 is a float32 cut in half."""
    bits = np.arange(2**16, dtype=np.uint16)
    widened = np.empty(bits.shape, np.float32)
    _widen(bits, widened)
    wanted = torch.from_numpy(bits).view(torch.bfloat16).to(torch.float32).numpy()
    np.testing.assert_array_equal(widened.view(np.uint32), wanted.view(np.uint32))


def test_float32_is_not_copied(made):
    store = WeightStore(made.engines.manifest)
    weight = made.engines.manifest.weights["context"]["context_tower.layers.0.mixer.A_log"]
    assert weight.dtype == "F32"
    assert not store.float32(weight).flags.owndata


def test_memory_is_bounded_by_the_largest_weight(random_engines):
    big = random_engines("MEM*EM*E", hidden=64, seed=1, dtype="bfloat16")
    store = WeightStore(big.engines.manifest)
    weights = big.engines.manifest.weights["context"].values()
    sizes = [4 * math.prod(weight.shape) for weight in weights]
    tracemalloc.start()
    count = sum(1 for _ in store.all_float32("context"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == len(sizes)
    assert peak < 2.5 * max(sizes) < 0.5 * sum(sizes)


def test_progress_ends_at_the_total(made):
    seen = []
    list(WeightStore(made.engines.manifest).all_float32("denoiser", lambda *now: seen.append(now)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1]


def test_a_moved_checkpoint_is_found_by_its_new_place(copied):
    copied.check()


def test_a_missing_checkpoint_is_refused(made, tmp_path):
    with pytest.raises(CheckpointError, match=r"is not there; .* --checkpoint PATH"):
        WeightStore(made.engines.manifest, tmp_path / "gone").check()


def shard(copied, number=0):
    return sorted(copied.folder.glob("*.safetensors"))[number]


def test_a_missing_shard_is_refused(copied):
    shard(copied, 1).unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003.safetensors: .* is missing"):
        copied.check()


def test_a_truncated_shard_is_refused(copied):
    content = shard(copied).read_bytes()
    shard(copied).write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=rf"has {len(content) - 1} bytes, but {len(content)}"):
        copied.check()


def test_a_changed_header_is_refused(copied):
    """Two tensors of one shape change places: same size, same length of header."""
    path = shard(copied)
    header, start = read_header(path)
    data = path.read_bytes()[start:]
    shapes = {}
    for name, entry in header.items():
        if name != "__metadata__":
            shapes.setdefault((entry["dtype"], tuple(entry["shape"])), []).append(name)
    one, other = next(names for names in shapes.values() if len(names) > 1)[:2]
    header[one], header[other] = header[other], header[one]
    text = json.dumps(header, separators=(",", ":")).encode().ljust(start - 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    assert read_header(path)[1] == start
    with pytest.raises(CheckpointError, match="its header changed since export") as caught:
        copied.check()
    assert one in str(caught.value)
    assert other in str(caught.value)


def test_many_changed_tensors_are_listed_to_ten(copied):
    path = shard(copied)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"context_tower", b"c0ntext_tower"))
    with pytest.raises(CheckpointError, match=r"context_tower\..* and \d+ more") as caught:
        copied.check()
    assert str(caught.value).count("context_tower") == 10


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_changed_content_is_refused_with_the_tensors_name(copied, place):
    path = shard(copied, 2)
    header, start = read_header(path)
    names = [name for name in header if name != "__metadata__"]
    name = names[int(place * len(names))]
    begin, end = header[name]["data_offsets"]
    content = bytearray(path.read_bytes())
    middle = start + begin + (end - begin) // 2
    content[middle] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="its content changed since export") as caught:
        copied.check()
    assert name in str(caught.value)


def test_swapped_towers_are_refused(copied, made):
    """Each tower with the other's bytes: every header entry is as it was."""
    manifest = made.engines.manifest
    pairs = [
        (name, name.replace("context", "denoiser", 1))
        for name in manifest.tensors
        if name.startswith("context_tower")
    ]
    contents = {
        path.name: bytearray(path.read_bytes()) for path in copied.folder.glob("*.safetensors")
    }

    def place(name):
        entry = manifest.tensors[name]
        of = manifest.shards[entry.shard]
        return contents[of.file], slice(of.data_start + entry.begin, of.data_start + entry.end)

    for one, other in pairs:
        (file, where), (other_file, other_where) = place(one), place(other)
        file[where], other_file[other_where] = other_file[other_where], file[where]
    for name, content in contents.items():
        (copied.folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match="its content changed since export"):
        copied.check()


def test_what_is_no_safetensors_file_is_refused(tmp_path):
    for content in (
        b"",
        b"1234567",
        b"\xff" * 100,
        struct.pack("<Q", 50) + b"{}",
        struct.pack("<Q", 2) + b"[]",
    ):
        path = tmp_path / "x.safetensors"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="is no safetensors file, or was truncated"):
            read_header(path)
