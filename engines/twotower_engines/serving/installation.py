"""Find the Triton server of this machine, and start it without touching its files.

A server on PATH (as in NVIDIA's containers) comes first. Otherwise the one inside the wheel
`nvidia-pytriton` is used: a real binary, whose Python backend needs a stub for this interpreter
beside its library. The wheel keeps the stubs elsewhere, so a private folder is made.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from twotower_engines.errors import ServingError
from twotower_engines.serving.stubs import python_version, stub_problem

STUB = "triton_python_backend_stub"
LIBRARIES = "nvidia_pytriton.libs"
GLIBC_NEEDED = (2, 35)
CONTAINER = "serve in NVIDIA's Triton container, whose own server is used (docs/deploy.md says how)"


@dataclass(frozen=True, slots=True)
class ServerInstallation:
    """A Triton server.

    Attributes:
        binary: The executable.
        source: Its origin, for people.
        wheel: The folder `tritonserver` of the wheel; None where the binary is on PATH and finds
            its own backends.
    """

    binary: Path
    source: str
    wheel: Path | None = None


def find_server() -> ServerInstallation:
    """Find a Triton server: on PATH, or in the wheel.

    Raises:
        ServingError: There is none, or the wheel's cannot work here.
    """
    on_path = shutil.which("tritonserver")
    if on_path is not None:
        return ServerInstallation(Path(on_path), f"PATH ({on_path})")
    # find_spec of a top-level name looks without importing: pytriton's import starts much
    unfit = _unfit()
    if unfit is not None:
        raise ServingError(f"no `tritonserver` on PATH, and {unfit}")
    spec = importlib.util.find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        raise ServingError(
            "no Triton server found: there is no `tritonserver` on PATH and the package "
            "nvidia-pytriton is not installed; install one with: pip install 'twotower[serve]'"
        )
    wheel = Path(next(iter(spec.submodule_search_locations))) / "tritonserver"
    binary = wheel / "bin" / "tritonserver"
    if not binary.is_file():
        raise ServingError(
            f"{binary}: is missing, though nvidia-pytriton is installed; install it again with: "
            "pip install --force-reinstall nvidia-pytriton"
        )
    if not _stub(wheel).is_file():
        had = ", ".join(sorted(one.name for one in (wheel / "python_backend_stubs").glob("3.*")))
        raise ServingError(
            f"the Triton server of nvidia-pytriton has no stub for Python {python_version()} "
            f"(it has: {had}); use one of these Pythons"
        )
    version = importlib.metadata.version("nvidia-pytriton")
    return ServerInstallation(binary, f"nvidia-pytriton {version}", wheel)


def problem_of(installation: ServerInstallation, numpy: str) -> str | None:
    """Return why a server cannot run our models with this interpreter, or None if it can.

    Args:
        installation: As found. Which Python and numpy a server on PATH uses is its own affair.
        numpy: Version of numpy, for example `1.26.4`.
    """
    if installation.wheel is None:
        return None
    if int(numpy.partition(".")[0]) >= 2:
        return (
            f"numpy is {numpy}, with which the Python backend of {installation.source} gives empty "
            "answers; install an older one with: pip install 'numpy<2'"
        )
    return stub_problem(_stub(installation.wheel))


def _unfit() -> str | None:
    """Return why the wheel's server cannot work on this system at all, or None if it can."""
    libc, version = platform.libc_ver()
    needed = ".".join(str(part) for part in GLIBC_NEEDED)
    if libc != "glibc" or tuple(int(part) for part in version.split(".")[:2]) < GLIBC_NEEDED:
        return (
            f"the one of nvidia-pytriton needs glibc {needed}, where this system has "
            f"{f'{libc} {version}'.strip() or 'another C library'}; {CONTAINER}"
        )
    if sys.version_info >= (3, 13):
        return (
            f"the one of nvidia-pytriton needs a numpy below 2, which Python {python_version()} "
            f"has not; use Python 3.11 or 3.12, or {CONTAINER}"
        )
    return None


def make_backends(installation: ServerInstallation, folder: Path) -> Path | None:
    """Make a folder that the wheel's server can use as its backend directory.

    It holds links, and a copy of the stub: Triton changes its mode, through a link too.

    Args:
        installation: As found.
        folder: An existing folder to make it in.

    Returns:
        The backend directory, or None where the server finds its own.
    """
    if installation.wheel is None:
        return None
    # As deep as in the wheel: the stub looks for its libraries four folders up.
    python = folder / "pytriton" / "tritonserver" / "backends" / "python"
    python.mkdir(parents=True)
    (folder / LIBRARIES).symlink_to(installation.wheel.parents[1] / LIBRARIES)
    for name in ("libtriton_python.so", "triton_python_backend_utils.py"):
        (python / name).symlink_to(installation.wheel / "backends" / "python" / name)
    shutil.copy(_stub(installation.wheel), python / STUB)
    return python.parent


def _stub(wheel: Path) -> Path:
    return wheel / "python_backend_stubs" / python_version() / STUB
