"""Where a Triton server is on this machine, and how to start it without touching its files.

A server on PATH (as in NVIDIA's containers) comes first. Otherwise the one inside the wheel
`nvidia-pytriton` is used: a real binary, whose Python backend needs a stub for this interpreter
beside its library. The wheel keeps the stubs elsewhere, so a private folder is made.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from twotower_engines.errors import ServingError

__all__ = ["ServerInstallation", "find_server", "make_backends", "numpy_problem"]

STUB = "triton_python_backend_stub"
LIBRARIES = "nvidia_pytriton.libs"


@dataclass(frozen=True, slots=True)
class ServerInstallation:
    """A Triton server.

    Attributes:
        binary: The executable.
        source: Where it comes from, for people.
        wheel: The folder `tritonserver` of the wheel; None where the binary is on PATH and finds
            its own backends.
    """

    binary: Path
    source: str
    wheel: Path | None = None


def find_server() -> ServerInstallation:
    """Find a Triton server: on PATH, or in the wheel.

    Raises:
        ServingError: There is none, or the wheel's has no stub for this Python.
    """
    on_path = shutil.which("tritonserver")
    if on_path is not None:
        return ServerInstallation(Path(on_path), f"PATH ({on_path})")
    # find_spec of a top-level name looks without importing: pytriton's import starts much
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
            f"the Triton server of nvidia-pytriton has no stub for Python {_python()} "
            f"(it has: {had}); use one of these Pythons"
        )
    version = importlib.metadata.version("nvidia-pytriton")
    return ServerInstallation(binary, f"nvidia-pytriton {version}", wheel)


def numpy_problem(installation: ServerInstallation, numpy: str) -> str | None:
    """Return why a server cannot work with this interpreter's numpy, or None if it can.

    Args:
        installation: As found. What numpy a server on PATH uses is its own affair.
        numpy: Version of numpy, for example `1.26.4`.
    """
    if installation.wheel is None or int(numpy.partition(".")[0]) < 2:
        return None
    return (
        f"numpy is {numpy}, with which the Python backend of {installation.source} gives empty "
        "answers; install an older one with: pip install 'numpy==1.26.4'"
    )


def make_backends(installation: ServerInstallation, folder: Path) -> Path | None:
    """Make a folder that the wheel's server can use as its backend directory.

    It holds links, and a copy of the stub: Triton changes its mode, through a link too.

    Args:
        installation: As found.
        folder: Where to make it; must exist.

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


def _python() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _stub(wheel: Path) -> Path:
    return wheel / "python_backend_stubs" / _python() / STUB
