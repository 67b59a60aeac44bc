"""Modules that tests and benchmarks share."""

import sys
from pathlib import Path

from twotower_engines.planning.model_size import RELEASED

ROOT = Path(__file__).parents[2]
FULL_SIZE = RELEASED  # the released model's config.json
TWOTOWER = [sys.executable, "-m", "twotower_client.cli"]  # the command, as a process
