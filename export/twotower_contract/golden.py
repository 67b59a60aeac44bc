"""The file with a checkpoint's golden answer: what engines must answer in the self-test.

`twotower golden` computes it, `twotower selftest --record` takes it from engines; the next export
puts it into the bundle.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from twotower_contract.errors import TwoTowerError
from twotower_contract.json_file import read_json, write_json

GOLDEN_FILE: Final = "golden.json"
FORMAT: Final = "twotower-golden"
FORMAT_VERSION: Final = 1


def write_golden(path: Path, fingerprint: str, golden: Mapping[str, Any]) -> dict[str, Any]:
    """Write the answer of the checkpoint with a fingerprint; return the file's content."""
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint,
        "golden": dict(golden),
    }
    write_json(path, content)
    return content


def read_golden(folder: Path, fingerprint: str) -> dict[str, Any] | None:
    """Return the answer that a checkpoint brings along, or None.

    Raises:
        TwoTowerError: The file is unreadable or another checkpoint's.
    """
    path = folder / GOLDEN_FILE
    if not path.is_file():
        return None
    document = read_json(path, TwoTowerError, "delete it, or record it again")
    document.check_format(FORMAT, FORMAT_VERSION)
    if document.text("fingerprint") != fingerprint:
        raise document.refusal(
            f"is of a checkpoint with fingerprint {document.text('fingerprint')[:12]}, not "
            f"{fingerprint[:12]}"
        )
    golden = document.section("golden")
    if not golden.integers("output_ids"):
        raise document.refusal("holds no answer")
    return golden.values
