"""How often `serve` started its server or a part of it again: on its way to the metrics.

The model `twotower` shows them, a process that is started again, too. So `serve` counts, and writes
the counts into a file of the server's private folder, whose path the environment holds.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path

from twotower_contract.json_file import write_json

FILE = "TWOTOWER_RESTARTS"
"""Variable of the environment with the path of the file."""
PARTS = ("preprocessing", "postprocessing", "llm", "http", "openai")
_WRITING = threading.Lock()


def write(folder: Path, counts: Mapping[str, int]) -> str:
    """Write the restarts of each part and of the `server`; return the file's path."""
    file = folder / "restarts.json"
    with _WRITING:
        write_json(file, dict(counts))
    return str(file)


def read() -> dict[tuple[str, str], int]:
    """Return them by metric and label; none where no `serve` looks after this server."""
    file = os.environ.get(FILE)
    counts: dict[str, int] = json.loads(Path(file).read_text()) if file else {}
    return {
        ("server_restarts_total", "") if name == "server" else ("part_restarts_total", name): count
        for name, count in counts.items()
    }
