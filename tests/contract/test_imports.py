"""Importing the contract loads nothing but the standard library."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import twotower_contract

IMPORT_ALL = """
import importlib, pkgutil, sys
import twotower_contract
before = {name.partition(".")[0] for name in sys.modules}
for found in pkgutil.walk_packages(twotower_contract.__path__, "twotower_contract."):
    importlib.import_module(found.name)
    print(found.name)
loaded = {name.partition(".")[0] for name in sys.modules} - before
sys.exit(", ".join(sorted(loaded - set(sys.stdlib_module_names))) or None)
"""


def test_the_contract_needs_the_standard_library_alone():
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True)
    assert done.returncode == 0, f"loaded: {done.stderr}"
    files = Path(twotower_contract.__path__[0]).rglob("*.py")
    assert len(done.stdout.split()) == len([one for one in files if one.name != "__init__.py"])
