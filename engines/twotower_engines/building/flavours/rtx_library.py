"""The TensorRT-RTX library as it is installed here.

Where NVIDIA's wheel `tensorrt_rtx` is installed it is used. Otherwise two wheels from PyPI do (the
extra [rtx-aot]): `tensorrt-cu13-bindings` is the Python API, `onnxruntime-ep-nv-tensorrt-rtx-cu13`
carries the library. The bindings ask the dynamic linker for TensorRT's own file names, so a private
folder of links gives the library under these names, and a worker process is started with the folder
on `LD_LIBRARY_PATH`.

NVIDIA does not promise that this pair works together. It is pinned here, version by version, and
every worker checks it with a build of one node before a graph goes in.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

from twotower_contract.atomic import partial_folder, put_in_place
from twotower_engines.artifacts.cache_root import cache_root, in_cache
from twotower_engines.building.flavours.process import Library
from twotower_engines.errors import BuildError

__all__ = ["find_library"]

TITLE = "TensorRT-RTX"
BINDINGS = ("tensorrt-cu13-bindings", "11.4.0.106")
CARRIER = ("onnxruntime-ep-nv-tensorrt-rtx-cu13", "0.5.0")
CARRIER_PACKAGE = "onnxruntime_ep_nv_tensorrt_rtx"
LIBRARY_VERSION = "1.7.1"
LINKS = {
    "libnvinfer.so.11": f"libtensorrt_rtx.so.{LIBRARY_VERSION}",
    "libnvonnxparser.so.11": f"libtensorrt_onnxparser_rtx.so.{LIBRARY_VERSION}",
}
PLUGIN_LIBRARY = "libnvinfer_plugin.so.11"
PLUGIN_STUB = """\
/* What the bindings need of libnvinfer_plugin: TensorRT-RTX has no plugin library. */
#include <stdbool.h>
bool initLibNvInferPlugins(void* logger, char const* name_space)
{
    (void) logger;
    (void) name_space;
    return true;
}
"""
INSTALL = (
    "install NVIDIA's wheel `tensorrt_rtx`, or the pair from PyPI with "
    f"`pip install 'twotower[rtx-aot]'` ({BINDINGS[0]}=={BINDINGS[1]}, {CARRIER[0]}=={CARRIER[1]})"
)


def find_library() -> Library:
    """Return TensorRT-RTX as it is installed here.

    Raises:
        BuildError: It is not installed, or not in the versions that go together, or the folder of
            links cannot be made.
    """
    if importlib.util.find_spec("tensorrt_rtx") is not None:
        return Library(TITLE, "tensorrt_rtx", INSTALL)
    for name, wanted in (BINDINGS, CARRIER):
        found = _installed(name)
        if found != wanted:
            has = f"{name} {found} is installed" if found else f"{name} is not installed"
            raise BuildError(f"{TITLE}: {has}, and {wanted} is needed; {INSTALL}")
    carrier = _package_folder(CARRIER_PACKAGE)
    for file in LINKS.values():
        if not (carrier / file).is_file():
            raise BuildError(f"{TITLE}: {carrier / file} is missing; {INSTALL}")
    links = _folder_of_links(carrier)
    search = [str(links), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return Library(
        title=TITLE,
        module="tensorrt_bindings",
        install=INSTALL,
        environment={"LD_LIBRARY_PATH": ":".join(search)},
        path=carrier / LINKS["libnvinfer.so.11"],
        version=LIBRARY_VERSION,
    )


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None, f"{name} has metadata but no package"
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0])


def _folder_of_links(carrier: Path) -> Path:
    """Return a folder with the library under TensorRT's names; made at the first use.

    Its name is a digest of what it holds, so that another installation has another folder and a
    complete one is never written again.
    """
    content = f"{carrier.resolve()}\n{sorted(LINKS.items())}\n{PLUGIN_STUB}"
    name = hashlib.sha256(content.encode()).hexdigest()[:16]
    folder = cache_root() / "libraries" / f"tensorrt-rtx-{name}"
    if not (folder / PLUGIN_LIBRARY).is_file():
        _write_links(carrier, in_cache("libraries") / folder.name)
    if not os.access(folder / PLUGIN_LIBRARY, os.X_OK):
        raise BuildError(
            f"{TITLE}: {folder} is on a file system that executes nothing (noexec); set "
            "XDG_CACHE_HOME to a folder on another one"
        )
    return folder


def _write_links(carrier: Path, folder: Path) -> None:
    with partial_folder(folder.parent) as work:
        made = work / folder.name
        made.mkdir()
        for link, file in LINKS.items():
            (made / link).symlink_to(carrier / file)
        _compile_stub(made)
        # another process may have been first, and its worker may be reading the links
        put_in_place(made, folder, replace=False)


def _compile_stub(folder: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise BuildError(
            f"{TITLE}: a C compiler is needed once, for ten lines that stand in for "
            f"{PLUGIN_LIBRARY}; install one (`apt-get install gcc libc6-dev`), or install "
            "NVIDIA's wheel `tensorrt_rtx`"
        )
    source = folder / "plugin_stub.c"
    source.write_text(PLUGIN_STUB, encoding="utf-8")
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(folder / PLUGIN_LIBRARY), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(
            f"{TITLE}: {compiler} cannot compile the stand-in for {PLUGIN_LIBRARY}: "
            f"{done.stderr.strip()}; install NVIDIA's wheel `tensorrt_rtx`, or repair the compiler"
        )
