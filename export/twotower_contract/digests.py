"""Digests of whole files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal

PIECE_BYTES = 8 * 2**20

FileState = Literal["ok", "changed", "missing"]


def file_sha256(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """Return the sha256 of a file in hex.

    Args:
        path: The file.
        progress: Called after each piece with the bytes read so far.
    """
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(PIECE_BYTES))
    done = 0
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
            done += count
            if progress is not None:
                progress(done)
    return digest.hexdigest()


def file_state(path: Path, sha256: str) -> FileState:
    """Return whether a file is what it was when its digest was written down."""
    if not path.is_file():
        return "missing"
    return "ok" if file_sha256(path) == sha256 else "changed"
