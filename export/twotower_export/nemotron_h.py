"""Write the context tower as a standard Nemotron-H checkpoint.

The context tower is the frozen single-tower model, so with that model's names it is what
TensorRT-LLM's LLM API, vLLM and transformers load: the autoregressive baseline of the same weights.
Bytes are copied as they are, in pieces, whatever the size of the checkpoint.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Final

from twotower_contract.atomic import WITH_CARE, Writing, check_replaceable, new_folder
from twotower_contract.config import CONFIG_FILE, config_json
from twotower_contract.errors import BundleError
from twotower_contract.index import INDEX_FILE, SINGLE_FILE
from twotower_contract.json_file import format_of, read_json, write_json
from twotower_contract.layout import base_name, expected_tensors
from twotower_contract.quantized import HF_QUANT_FILE, codes_name, tensors_of
from twotower_contract.shards import TensorEntry
from twotower_contract.sizes import part_of
from twotower_export.checkpoint import Checkpoint
from twotower_export.progress import Progress, silent
from twotower_export.shard_writing import tensor_pieces, write_header
from twotower_export.tokens import tokenizer_files

SHARD_BYTES: Final = 5_000_000_000
ORIGIN_FILE: Final = "twotower.json"
FORMAT: Final = "twotower-nemotron-h"

# Keys of the two-tower model or of its remote code, none of which a plain Nemotron-H reader needs.
_DROPPED: Final = ("auto_map", "mask_token_id", "time_frequency_dim", "bidirectional_mamba")


Members = dict[str, TensorEntry]
"""Where the tensors of the new checkpoint come from, by their names in it."""


def write_nemotron_h(
    checkpoint: Checkpoint,
    out: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = silent,
    writing: Writing = WITH_CARE,
) -> None:
    """Write the context tower as a Nemotron-H checkpoint: configuration, shards, tokenizer.

    An output of this function that lies there already is replaced. Memory stays bounded; the disk
    needs room for the whole tower.

    Args:
        shard_bytes: Most tensor bytes per file, unless a single tensor has more.
        writing: Whether to replace whatever is there, or to write nothing.

    Raises:
        BundleError: `out` holds something else, or the disk is too small.
    """
    what = "a checkpoint from --target tensorrt-llm"
    check_replaceable(out, what, _is_ours, BundleError, writing)
    writing.begin(out, what)
    members = {
        base_name(stored): checkpoint.tensors[stored]
        for name in expected_tensors(checkpoint.config, ("context",), base=checkpoint.base)
        for stored in tensors_of(name, checkpoint.tensors)
    }
    total = sum(tensor.bytes for tensor in members.values())
    with new_folder(out, BundleError) as folder:
        free = shutil.disk_usage(folder).free
        if free < total:
            raise BundleError(
                f"{out}: the context tower takes {total / 1e9:.1f} GB and the disk has "
                f"{free / 1e9:.1f} GB left; name a folder on another disk"
            )
        _write_shards(checkpoint, members, folder, shard_bytes, progress)
        for file in tokenizer_files(checkpoint.path):
            shutil.copyfile(file, folder / file.name)
        write_json(folder / CONFIG_FILE, nemotron_h_config(checkpoint))
        if (checkpoint.path / HF_QUANT_FILE).is_file():
            settings = read_json(checkpoint.path / HF_QUANT_FILE).values
            write_json(folder / HF_QUANT_FILE, _with_base_names(settings, checkpoint))
        origin = {
            "format": FORMAT,
            "checkpoint": checkpoint.id or str(checkpoint.path),
            "revision": checkpoint.revision,
            "fingerprint": checkpoint.fingerprint,
        }
        write_json(folder / ORIGIN_FILE, origin)


def nemotron_h_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the source's `config.json` as one of `NemotronHForCausalLM`.

    Keys that the source lacks are filled in with what the towers compute.
    """
    source = read_json(checkpoint.path / CONFIG_FILE).values
    values = config_json(checkpoint.config) | source
    values["architectures"] = ["NemotronHForCausalLM"]
    for key in _DROPPED:
        values.pop(key, None)
    if "quantization_config" in values:
        settings = values["quantization_config"]
        values["quantization_config"] = _with_base_names(settings, checkpoint)
    ids = checkpoint.config.eos_token_ids
    values["eos_token_id"] = ids[0] if len(ids) == 1 else list(ids)
    return dict(sorted(values.items()))


def _with_base_names(value: Any, checkpoint: Checkpoint) -> Any:
    """Return settings in which modules of the context tower have their names in the new checkpoint.

    The other tower's are left out, from lists and as keys.
    """
    if isinstance(value, dict):
        return {
            name: _with_base_names(one, checkpoint)
            for key, one in value.items()
            if (name := _with_base_names(key, checkpoint)) is not None
        }
    if isinstance(value, list):
        return [name for one in value if (name := _with_base_names(one, checkpoint)) is not None]
    matrix = f"{value}.weight"
    if checkpoint.base or codes_name(matrix, checkpoint.tensors) not in checkpoint.tensors:
        return value
    is_ours = part_of(checkpoint.config, matrix)[0] == "context"
    return base_name(matrix).removesuffix(".weight") if is_ours else None


def _write_shards(
    checkpoint: Checkpoint,
    members: Members,
    folder: Path,
    shard_bytes: int,
    progress: Progress,
) -> None:
    files = _spread(members, shard_bytes)
    total = sum(tensor.bytes for tensor in members.values())
    done = 0
    for file, some in files.items():
        with (folder / file).open("wb") as target:
            write_header(target, {name: (one.dtype, one.shape) for name, one in some.items()})
            for tensor in some.values():
                for piece in tensor_pieces(checkpoint, tensor):
                    target.write(piece)
                    done += len(piece)
                    progress("copying megabytes", done // 10**6, total // 10**6)
    if len(files) > 1:
        weight_map = {name: file for file, some in files.items() for name in some}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / INDEX_FILE, index)


def _spread(members: Members, shard_bytes: int) -> dict[str, Members]:
    """Return members by file, in order, each file as full as may be."""
    groups: list[Members] = [{}]
    size = 0
    for name, tensor in members.items():
        if groups[-1] and size + tensor.bytes > shard_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = tensor
        size += tensor.bytes
    if len(groups) == 1:
        return {SINGLE_FILE: groups[0]}
    count = len(groups)
    return {f"model-{n:05d}-of-{count:05d}.safetensors": g for n, g in enumerate(groups, 1)}


def _is_ours(folder: Path) -> bool:
    return bool(format_of(folder / ORIGIN_FILE) == FORMAT)
