"""Environments for tools whose packages do not go with ours, kept in the user's cache."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def environment(*packages: str) -> Path:
    """Return the folder of programs of an environment with these packages, made the first time.

    Skips the test where the package index cannot be reached.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "twotower-tests"
    name = hashlib.sha256(repr((sys.version_info[:2], packages)).encode()).hexdigest()[:12]
    folder = root / name
    done = folder / "done"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "-q", *packages]
        ran = subprocess.run(pip, capture_output=True, text=True)
        if "Failed to establish a new connection" in ran.stderr:
            pytest.skip("the package index cannot be reached")
        assert ran.returncode == 0, ran.stderr
        done.touch()
    return folder / "bin"
