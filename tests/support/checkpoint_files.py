"""Checkpoints as plain files, made and damaged without torch or safetensors."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from twotower_contract.config import ModelConfig, config_json
from twotower_contract.layout import TOWERS, expected_tensors

INDEX = "model.safetensors.index.json"
ITEM = {"BF16": 2, "F16": 2, "F32": 4}


@dataclass(frozen=True)
class RawTensor:
    """A tensor as its bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def random_raw(shape, rng, dtype="BF16"):
    values = rng.standard_normal(math.prod(shape)).astype(np.float32)
    data = values.tobytes() if dtype == "F32" else (values.view(np.uint32) >> 16).astype(np.uint16)
    return RawTensor(dtype, tuple(shape), bytes(data))


def random_tensors(
    config: ModelConfig, seed=0, towers=TOWERS, base=False, float32=()
) -> dict[str, RawTensor]:
    rng = np.random.default_rng(seed)
    return {
        name: random_raw(shape, rng, "F32" if name.endswith(tuple(float32)) else "BF16")
        for name, shape in expected_tensors(config, towers, base=base).items()
    }


def write_shard(path: Path, tensors: dict[str, RawTensor]) -> None:
    header, reached = {}, 0
    for name, tensor in tensors.items():
        offsets = [reached, reached + len(tensor.data)]
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}
        reached += len(tensor.data)
    write_raw_shard(path, header, b"".join(tensor.data for tensor in tensors.values()))


def write_raw_shard(path: Path, header: dict, data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def write_checkpoint(
    folder: Path, config: ModelConfig, tensors: dict[str, RawTensor], shards: int = 3, **changes
) -> Path:
    """Write tensors, index and `config.json`; `changes` are keys of the latter (... removes)."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    size = -(-len(names) // shards)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        some = names[number * size : (number + 1) * size]
        write_shard(folder / file, {name: tensors[name] for name in some})
        weight_map |= dict.fromkeys(some, file)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    values = config_json(config) | changes
    values = {key: value for key, value in values.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def edit_index(folder: Path, edit) -> None:
    index = json.loads((folder / INDEX).read_text())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))
