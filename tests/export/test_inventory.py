"""Sizes of the released model, against figures that were published or computed by hand."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from tests.support.checkpoint_files import random_tensors, write_checkpoint
from tests.support.sparse_checkpoint import full_config
from twotower_contract.layout import expected_tensors
from twotower_export.checkpoint import open_checkpoint
from twotower_export.cli.export import inspect
from twotower_export.inspection_text import report
from twotower_export.inventory import fitting_skus, take_inventory
from twotower_export.tiny.checkpoints import tiny_config


@pytest.fixture(scope="module")
def released():
    config = full_config()
    tensors = {name: ("BF16", shape) for name, shape in expected_tensors(config).items()}
    return take_inventory(config, tensors)


def test_whole_model(released):
    assert released.parameters == 63_185_902_848
    assert released.bytes == 126_371_805_696
    assert round(released.bytes / 2**30, 2) == 117.69
    assert released.dtypes == {"BF16": 12_544}


def test_towers(released):
    context = {part.name: part for part in released.parts if part.tower == "context"}
    denoiser = {part.name: part for part in released.parts if part.tower == "denoiser"}
    assert sum(part.parameters for part in context.values()) == 31_577_940_288
    assert released.bytes_of_tower("context") == 63_155_880_576
    assert released.bytes_of_tower("denoiser") == 63_155_880_576 + 60_044_544
    assert denoiser["time conditioning"].parameters == 30_022_272
    assert context.keys() == denoiser.keys() - {"time conditioning"}


@pytest.mark.parametrize(
    ("name", "parameters", "layers"),
    [
        ("mamba", 38_742_208, 23),
        ("attention", 23_396_352, 6),
        ("routed experts", 1_277_165_568, 23),
        ("shared experts", 19_955_712, 23),
        ("router", 344_064 + 128, 23),
        ("norms", 2688, 53),
        ("embeddings", 352_321_536, 1),
        ("head", 352_321_536, 1),
    ],
)
def test_parts(released, name, parameters, layers):
    for tower in ("context", "denoiser"):
        (part,) = [p for p in released.parts if (p.tower, p.name) == (tower, name)]
        assert part.parameters == parameters * layers
        assert part.bytes == 2 * parameters * layers


def test_costs_as_people_read_them(released):
    """68.6 of 128 experts are expected for 16 tokens: between 31 GB at 60 and 45 GB at 90.

    Three of the four columns of the released convolution cache are kept: 828 KiB of 1.08 MiB.
    """
    found = {
        **{"kind": "checkpoint", "path": "x", "towers": ["context", "denoiser"]},
        "skus": {"one": [], "one_per_tower": []},
        **{"fingerprint": "0" * 64, "shards": 24, "model": {"pattern": "M"}, "dtype": "bfloat16"},
        **{"mask_token_id": 3, "eos_token_ids": [2], "sizes": released.as_json()},
    }
    text = report(json.loads(json.dumps(found)))
    for figure in (
        "mamba 38,742,208, attention 23,396,352, mixture of experts 1,297,465,472, expert 9,977,",
        "a token uses 3.58 G parameters, 3.228 G without embeddings, 2.875 G without embeddings",
        "reads 6.456 GB for a token, 35.2 GB and 103.3 GFLOP for 16",
        "6,144 bytes per token, 162,760 tokens per gigabyte",
        "60: 31.24 GB, 69: 35.37 GB, 90: 45.01 GB, 128: 62.45 GB",
        "24 MiB at 4K, 192 MiB at 32K, 768 MiB at 128K, 1.5 GiB at 256K",
        "46 MiB of Mamba, 828 KiB of convolutions",
        "logits of a block of 16: 8 MiB",
        "126,371,805,696    117.69",
    ):
        assert figure in text, figure


def test_float32_tensors_weigh_twice(released):
    config = released.config
    tensors = {
        name: ("F32" if name.endswith("A_log") else "BF16", shape)
        for name, shape in expected_tensors(config).items()
    }
    assert take_inventory(config, tensors).bytes == released.bytes + 2 * 46 * 64


def test_gpus_that_could_hold_the_released_model(released):
    fit = fitting_skus(released)
    assert fit is not None
    assert "h200" in fit.one
    assert not {"a100-80", "h100-sxm", "dgx-spark", "l4"} & set(fit.one)
    assert {"a100-80", "h100-sxm"} <= set(fit.one_per_tower)
    assert not {"l4", "h200"} & set(fit.one_per_tower)


@pytest.mark.parametrize("pattern", ["M", "*", "E", "ME*"])
def test_inspect_adds_up_for_any_pattern(tmp_path, pattern):
    config = tiny_config(pattern, hidden=16)
    folder = write_checkpoint(tmp_path / "c", config, random_tensors(config))
    result = CliRunner().invoke(inspect, [str(folder), "--json"])
    assert result.exit_code == 0, result.output
    sizes = json.loads(result.stdout)["sizes"]
    stored = sum(t.end - t.begin for t in open_checkpoint(folder).tensors.values())
    parts = [part for tower in sizes["towers"].values() for part in tower["parts"].values()]
    assert sizes["bytes"] == stored == sum(part["bytes"] for part in parts)
    text = CliRunner().invoke(inspect, [str(folder)])
    assert text.exit_code == 0, text.output
    assert f"{sizes['bytes']:,}" in text.stdout
    if "*" not in pattern:
        assert sizes["tokens_per_context_gigabyte"] is None


def test_inspect_of_the_base_checkpoint_counts_one_tower(tmp_path):
    config = tiny_config("ME*", hidden=16)
    tensors = random_tensors(config, towers=("context",), base=True)
    folder = write_checkpoint(tmp_path / "base", config, tensors)
    found = json.loads(CliRunner().invoke(inspect, [str(folder), "--json"]).stdout)
    assert found["base"] is True
    assert list(found["sizes"]["towers"]) == ["context"]
    assert found["sizes"]["towers"]["context"]["parts"]["head"]["tensors"] == 1
