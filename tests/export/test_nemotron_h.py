"""The context tower as a plain Nemotron-H checkpoint: loaded by transformers, byte for byte ours.

TensorRT-LLM and vLLM cannot run here; they read the same files through the same configuration.
"""

from __future__ import annotations

import json
import math
from collections import namedtuple

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from tests.support.checkpoint_files import random_tensors, write_checkpoint
from tests.support.measured import run_measured
from tests.support.sparse_checkpoint import FULL_CONFIG, write_sparse_checkpoint
from tests.support.torch_generation import load_towers
from twotower_contract.errors import BundleError
from twotower_contract.layout import base_name
from twotower_engines.planning.model_size import read_model_size
from twotower_export import nemotron_h
from twotower_export.checkpoint import open_checkpoint
from twotower_export.cli.export import export
from twotower_export.nemotron_h import write_nemotron_h
from twotower_export.reference.towers import empty_states
from twotower_export.tiny.checkpoints import tiny_config, write_random_checkpoint

pytestmark = pytest.mark.usefixtures("quick_exports")

CONFIG = tiny_config("ME*", hidden=16)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nemotron") / "checkpoint"
    return open_checkpoint(write_checkpoint(folder, CONFIG, random_tensors(CONFIG)))


@pytest.mark.parametrize(
    ("pattern", "dtype"), [("MEM*EM*E", "bfloat16"), ("*E", "float32"), ("MM", "float32")]
)
def test_transformers_loads_it_and_agrees(tmp_path, pattern, dtype):
    """Logits of every position, in float32, of the model that transformers makes of the files.

    One setting is overridden: transformers takes `time_step_min`, which initialises training, as a
    lower bound of the time step at inference; NVIDIA's code does not.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    write_random_checkpoint(tmp_path / "c", pattern, hidden=32, seed=5, dtype=dtype)
    out = tmp_path / "out"
    write_nemotron_h(open_checkpoint(tmp_path / "c"), out, shard_bytes=100_000)
    theirs, loading = AutoModelForCausalLM.from_pretrained(
        out, time_step_min=1e-9, dtype=torch.float32, output_loading_info=True
    )
    assert type(theirs).__name__ == "NemotronHForCausalLM"
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not loading[problem], loading[problem]
    towers = load_towers(tmp_path / "c")
    ids = torch.from_numpy(np.random.default_rng(1).integers(4, 700, (2, 23)))
    lengths, past = torch.full((2,), 23), torch.zeros(2, dtype=torch.long)
    with torch.no_grad():
        expected = theirs.eval()(ids, use_cache=False).logits
        states = empty_states(towers.config, 2, 32, torch.float32)
        hidden, _ = towers.context.every_position(ids, lengths, past, states)
        logits = towers.context.context_lm_head(hidden)
    assert (logits - expected).abs().max() < 2e-5 * expected.abs().max()
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.decode(tokenizer("a small text")["input_ids"]).endswith("a small text")


@pytest.mark.parametrize("shard_bytes", [1, 20_000, 10**9])
def test_bytes_are_the_context_towers(tmp_path, checkpoint, shard_bytes):
    write_nemotron_h(checkpoint, tmp_path / "out", shard_bytes=shard_bytes)
    written = open_checkpoint(tmp_path / "out")
    assert (written.towers, written.base) == (("context",), True)
    ours = [name for name in checkpoint.tensors if name.startswith("context_")]
    assert {base_name(name) for name in ours} == set(written.tensors)
    for name in ours:
        assert content(written, base_name(name)) == content(checkpoint, name), name
    if shard_bytes == 1:
        assert len(written.shards) == len(ours), "one tensor per file"
    elif shard_bytes == 20_000:
        assert 1 < len(written.shards) < len(ours)
        alone = [t.shard for t in written.tensors.values() if t.end - t.begin > 20_000]
        for number, shard in enumerate(written.shards):
            assert number in alone or shard.size - shard.data_start <= 20_000
        assert len(alone) == len(set(alone)) == 2, "embeddings and head are larger than a file"
    else:
        assert [shard.file for shard in written.shards] == ["model.safetensors"]


def content(checkpoint, name):
    tensor = checkpoint.tensors[name]
    shard = checkpoint.shards[tensor.shard]
    data = (checkpoint.path / shard.file).read_bytes()[shard.data_start :]
    return data[tensor.begin : tensor.end]


def test_safetensors_reads_it(tmp_path, checkpoint):
    from safetensors import safe_open

    write_nemotron_h(checkpoint, tmp_path / "out")
    with safe_open(tmp_path / "out/model.safetensors", framework="pt") as shard:
        assert shard.get_tensor("backbone.norm_f.weight").shape == (16,)
        assert shard.metadata() == {"format": "pt"}


def test_base_checkpoint_passes_through(tmp_path):
    tensors = random_tensors(CONFIG, towers=("context",), base=True)
    opened = open_checkpoint(write_checkpoint(tmp_path / "base", CONFIG, tensors))
    write_nemotron_h(opened, tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").fingerprint == opened.fingerprint


def test_configuration_keeps_the_sources_and_drops_remote_code(tmp_path):
    small = {"hybrid_override_pattern": "M", "num_hidden_layers": 1, "vocab_size": 32}
    snapshot = write_sparse_checkpoint(tmp_path, FULL_CONFIG | small, shards=1)
    values = nemotron_h.nemotron_h_config(open_checkpoint(snapshot))
    assert values["architectures"] == ["NemotronHForCausalLM"]
    assert "auto_map" not in values
    kept = {k: v for k, v in (FULL_CONFIG | small).items() if k not in ("auto_map",)}
    assert values == kept | {"architectures": ["NemotronHForCausalLM"]}
    assert values["time_step_limit"] == [0.0, math.inf]


def test_replaces_its_own_output_only(tmp_path, checkpoint):
    out = tmp_path / "out"
    write_nemotron_h(checkpoint, out)
    origin = json.loads((out / "twotower.json").read_text())
    assert origin["fingerprint"] == checkpoint.fingerprint
    write_nemotron_h(checkpoint, out)
    with pytest.raises(BundleError, match="holds files that are not a checkpoint from"):
        write_nemotron_h(checkpoint, checkpoint.path)
    assert [one.name for one in tmp_path.iterdir()] == ["out"]


def test_small_disk_is_refused_before_anything_is_copied(tmp_path, checkpoint, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(nemotron_h.shutil, "disk_usage", lambda _: usage(1000, 900, 100))
    with pytest.raises(BundleError, match=r"the disk has 0\.0 GB left"):
        write_nemotron_h(checkpoint, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_command_writes_it(tmp_path, checkpoint):
    arguments = [str(checkpoint.path), str(tmp_path / "out"), "--target", "tensorrt-llm", "--json"]
    result = CliRunner().invoke(export, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["towers"] == ["context"]
    assert open_checkpoint(tmp_path / "out").base


def test_memory_is_bounded(tmp_path):
    """A tower of 440 MB passes through a process that holds less than 150 MB."""
    sizes = {"hidden_size": 2048, "vocab_size": 51_200, "moe_intermediate_size": 512}
    small = {"hybrid_override_pattern": "*", "num_hidden_layers": 1}
    snapshot = write_sparse_checkpoint(tmp_path, FULL_CONFIG | sizes | small, shards=2)
    done = run_measured("export", snapshot, tmp_path / "out", "--target", "tensorrt-llm")
    size = sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    assert size > 440e6
    assert done.peak_bytes < 150e6


def test_what_transformers_5_saves_is_a_context_tower(tmp_path):
    """Its configuration has `layers_block_type`, and neither a pattern nor a number of layers."""
    from transformers import NemotronHConfig, NemotronHForCausalLM

    sizes = {
        "hidden_size": 32, "head_dim": 8, "ssm_state_size": 8, "mamba_num_heads": 4,
        "mamba_head_dim": 8, "n_groups": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "n_routed_experts": 4, "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16,
    }  # fmt: skip
    layers = ["linear_attention", "moe", "full_attention", "moe"]
    config = NemotronHConfig(vocab_size=300, layers_block_type=layers, dtype="bfloat16", **sizes)
    NemotronHForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    assert "hybrid_override_pattern" not in json.loads((tmp_path / "config.json").read_text())
    opened = open_checkpoint(tmp_path)
    assert (opened.config.pattern, opened.towers, opened.base) == ("ME*E", ("context",), True)
    assert read_model_size(tmp_path).towers == ("context",)
