"""What is shipped: the wheel's files, and that the client's own needs are few."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.support import ROOT


def test_the_wheel_holds_the_packages_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {
        "twotower_client",
        "twotower_contract",
        "twotower_engines",
        "twotower_export",
    }
    assert not [name for name in names if "test" in name.split("/")[-1] and "self_test" not in name]


def test_the_wheel_holds_all_that_its_verbs_read(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    models = {"preprocessing", "twotower", "postprocessing"}
    assert {f"twotower_engines/triton_repo/{name}/1/model.py" for name in models} <= names
    assert "twotower_contract/skus.json" in names
    assert "twotower_export/data/tiny/config.json" in names
    assert {f"{name}/py.typed" for name in ("twotower_client", "twotower_engines")} <= names
    assert wheel.stat().st_size < 8_000_000


def test_the_client_alone_needs_three_packages():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needs = {line.split(">")[0].split("[")[0] for line in project["dependencies"]}
    assert needs == {"numpy", "tritonclient", "click"}


def test_the_client_imports_nothing_else_but_the_contract():
    """The contract is in the same wheel, and itself imports the standard library alone."""
    ours = {"twotower_client", "twotower_contract"}
    allowed = sys.stdlib_module_names | ours | {"numpy", "tritonclient", "grpc", "click"}
    for path in (ROOT / "client/twotower_client").rglob("*.py"):
        extra = {"starlette", "uvicorn", "jinja2"} if path.parent.name == "openai" else set()
        if path.name == "bench_cli.py":  # hands ENGINES over to their own stage, when it is called
            extra = {"twotower_engines"}
        assert imported(path) <= allowed | extra, path
    code = (
        "import sys, importlib, pkgutil, twotower_contract as c\n"
        "for one in pkgutil.iter_modules(c.__path__, 'twotower_contract.'):\n"
        "    importlib.import_module(one.name)\n"
        "print({name.partition('.')[0] for name in sys.modules} & {'numpy', 'click', 'grpc'})"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"


def imported(path):
    """The first names of what a module imports, verbs that are named as strings left out."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names}


def test_make_takes_the_first_python_that_runs_and_is_new_enough(tmp_path):
    for tool in ("make", "sh"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    launcher = 'echo "not installed" >&2; exit 127'  # as pyenv's for a version that is not chosen
    old = "exit 1"  # what our question gets from a Python that is too old
    new = f'exec {sys.executable} "$@"'
    for name, does in {"python3.11": launcher, "python3.12": old, "python3": new}.items():
        (tmp_path / name).write_text(f"#!{tmp_path / 'sh'}\n{does}\n")
        (tmp_path / name).chmod(0o755)

    def steps(*options):
        command = ["make", "-n", "--no-print-directory", *options, "VENV=none", "none/.base"]
        return subprocess.run(
            command, cwd=ROOT, env={"PATH": str(tmp_path)}, capture_output=True, text=True
        ).stdout.splitlines()

    assert "python3 -m venv none" in steps()
    assert "python3.11 -m venv none" in steps("PYTHON=python3.11")  # a wish is not argued with
    (tmp_path / "python3").unlink()
    ran = subprocess.run(
        ["make", "VENV=none", "none/.base"],
        cwd=ROOT, env={"PATH": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 2
    assert "error: no Python of version 3.11 or 3.12 found" in ran.stderr


@pytest.mark.slow
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_every_extra_resolves(machine, python):
    """All at once, so each alone too, against the public index, whatever index this machine has.

    There torch asks for a compiler of kernels (`triton`) of its own choice, which the CPU builds of
    some machines do not.
    """
    uv = shutil.which("uv", path=Path(sys.executable).parent)
    command = [uv, "pip", "compile", "--no-config", "--no-python-downloads", "--all-extras"]
    command += ["--python-platform", f"{machine}-manylinux_2_35", "--python-version", python]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("UV_")}
    ran = subprocess.run(
        [*command, "--no-annotate", "--no-header", "pyproject.toml"],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if "error sending request" in ran.stderr and "No solution" not in ran.stderr:
        pytest.skip("the package index cannot be reached")
    assert ran.returncode == 0, ran.stderr
    chosen = dict(line.split("==") for line in ran.stdout.split())
    assert chosen["torch"] == "2.13.0"
    assert chosen["triton"] == "3.7.1", "what this torch asks for, where it is no CPU build"
    assert ("nvidia-pytriton" in chosen) == (python != "3.13")
    assert chosen["numpy"].startswith("1." if python != "3.13" else "2.")


def test_the_pythons_that_are_promised_are_those_that_are_tested():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    promised = {one.rpartition(" ")[2] for one in project["classifiers"] if "Python :: 3." in one}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    gate = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert promised <= set(re.findall(r"PYTHON=python(3\.\d+)", makefile + gate))
