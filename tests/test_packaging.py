"""What is shipped: the wheel's files, and that the client's own needs are few."""

from __future__ import annotations

import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_wheel_holds_the_packages_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {
        "twotower_client",
        "twotower_engines",
        "twotower_export",
    }
    assert not [name for name in names if "test" in name.split("/")[-1] and "self_test" not in name]


def test_the_wheel_holds_all_that_its_verbs_read(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    models = {"preprocess", "generate", "postprocess"}
    assert {f"twotower_engines/triton_repo/{name}/1/model.py" for name in models} <= names
    assert "twotower_engines/skus.json" in names
    assert "twotower_export/data/tiny/config.json" in names
    assert {f"{name}/py.typed" for name in ("twotower_client", "twotower_engines")} <= names
    assert wheel.stat().st_size < 8_000_000


def test_the_client_alone_needs_three_packages():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needs = {line.split(">")[0].split("[")[0] for line in project["dependencies"]}
    assert needs == {"numpy", "tritonclient", "click"}
