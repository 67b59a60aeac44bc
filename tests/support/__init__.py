"""Modules that tests and benchmarks share."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FULL_SIZE = ROOT / "tests" / "data" / "full_size"  # the released model's config.json
TWOTOWER = [sys.executable, "-m", "twotower_client.cli"]  # the command, as a process
