"""A private folder for one server, with what it reads under names that its shell can take.

The shell by which Triton starts a model's process quotes nothing, and its backend reads paths as
ASCII: a space, a quote, `$`, `&` or a letter beyond ASCII in the path of the repository or of the
temporary folder, and the model never starts. So the server gets copies under plain names, of its
own models alone: what else lies in a repository (`lost+found`) is not looked at.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from twotower_contract.engine_set import open_engine_set
from twotower_contract.errors import TwoTowerError
from twotower_engines.errors import ServingError
from twotower_engines.serving.repository import CONFIG_FILE, config_text, read_config

PLAIN = re.compile(r"[\w./@%+=:,-]+", re.ASCII)
# Where the temporary folder will not do.
PLACES = ("/tmp", "/var/tmp")
BYTECODE = "__pycache__"
ENGINES, CHECKPOINT = "engine_set", "checkpoint"  # parameters of a model that are paths
SHARED_MEMORY = "/dev/shm"
SHARED_MEMORY_NEEDED = 64 * 2**20  # for the four models of a repository, with room
FILES_NEEDED = 256  # a server has 70 open before the first client comes, and one more for each
FILES_WANTED = 65536


def make_folder() -> Path:
    """Make a private folder that has a plain name and whose files may be executed.

    Raises:
        ServingError: There is no such place; says why each one will not do.
    """
    reasons = []
    for place in dict.fromkeys((_temporary(), *PLACES)):
        reason = "its name has other characters than A-Z a-z 0-9 . _ -"
        if PLAIN.fullmatch(place):
            try:
                folder = Path(tempfile.mkdtemp(prefix="twotower-serve-", dir=place))
            except OSError as problem:
                reason = f"{problem.strerror}"
            else:
                if _may_execute(folder):
                    return folder
                shutil.rmtree(folder, ignore_errors=True)
                reason = "files there cannot be executed or not be written; is it full or noexec?"
        reasons.append(f"{place} ({reason})")
    raise ServingError(
        f"a server needs a temporary folder, and none will do: {', '.join(reasons)}; set TMPDIR to "
        "another one"
    )


def copy_models(repository: Path, models: Iterable[str], folder: Path) -> Path:
    """Make a folder with a repository's models under plain names, and return it.

    They are copies, a few kB: with a part of the ensemble Triton loads every model again whose
    folder has changed since, and would hold the engines twice.

    Raises:
        ServingError: A file cannot be read, or not be written.
    """
    made = folder / "models"
    for name in models:
        try:
            shutil.copytree(repository / name, made / name, ignore=shutil.ignore_patterns(BYTECODE))
        except OSError as problem:
            raise ServingError(
                f"{repository / name}: cannot be copied to {made / name} ({problem})"
            ) from problem
        for version in {file.parent for file in (made / name).rglob("*.py")}:
            # A file where Python would make a folder, and so change this one.
            (version / BYTECODE).touch()
        config = read_config(repository / name / CONFIG_FILE)
        if _give_plain_paths(config, folder):
            (made / name / CONFIG_FILE).write_text(config_text(config), encoding="utf-8")
    return made


def _give_plain_paths(config: Any, folder: Path) -> bool:
    """Let a configuration name its engines and checkpoint by links; returns whether it must.

    A model's Python opens files with ASCII names only, whatever the locale.
    """
    if ENGINES not in config.parameters:
        return False
    paths = {name: config.parameters[name].string_value for name in (ENGINES, CHECKPOINT)}
    if not paths[CHECKPOINT]:
        with contextlib.suppress(TwoTowerError):  # the model itself says what is wrong
            opened = open_engine_set(Path(paths[ENGINES]))
            paths[CHECKPOINT] = str(opened.manifest.checkpoint.path)
    if "".join(paths.values()).isascii():
        return False
    for name, path in filter(all, paths.items()):
        link = folder / name
        if not link.is_symlink():
            link.symlink_to(path)
        config.parameters[name].string_value = str(link)
    return True


def refusal() -> str | None:
    """Return why no server can run on this machine as it is, or None if one can."""
    files = _raise_file_limit()
    if files is not None and files < FILES_NEEDED:
        return (
            f"this process may open {files} files, and a server needs {FILES_NEEDED}: raise the "
            "limit with `ulimit -n 65536`, or start the container with --ulimit nofile=65536"
        )
    free = _free_shared_memory()
    if free is not None and free < SHARED_MEMORY_NEEDED:
        return (
            f"{SHARED_MEMORY} has {free // 2**20} MB free, the models need "
            f"{SHARED_MEMORY_NEEDED // 2**20} MB: free some, or start the container with "
            "--shm-size=1g"
        )
    return None


def _raise_file_limit() -> int | None:
    """Let this process and its children open as many files as it may, and return how many.

    Returns None where the system has no such limit.
    """
    try:
        import resource
    except ImportError:
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES_WANTED if hard == resource.RLIM_INFINITY else min(hard, FILES_WANTED)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return None if soft == resource.RLIM_INFINITY else soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


def _free_shared_memory() -> int | None:
    """Return the bytes that are free for the models' shared memory, or None if nobody knows."""
    try:
        return shutil.disk_usage(SHARED_MEMORY).free
    except OSError:
        return None


def _temporary() -> str:
    try:
        return tempfile.gettempdir()
    except OSError:  # none can be written
        return os.environ.get("TMPDIR") or PLACES[0]


def _may_execute(folder: Path) -> bool:
    """Try with a file: a mount with `noexec` shows in no file's mode."""
    probe = folder / "probe"
    try:
        probe.write_text("#!/bin/sh\n")
        probe.chmod(0o700)
        return os.access(probe, os.X_OK)
    except OSError:
        return False
    finally:
        probe.unlink(missing_ok=True)
