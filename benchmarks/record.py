"""Results of a benchmark: where and on which day they were measured, and how they are kept."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from twotower_contract.json_file import write_json

RESULTS = Path(__file__).with_name("results")


def today() -> str:
    return datetime.date.today().isoformat()


def machine() -> str:
    return f"{platform.machine()}, {os.cpu_count()} cores, no GPU"


def write_results(name: str, lines: Sequence[str], content: dict[str, Any]) -> None:
    """Write a benchmark's table, and its figures with the day, as NAME-DAY.md and NAME-DAY.json."""
    RESULTS.mkdir(exist_ok=True)
    stem = f"{name}-{today()}"
    (RESULTS / f"{stem}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json(RESULTS / f"{stem}.json", {"date": today(), **content})
