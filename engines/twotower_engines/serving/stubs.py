"""The processes in which the bundled Triton server runs Python models: its stubs.

A stub embeds Python, and asks the dynamic linker for its shared library by name. Where that of this
interpreter is not on the linker's path (pyenv, uv, conda), a folder with a link to it is put there.
The server waits for ever for a stub that died, so we look whether one did.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

MODEL_FILE = re.compile(rb"/(\w+)/1/model\.py")
LINKER_FAILED = 127  # what the dynamic linker exits with; a stub without arguments exits with 1


def python_version() -> str:
    """Return this interpreter's version as the stubs are named, for example `3.11`."""
    return ".".join(str(part) for part in sys.version_info[:2])


def library_path(folder: Path) -> dict[str, str]:
    """Return the variables with which a stub finds this interpreter's shared library.

    Args:
        folder: Where to make a folder with the link: the library's own folder may hold others,
            which the server must not take.

    Returns:
        Nothing where the interpreter has no such library of its own.
    """
    name = _library_name()
    homes = (sysconfig.get_config_var("LIBDIR"), str(Path(sys.base_prefix) / "lib"))
    for home in homes:
        if home and (Path(home) / name).is_file():
            links = folder / "python"
            links.mkdir()
            (links / name).symlink_to(Path(home) / name)
            paths = [str(links), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
            return {"LD_LIBRARY_PATH": os.pathsep.join(paths)}
    return {}


def _library_name() -> str:
    return f"libpython{python_version()}.so.1.0"


def stub_problem(stub: Path) -> str | None:
    """Start a stub without arguments, which ends at once; return what keeps it from starting."""
    with tempfile.TemporaryDirectory(prefix="twotower-stub-") as folder:
        environment = {**os.environ, **library_path(Path(folder))}
        try:
            ran = subprocess.run(
                [stub], env=environment, capture_output=True, text=True, timeout=60
            )
        except (OSError, subprocess.TimeoutExpired) as problem:
            return f"the stub of the Triton server's Python backend cannot start: {problem}"
    if ran.returncode != LINKER_FAILED:
        return None
    return (
        f"the stub of the Triton server's Python backend cannot start: {ran.stderr.strip()}; use a "
        f"Python {python_version()} that has its shared library (of the distribution with its "
        f"package libpython{python_version()}, of uv, of conda, or of pyenv built with "
        "--enable-shared)"
    )


def dead_stubs(server: int) -> list[int]:
    """Return the process ids of a server's children that have ended and that it does not heed."""
    return [process for process in _children(server) if state_of(process) == "Z"]


def model_processes(server: int) -> dict[str, int]:
    """Return a server's processes of models, whose command lines name the models' files."""
    processes = {}
    for process in _children(server):
        try:
            command = Path(f"/proc/{process}/cmdline").read_bytes()
        except OSError:  # it ended while we looked
            continue
        match = MODEL_FILE.search(command)
        if match is not None:
            processes[match[1].decode()] = process
    return processes


def group_lives(group: int) -> bool:
    """Return whether a process of a group is not gone; a zombie is, which nobody may ever reap."""
    stats = (_stat(process) for process in _processes())
    return any(one and one[2] == str(group) and one[0] != "Z" for one in stats)


def state_of(process: int) -> str | None:
    """Return the kernel's letter for a process: R, S, D, T (stopped), Z (ended); None for gone."""
    after_name = _stat(process)
    return after_name[0] if after_name else None


ENDED = (None, "Z")
"""Answers of `state_of` for a process that is gone, or a zombie that its parent has not reaped."""


def has_ended(process: int) -> bool:
    """Return whether a process has ended."""
    return state_of(process) in ENDED


def _children(parent: int) -> list[int]:
    return [one for one in _processes() if (_stat(one) or ["", "-1"])[1] == str(parent)]


def _processes() -> list[int]:
    return sorted(int(path.name) for path in Path("/proc").glob("[0-9]*"))


def _stat(process: int) -> list[str]:
    """Return the fields of a process after its name; none where it is gone."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
