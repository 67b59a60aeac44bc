"""Reading quantized checkpoints: what ModelOpt wrote, and what is refused by the tensor's name."""

from __future__ import annotations

import json
import shutil

import ml_dtypes
import numpy as np
import pytest

from tests.support.checkpoint_files import RawTensor, random_raw, random_tensors, write_checkpoint
from tests.support.quantized_checkpoint import write_nano
from tests.support.sabotage import run
from twotower_contract.errors import CheckpointError
from twotower_contract.manifest import read_manifest
from twotower_contract.quantized import decode, scale_names
from twotower_contract.shards import read_header
from twotower_engines.artifacts.weights import WeightStore
from twotower_export.bundle import write_bundle
from twotower_export.checkpoint import open_checkpoint
from twotower_export.nemotron_h import write_nemotron_h
from twotower_export.quantization.recipe import default_recipe
from twotower_export.quantization.writing import quantize_checkpoint
from twotower_export.reference.mapped import NamedTensors
from twotower_export.tiny.checkpoints import tiny_config

pytestmark = pytest.mark.usefixtures("quick_exports")

CONFIG = tiny_config("MM*E", hidden=32)
BASE_UP = "backbone.layers.3.mixer.experts.1.up_proj.weight"
SCALE = f"{BASE_UP}_scale"


def scalar(value):
    return RawTensor("F32", (), np.float32(value).tobytes())


BROKEN = {
    "no scale": (lambda t: t.pop(f"{BASE_UP}_scale"), rf"{BASE_UP}_scale is missing, without"),
    "no scale of scales": (
        lambda t: t.pop(f"{BASE_UP}_scale_2"),
        rf"{BASE_UP}_scale_2 is missing, without which {BASE_UP} cannot be read",
    ),
    "swapped scales": (
        lambda t: t.update(
            {
                f"{BASE_UP}_scale": t[f"{BASE_UP}_scale_2"],
                f"{BASE_UP}_scale_2": t[f"{BASE_UP}_scale"],
            }
        ),
        rf"{BASE_UP}_scale has shape \[\], not",
    ),
    "another matrix's scale": (
        lambda t: t.update({f"{BASE_UP}_scale": t[f"{BASE_UP.replace('up', 'down')}_scale"]}),
        rf"{BASE_UP}_scale has shape",
    ),
    "a zero": (lambda t: t.update({f"{BASE_UP}_scale_2": scalar(0)}), "_scale_2 is 0"),
    "no number": (lambda t: t.update({f"{BASE_UP}_scale_2": scalar(np.nan)}), "_scale_2 is nan"),
    "negative": (lambda t: t.update({f"{BASE_UP}_scale_2": scalar(-1)}), "_scale_2 is -1"),
    "embeddings": (
        lambda t: t.update(
            {
                "backbone.embeddings.weight": RawTensor(
                    "F8_E4M3",
                    t["backbone.embeddings.weight"].shape,
                    bytes(len(t["backbone.embeddings.weight"].data) // 2),
                )
            }
        ),
        r"backbone\.embeddings\.weight is F8_E4M3, not BF16 or F32",
    ),
    "mixed experts": (
        lambda t: (
            t.update({BASE_UP: random_raw((64, 32), np.random.default_rng(0))}),
            t.pop(f"{BASE_UP}_scale"),
            t.pop(f"{BASE_UP}_scale_2"),
        ),
        "mixes BF16 and U8 over its experts",
    ),
    "a scale of another scheme": (
        lambda t: t.update({BASE_UP.replace("weight", "pre_quant_scale"): scalar(1)}),
        "up_proj.pre_quant_scale is unknown",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint_is_refused(tmp_path, monkeypatch, name):
    change, message = BROKEN[name]
    config = tiny_config("MM*E", hidden=32, moe_intermediate_size=64)

    def damaged(folder, config, tensors, **settings):
        write_checkpoint(tmp_path / "whole", config, tensors, **settings)
        change(tensors)
        return write_checkpoint(folder, config, tensors, **settings)

    monkeypatch.setattr("tests.support.quantized_checkpoint.write_checkpoint", damaged)
    folder = write_nano(tmp_path / "broken", config, "NVFP4")
    open_checkpoint(tmp_path / "whole")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


@pytest.mark.parametrize("algorithm", ["FP8", "NVFP4"])
def test_what_modelopt_wrote_exports_as_a_context_tower(tmp_path, algorithm):
    folder = write_nano(tmp_path / "nano", CONFIG, algorithm)
    opened = open_checkpoint(folder)
    assert (opened.towers, opened.base) == (("context",), True)
    manifest = write_bundle(opened, tmp_path / "bundle")
    weight = manifest.weights["context"]["context_tower.layers.3.mixer.experts.up_proj"]
    assert weight.format == {"FP8": "fp8", "NVFP4": "nvfp4"}[algorithm]
    store = WeightStore(manifest)
    store.check()
    source = weight.sources[1]
    codes, *scales = (store.raw(name) for name in (source, *scale_names(source, weight.dtype)))
    if algorithm == "FP8":
        plain = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * scales[0]
    else:
        nibbles = np.stack([codes & 15, codes >> 4], -1).reshape(len(codes), -1)
        values = nibbles.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
        steps = scales[0].view(ml_dtypes.float8_e4m3fn).astype(np.float32) * scales[1]
        plain = values * np.repeat(steps, 16, axis=1)
    np.testing.assert_array_equal(store.float32(weight)[1], plain)


@pytest.mark.parametrize("format_", ["fp8", "nvfp4", "int4"])
def test_a_quantized_context_tower_leaves_as_nemotron_h(format_, tmp_path):
    """Its settings name the modules as the new checkpoint does, and the other tower's are gone."""
    source = open_checkpoint(write_checkpoint(tmp_path / "c", CONFIG, random_tensors(CONFIG)))
    out = tmp_path / "quantized"
    quantize_checkpoint(source, out, default_recipe(source, format_))
    write_nemotron_h(open_checkpoint(out), tmp_path / "out")
    header, _ = read_header(tmp_path / "out" / "model.safetensors")
    assert all(name.startswith(("backbone.", "lm_head", "__")) for name in header)
    values = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert "lm_head" in values["ignore"]
    assert "backbone.layers.2.mixer.q_proj" in values["ignore"]
    assert not any("tower" in name or "t_block" in name for name in values["ignore"])
    reopened = open_checkpoint(tmp_path / "out")
    name = "context_tower.layers.3.mixer.experts.0.up_proj.weight"
    assert NamedTensors(reopened.path).read(name).equal(NamedTensors(out).read(name))
    has_settings = (tmp_path / "out" / "hf_quant_config.json").exists()
    assert has_settings == (format_ != "int4")


def bundle_of(folder, format_):
    """A quantized checkpoint and its bundle, as `twotower verify` takes them."""
    config = tiny_config("ME", hidden=32)
    source = open_checkpoint(write_checkpoint(folder / "source", config, random_tensors(config)))
    quantize_checkpoint(source, folder / "checkpoint", default_recipe(source, format_))
    write_bundle(open_checkpoint(folder / "checkpoint"), folder / "bundle", towers=["context"])
    return folder


@pytest.fixture(scope="module")
def verified(tmp_path_factory):
    return bundle_of(tmp_path_factory.mktemp("verified"), "nvfp4")


@pytest.mark.parametrize("format_", ["fp8", "nvfp4"])
def test_a_quantized_bundle_is_verified(verified, tmp_path, format_):
    """The graphs on our decoding against the towers on PyTorch's; FP8 goes into the native one."""
    report = run(verified if format_ == "nvfp4" else bundle_of(tmp_path, format_), whole_bytes=0)
    assert report.outcome.passed
    assert {tensor.precision for tensor in report.outcome.tensors} == {"float32", "bfloat16"}


WRONG = {
    "the other half of a byte first": (
        lambda numpy, dtype, codes, scales: decode(
            numpy, dtype, codes >> 4 | codes << 4 if dtype == "U8" else codes, scales
        )
    ),
    "no scale of the scales": (
        lambda numpy, dtype, codes, scales: decode(
            numpy, dtype, codes, [scales[0], numpy.ones_like(scales[1])]
        )
    ),
    "a neighbour's scales": (
        lambda numpy, dtype, codes, scales: decode(
            numpy, dtype, codes, [numpy.roll(scales[0], 1), scales[1]]
        )
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_decoding_is_found_in_its_layers(verified, monkeypatch, name):
    monkeypatch.setattr("twotower_export.verification.graphs.decode", WRONG[name])
    report = run(verified, whole_bytes=0)
    assert not report.outcome.passed
    parts = {tensor.part for tensor in report.outcome.tensors if not tensor.passed}
    assert parts == {"context.layers.0", "context.layers.1"}


def test_bytes_that_changed_after_the_export_are_found_by_name(verified, tmp_path):
    shutil.copytree(verified / "checkpoint", tmp_path / "checkpoint")
    name = "context_tower.layers.1.mixer.experts.0.up_proj.weight"
    opened = open_checkpoint(tmp_path / "checkpoint")
    entry = opened.tensors[name]
    shard = opened.shards[entry.shard]
    path = opened.path / shard.file
    content = np.fromfile(path, np.uint8)
    codes = content[shard.data_start + entry.begin : shard.data_start + entry.end]
    codes[:] = codes >> 4 | codes << 4
    content.tofile(path)
    with pytest.raises(CheckpointError, match=rf"its content changed since export .* in {name}"):
        WeightStore(read_manifest(verified / "bundle"), opened.path).check()
