"""A full-size checkpoint made of holes: real names, shapes, headers and layout; no weights.

Its logical size is that of the released model, its real size a few megabytes, because every shard
is a header followed by a hole. It lies on disk as a Hugging Face cache does: a snapshot folder of
links into blobs. Run this file to make one:

    python -m tests.support.sparse_checkpoint FOLDER
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np

from twotower_contract.config import ModelConfig
from twotower_contract.layout import expected_tensors
from twotower_export.checkpoint import open_checkpoint

HUB_ID = "nvidia/Nemotron-Labs-TwoTower-30B-A3B-Base-BF16"
REVISION = "a203471" + "0" * 33
FULL_PATTERN = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
FULL_TENSORS = 12_544
FULL_PARAMETERS = 63_185_902_848
FLOAT32_SUFFIXES = ("A_log", "mixer.D", "dt_bias", "e_score_correction_bias")
"""Tensors whose stored dtype is not known for the released shards; float32 is the harder case."""

# The released configuration, key by key; written as text below, with its literal Infinity.
FULL_CONFIG: dict[str, Any] = {
    "architectures": ["NemotronHTwoTowerForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_nemotron_h.NemotronHConfig"},
    "bos_token_id": 1,
    "chunk_size": 128,
    "conv_kernel": 4,
    "eos_token_id": 2,
    "expand": 2,
    "head_dim": 128,
    "hidden_dropout": 0.0,
    "hidden_size": 2688,
    "hybrid_override_pattern": FULL_PATTERN,
    "initializer_range": 0.02,
    "intermediate_size": 1856,
    "layer_norm_epsilon": 1e-5,
    "mamba_head_dim": 64,
    "mamba_hidden_act": "silu",
    "mamba_num_heads": 64,
    "mamba_proj_bias": False,
    "mamba_ssm_cache_dtype": "float32",
    "max_position_embeddings": 262144,
    "mlp_bias": False,
    "mlp_hidden_act": "relu2",
    "model_type": "nemotron_h",
    "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712,
    "n_group": 1,
    "n_groups": 8,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "norm_eps": 1e-5,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 52,
    "num_key_value_heads": 2,
    "num_logits_to_keep": 1,
    "pad_token_id": 0,
    "partial_rotary_factor": 1.0,
    "rescale_prenorm_residual": True,
    "residual_in_fp32": False,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "sliding_window": None,
    "ssm_state_size": 128,
    "tie_word_embeddings": False,
    "time_step_floor": 1e-4,
    "time_step_limit": [0.0, math.inf],
    "time_step_max": 0.1,
    "time_step_min": 0.001,
    "topk_group": 1,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.55.4",
    "use_bias": False,
    "use_cache": True,
    "use_conv_bias": True,
    "use_mamba_kernels": True,
    "vocab_size": 131072,
}


def full_config(**changes: Any) -> ModelConfig:
    """The released configuration, with keys changed; `layers=N` keeps the first N layers."""
    layers = changes.pop("layers", len(FULL_PATTERN))
    pattern = FULL_PATTERN[:layers]
    values = FULL_CONFIG | {"hybrid_override_pattern": pattern, "num_hidden_layers": layers}
    return ModelConfig.from_json(values | changes)


def write_sparse_checkpoint(
    cache: Path,
    config_json: dict[str, Any] | None = None,
    *,
    shards: int = 24,
    float32_suffixes: tuple[str, ...] = FLOAT32_SUFFIXES,
) -> Path:
    """Write a checkpoint of holes as a Hugging Face cache.

    Args:
        cache: the cache's folder (`HF_HUB_CACHE`).
        config_json: its configuration; the released one by default.
        shards: number of files.
        float32_suffixes: tensors stored as float32; all others as bf16.

    Returns:
        The snapshot folder.
    """
    values = config_json or FULL_CONFIG
    repository = cache / f"models--{HUB_ID.replace('/', '--')}"
    snapshot = repository / "snapshots" / REVISION
    for folder in (repository / "blobs", repository / "refs", snapshot):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(REVISION)

    sizes = _stored(ModelConfig.from_json(values), float32_suffixes)
    total = sum(size for _, _, size in sizes.values())
    files: list[dict[str, tuple[str, tuple[int, ...], int]]] = [{}]
    filled = 0
    for name, entry in sizes.items():
        if filled >= total * len(files) / shards:
            files.append({})
        files[-1][name] = entry
        filled += entry[2]
    names = [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    for file, members in zip(names, files, strict=True):
        blob = repository / "blobs" / hashlib.sha256(file.encode()).hexdigest()
        _write_hole(blob, members)
        (snapshot / file).symlink_to(Path("../../blobs") / blob.name)
    weight_map = {n: file for file, members in zip(names, files, strict=True) for n in members}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    for file, text in (
        ("config.json", json.dumps(values, indent=2)),
        ("model.safetensors.index.json", json.dumps(index, indent=2)),
    ):
        blob = repository / "blobs" / hashlib.sha1(text.encode()).hexdigest()
        blob.write_text(text)
        (snapshot / file).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


def fill_random(snapshot: Path, layers: tuple[int, ...]) -> int:
    """Fill parts of a checkpoint of holes with random weights, in both towers.

    Embeddings, heads, final norms, time conditioning and these layers; some gigabytes where they
    hold a MoE layer.

    Args:
        snapshot: from `write_sparse_checkpoint`.
        layers: numbers of layers.

    Returns:
        Bytes written.
    """
    checkpoint = open_checkpoint(snapshot)
    block = np.random.default_rng(0).standard_normal(4_000_037, dtype=np.float32)
    filled = 0
    for name, tensor in checkpoint.tensors.items():
        layer = name.partition(".layers.")[2].partition(".")[0]
        layer = layer or name.partition("scale_shift_tables.")[2]
        if layer and int(layer) not in layers:
            continue
        # The same numbers over and over, from another place in each tensor: no two are equal.
        values = np.roll(block, -(filled // 2) % block.size) * np.float32(0.1)
        if name.endswith(("norm.weight", "norm_f.weight", "mixer.D")):
            values += 1
        elif name.endswith(("A_log", "dt_bias")):
            values = 10 * values - 1
        elif "embeddings" in name:
            values *= 10
        elif name.endswith(".weight"):
            deviation = 4.0 if "lm_head" in name else 1.0
            values *= np.float32(10 * deviation / math.sqrt(math.prod(tensor.shape[1:])))
        content = values.tobytes()
        if tensor.dtype == "BF16":  # cut off, which is a rounding as good as any here
            content = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
        shard = checkpoint.shards[tensor.shard]
        with (checkpoint.path / shard.file).open("r+b") as file:
            file.seek(shard.data_start + tensor.begin)
            left = tensor.end - tensor.begin
            filled += left
            while left:
                left -= file.write(content[:left])
    return filled


def _stored(
    config: ModelConfig, float32_suffixes: tuple[str, ...]
) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Dtype, shape and bytes by name."""
    stored = {}
    for name, shape in expected_tensors(config).items():
        dtype, item = ("F32", 4) if name.endswith(float32_suffixes) else ("BF16", 2)
        stored[name] = (dtype, shape, item * math.prod(shape))
    return stored


def _write_hole(path: Path, members: dict[str, tuple[str, tuple[int, ...], int]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    reached = 0
    for name, (dtype, shape, size) in members.items():
        offsets = [reached, reached + size]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        reached += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + reached)


if __name__ == "__main__":
    print(write_sparse_checkpoint(Path(sys.argv[1])))
