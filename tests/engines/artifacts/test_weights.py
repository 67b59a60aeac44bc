"""Weights out of mapped shards: the right bytes, little memory, only of the right checkpoint."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import struct
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from twotower_contract.errors import CheckpointError
from twotower_contract.shards import read_header, sample_digest
from twotower_engines.artifacts import weights
from twotower_engines.artifacts.weights import WeightStore, widen
from twotower_engines.runtime.interface import ExtendRow
from twotower_engines.runtime.opening import open_runtime


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
    widen(bits, widened)
    wanted = torch.from_numpy(bits).view(torch.bfloat16).to(torch.float32).numpy()
    np.testing.assert_array_equal(widened.view(np.uint32), wanted.view(np.uint32))


def test_only_large_float32_stays_in_its_file(made, monkeypatch):
    store = WeightStore(made.engines.manifest)
    weight = made.engines.manifest.weights["context"]["context_tower.layers.0.mixer.A_log"]
    assert weight.dtype == "F32"
    assert store.float32(weight).flags.owndata
    stored = made.engines.manifest.weights["context"]
    assert store.mapped_bytes("context", stored) == 0
    monkeypatch.setattr(weights, "COPIED_BYTES", 0)
    assert not store.float32(weight).flags.owndata
    views = {n: w for n, w in stored.items() if w.dtype == "F32" and w.how != "stack"}
    sizes = [4 * math.prod(weight.shape) for weight in views.values()]
    assert store.mapped_bytes("context", stored) == sum(sizes)
    assert store.mapped_bytes("context", list(views)[:2]) == sum(sizes[:2])


def test_what_stays_in_its_file_is_said(random_engines, monkeypatch, capsys):
    made = random_engines("M", seed=7, dtype="float32")
    open_runtime(made.engines, threads=1).close()
    assert "used where they lie" not in capsys.readouterr().err
    monkeypatch.setattr(weights, "COPIED_BYTES", 0)
    open_runtime(made.engines, threads=1).close()
    said = capsys.readouterr().err
    assert f"leave the files in {made.checkpoint} as they are while these engines run" in said


def test_engines_are_deaf_to_files_that_change_later(made, tmp_path):
    checkpoint = shutil.copytree(made.checkpoint, tmp_path / "checkpoint")
    runtime = open_runtime(made.engines, checkpoint, threads=1)
    ids = np.arange(5, dtype=np.int32)
    (before,) = runtime.extend([ExtendRow(0, ids, logits=True)])
    for path in checkpoint.glob("*.safetensors"):
        path.write_bytes(b"\xff" * 100)  # truncated and overwritten: a mapped page would be gone
    runtime.reset(0)
    (after,) = runtime.extend([ExtendRow(0, ids, logits=True)])
    np.testing.assert_array_equal(before, after)
    runtime.close()


@pytest.mark.parametrize("change", ["replaced", "rewritten"])
def test_a_file_that_changes_while_it_is_read_is_refused(copied, change):
    copied.check()
    path = shard(copied)
    content = path.read_bytes()
    if change == "replaced":
        path.unlink()
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="was changed while it was read"):
        list(copied.all_float32("context"))


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
        if name != "__metadata__" and ".experts." not in name:
            shapes.setdefault((entry["dtype"], tuple(entry["shape"])), []).append(name)
    one, other = next(names for names in shapes.values() if len(names) > 1)[:2]
    header[one], header[other] = header[other], header[one]
    text = json.dumps(header, separators=(",", ":")).encode().ljust(start - 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    assert read_header(path)[1] == start
    with pytest.raises(CheckpointError, match="2 of its tensors changed places") as caught:
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


def place_contents(copied, content_of):
    """Give tensors the content of others of the same size; every header entry stays as it is."""
    manifest = copied.manifest
    files = {path: path.read_bytes() for path in copied.folder.glob("*.safetensors")}
    changed = {path: bytearray(content) for path, content in files.items()}

    def place(name):
        entry = manifest.tensors[name]
        of = manifest.shards[entry.shard]
        start = of.data_start
        return copied.folder / of.file, slice(start + entry.begin, start + entry.end)

    for name, other in content_of.items():
        (file, where), (source, from_where) = place(name), place(other)
        changed[file][where] = files[source][from_where]
    for path, content in changed.items():
        path.write_bytes(content)


def swapped(names):
    """Each tensor of the towers with its counterpart's content."""
    pairs = {n: n.replace("context", "denoiser", 1) for n in names if n.startswith("context_tower")}
    return pairs | {other: name for name, other in pairs.items()}


HEADS = {
    "lm_head.weight": "context_lm_head.weight",
    "context_lm_head.weight": "lm_head.weight",
}


@pytest.mark.parametrize(
    ("heads", "message"),
    [(HEADS, "has the other one's tensors; "), ({}, "other one's tensors, but its own head; ")],
)
def test_swapped_towers_are_named(copied, heads, message):
    place_contents(copied, swapped(copied.manifest.tensors) | heads)
    with pytest.raises(CheckpointError, match="its towers are swapped: ") as caught:
        copied.check()
    assert message in str(caught.value)


def test_swapped_heads_are_no_swapped_towers(copied):
    place_contents(copied, HEADS)
    with pytest.raises(CheckpointError, match="2 of its tensors changed places: ") as caught:
        copied.check()
    assert "towers are swapped" not in str(caught.value)


def test_equal_towers_are_no_swapped_towers(copied):
    both = {n: o for n, o in swapped(copied.manifest.tensors).items() if n.startswith("denoiser")}
    place_contents(copied, both)
    with pytest.raises(CheckpointError, match="its content changed since export"):
        copied.check()


def test_shuffled_experts_are_named(copied):
    bank = "denoiser_tower.layers.1.mixer.experts."
    count = copied.manifest.model.num_experts
    turned = {
        f"{bank}{i}.down_proj.weight": f"{bank}{(i + 1) % count}.down_proj.weight"
        for i in range(count)
    }
    place_contents(copied, turned)
    with pytest.raises(CheckpointError, match="its experts are shuffled: ") as caught:
        copied.check()
    assert "denoiser_tower.layers.1.mixer (down_proj.weight)" in str(caught.value)


def test_experts_that_moved_to_another_layer_are_not_shuffled_ones(copied):
    one = "context_tower.layers.{}.mixer.experts.0.up_proj.weight"
    place_contents(copied, {one.format(1): one.format(3), one.format(3): one.format(1)})
    with pytest.raises(CheckpointError, match="2 of its tensors changed places"):
        copied.check()


def test_the_same_weights_in_other_files_are_recognised(copied, tensors):
    for path in copied.folder.glob("*.safetensors"):
        path.unlink()
    save_file(tensors, copied.folder / "model.safetensors")
    message = "holds the same weights in other files: .* of model.safetensors, .* export this"
    with pytest.raises(CheckpointError, match=message):
        copied.check()


def test_other_content_between_samples_is_not_other_files(copied):
    """A byte that a sample of the file meets, and no sample of a tensor: nothing moved."""
    path, of = shard(copied), copied.manifest.shards[0]
    content = path.read_bytes()
    large = [e for e in copied.manifest.tensors.values() if e.shard == 0 and e.end - e.begin > 4096]
    for start in (of.data_start + entry.begin for entry in large):
        path.write_bytes(content[:start] + bytes([content[start] ^ 1]) + content[start + 1 :])
        if sample_digest(path) != of.sample_sha256:
            break
    else:
        pytest.fail("no sample of the file meets the beginning of a large tensor")
    with pytest.raises(CheckpointError, match="its content changed since export"):
        copied.check()


def test_a_cache_names_another_content(made, tmp_path):
    """A snapshot's shards are links to blobs that are called by their sha256."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for path in made.checkpoint.glob("*.safetensors"):
        blob = tmp_path / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copyfile(path, blob)
        (tmp_path / "snapshot" / path.name).symlink_to(blob)
    manifest = made.engines.manifest
    shards = tuple(
        replace(one, sha256=(tmp_path / "snapshot" / one.file).resolve().name)
        for one in manifest.shards
    )
    WeightStore(replace(manifest, shards=shards), tmp_path / "snapshot").check()
    other = (shards[0], replace(shards[1], sha256="e" * 64), *shards[2:])
    with pytest.raises(CheckpointError, match=r"is another file than at export: .* then eeee"):
        WeightStore(replace(manifest, shards=other), tmp_path / "snapshot").check()
