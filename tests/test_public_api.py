"""What each package offers: the names that users import, all of `__all__`, and the types."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support import ROOT

FOLDERS = {
    "twotower_client": ROOT / "client",
    "twotower_contract": ROOT / "export",
    "twotower_engines": ROOT / "engines",
    "twotower_export": ROOT / "export",
}
# What users write in their own code. A name that goes or comes is a line in the change log.
PROMISED = {
    "twotower_client": {
        "Answer",
        "AnswerStream",
        "AsyncAnswerStream",
        "AsyncClientPool",
        "AsyncTwoTowerClient",
        "Block",
        "Canvas",
        "ClientError",
        "ClientPool",
        "DeadlineError",
        "InactivityError",
        "ModelNotReadyError",
        "Options",
        "RequestCancelledError",
        "RequestFailedError",
        "RequestRefusedError",
        "Retry",
        "ServerBusyError",
        "ServerUnavailableError",
        "TokenDetail",
        "TwoTowerClient",
    },
    "twotower_engines.generation.generator": {"Generator", "Result", "result_of"},
    "twotower_engines.generation.request": {
        "BlockEvent",
        "FinishReason",
        "Request",
        "RequestLimits",
        "TokenDetail",
    },
    "twotower_engines.generation.scheduler": {"Scheduler"},
}


def declared(path: Path) -> list[str]:
    """Return the names in a module's `__all__`; an empty list without one."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return []


def modules_with_names() -> list[str]:
    found = []
    for package, folder in FOLDERS.items():
        for path in sorted((folder / package).rglob("*.py")):
            if declared(path):
                parts = path.relative_to(folder).with_suffix("").parts
                found.append(".".join(part for part in parts if part != "__init__"))
    return found


@pytest.mark.parametrize("name", PROMISED)
def test_users_find_the_names_that_we_promise(name):
    module = importlib.import_module(name)
    assert set(module.__all__) == PROMISED[name]


@pytest.mark.parametrize("name", modules_with_names())
def test_what_a_module_lists_is_there_and_is_ours(name):
    """A name in `__all__` exists, is not private, and was not written by somebody else."""
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != "tensorrt":  # NVIDIA's wheel, which is not in the extra `dev`
            raise
        pytest.skip("needs the extra `tensorrt`")
    for public in module.__all__:
        assert not public.startswith("_")
        found = getattr(module, public)
        if inspect.isclass(found) or inspect.isfunction(found):
            assert found.__module__.partition(".")[0] in FOLDERS, public


def test_packages_show_what_is_promised_and_nothing_else():
    """In a new process; submodules that were imported on the way do not count."""
    program = (
        "import importlib, inspect, json\n"
        f"packages = [importlib.import_module(name) for name in {sorted(FOLDERS)}]\n"
        "def shown(p):\n"
        "    names = [n for n in dir(p) if n[0] != '_']\n"
        "    return [n for n in names if not inspect.ismodule(getattr(p, n))]\n"
        "public = {p.__name__: shown(p) for p in packages}\n"
        "print(json.dumps(public))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown = {package: set(names) for package, names in json.loads(done.stdout).items()}
    assert shown == {package: PROMISED.get(package, set()) for package in FOLDERS}


def test_type_checkers_see_every_package(wheel):
    shipped = set(zipfile.ZipFile(wheel).namelist())
    assert {f"{package}/py.typed" for package in FOLDERS} <= shipped
