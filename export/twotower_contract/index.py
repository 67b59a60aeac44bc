"""The files of a checkpoint's weights: those that its index names, and no others.

A folder may hold more that looks like weights: an optimizer's state, or the `._model-...` that
macOS leaves beside a file.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from twotower_contract.errors import CheckpointError, listed, printable
from twotower_contract.files import refuse_dangling
from twotower_contract.json_file import read_json

INDEX_FILE: Final = "model.safetensors.index.json"
SINGLE_FILE: Final = "model.safetensors"


def shard_files(folder: Path) -> list[str]:
    """Return the names of a checkpoint's shards, sorted.

    Raises:
        CheckpointError: There is neither an index nor a single file, or the index is malformed.
    """
    index = read_index(folder)
    return [SINGLE_FILE] if index is None else sorted(set(index.values()))


def read_index(folder: Path) -> dict[str, str] | None:
    """Return the index's map from tensor to file; None where the checkpoint is one file.

    Raises:
        CheckpointError: As for `shard_files`.
    """
    path = folder / INDEX_FILE
    refuse_dangling(path)
    if not path.exists():
        if (folder / SINGLE_FILE).exists() or (folder / SINGLE_FILE).is_symlink():
            return None
        others = sorted(one.name for one in folder.glob("*.safetensors"))
        raise CheckpointError(
            f"{folder}: is no checkpoint: it has neither {INDEX_FILE} nor {SINGLE_FILE}"
            + (f", only {listed(others)}; restore the index" if others else "; download it again")
        )
    weight_map = read_json(path, CheckpointError).values.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: has no `weight_map`; download the index again")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not re.fullmatch(r"[\w][\w.-]*\.safetensors", file):
            raise CheckpointError(
                f"{path}: {printable(name)} lies in {file!r:.120}, which is no safetensors file of "
                "this folder"
            )
    return weight_map
