"""Makes `sparse_checkpoint` importable here, as tests are no package."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "export"))
