"""Engines made on the way: `twotower run CHECKPOINT` exports and builds once, then finds them.

```
$XDG_CACHE_HOME/twotower/<key>/{bundle,engines}
```
The key is a digest of the checkpoint's files (headers and samples, not 126 GB) and of the installed
twotower. Export and build run as processes of their own, `twotower export` and `twotower build`:
the packages share files, not code.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from twotower_contract.atomic import partial_folder, put_in_place
from twotower_contract.config import CONFIG_FILE
from twotower_contract.engine_set import BUILD_FILE
from twotower_contract.errors import CheckpointError
from twotower_contract.files import read_file
from twotower_contract.index import shard_files
from twotower_contract.processes import run_child
from twotower_contract.shards import read_header, sample_digest
from twotower_engines.artifacts.cache_root import cache_root, in_cache
from twotower_engines.building.code_digest import code_digest
from twotower_engines.errors import BuildError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")
SKU = "cpu"
CODE = ("twotower_contract/**/*.py", "twotower_export/**/*.py", "twotower_engines/**/*.py")
"""Sources that make engines."""


def is_hub_id(name: str) -> bool:
    """Whether a name that is no folder can be one on the Hugging Face hub."""
    return HUB_ID.fullmatch(name) is not None


def cached_engines(checkpoint: str, root: Path | None = None) -> Path:
    """Return engines for the CPU of a checkpoint; export and build them where there are none yet.

    Args:
        checkpoint: A folder, or a hub id `owner/name@revision`.
        root: The cache; `cache_root()` where not given.

    Returns:
        The folder that holds build.json.

    Raises:
        CheckpointError: It is no checkpoint, or it cannot be exported.
        BuildError: The engines cannot be built.
    """
    folder = (root if root is not None else cache_root()) / _key(checkpoint)
    engines = folder / "engines" / SKU
    if (engines / BUILD_FILE).is_file():
        return engines
    if root is None:
        in_cache()
    print(f"exporting and building {checkpoint} into {folder}", file=sys.stderr)
    with partial_folder(folder.parent) as work:
        made = work / folder.name
        made.mkdir()
        bundle = str(made / "bundle")
        _run_verb(["export", checkpoint, bundle], CheckpointError)
        _run_verb(["build", bundle, "--sku", SKU, str(made / "engines")], BuildError)
        put_in_place(made, folder, replace=False)  # another one's engines are the same
    if not (engines / BUILD_FILE).is_file():
        raise BuildError(f"{folder}: exists, but holds no engines; delete it and run again")
    return engines


def _key(checkpoint: str) -> str:
    """Return the name of a checkpoint's place in the cache."""
    version = importlib.metadata.version("twotower")
    digest = hashlib.sha256(f"{version} {code_digest(*CODE)}".encode())
    path = Path(checkpoint)
    if path.is_dir():
        for part in _checkpoint_parts(path):
            digest.update(part.encode() + b"\0")
    elif is_hub_id(checkpoint):
        digest.update(checkpoint.encode())
    else:
        raise CheckpointError(f"{checkpoint}: no such folder, and no hub id (owner/name@revision)")
    return digest.hexdigest()[:24]


def _checkpoint_parts(folder: Path) -> Iterator[str]:
    """Yield what tells one checkpoint from another."""
    if not (folder / CONFIG_FILE).exists() or not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{folder}: is neither a checkpoint ({CONFIG_FILE} and *.safetensors) nor an engine "
            f"set ({BUILD_FILE}); name one of them"
        )
    for path in sorted(folder.glob("*.json")):
        content = read_file(path, CheckpointError, "download the checkpoint again")
        yield f"{path.name} {hashlib.sha256(content).hexdigest()}"
    for path in (folder / file for file in shard_files(folder)):
        read_header(path)  # a truncated shard is refused here rather than after an export
        yield f"{path.name} {path.stat().st_size} {sample_digest(path)}"


def _run_verb(arguments: Sequence[str], error: type[BuildError] | type[CheckpointError]) -> None:
    """Run a verb of `twotower`; its progress is shown, its error becomes ours."""
    command = [sys.executable, "-m", "twotower_client.cli", *arguments]
    if sys.stderr.isatty():  # progress bars draw only on a terminal, so leave it to them
        process = run_child(command, stdout=subprocess.DEVNULL)
        said = "its message is above"
    else:
        process = run_child(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        *before, said = process.stderr.decode(errors="replace").strip().rsplit("\n", maxsplit=1)
        if before:
            print(*before, sep="\n", file=sys.stderr)
    if process.returncode:
        if said.startswith("error: "):
            raise error(said.removeprefix("error: "))
        raise error(
            f"`twotower {' '.join(arguments)}` failed, exit code {process.returncode}: {said}"
        )
