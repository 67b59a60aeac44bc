"""Where everything that is made once and found again lies on this machine."""

from __future__ import annotations

import os
from pathlib import Path

from twotower_engines.errors import BuildError

REMEDY = "set XDG_CACHE_HOME to a folder that can be written"


def cache_root() -> Path:
    """Return the folder of all that is cached.

    Raises:
        BuildError: This user has no home, as in many containers, and nothing else is named.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base) / "twotower"
    try:
        return Path.home() / ".cache" / "twotower"
    except RuntimeError:
        raise BuildError(
            f"there is no place for the cache: this user has no home; {REMEDY}"
        ) from None


def in_cache(*parts: str) -> Path:
    """Make a folder of the cache to write into, and return it.

    Raises:
        BuildError: It cannot be written; names the remedy.
    """
    folder = cache_root().joinpath(*parts)
    reason = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            reason = "it belongs to another user, or is read-only"
    except OSError as problem:
        reason = problem.strerror
    if reason is not None:
        raise BuildError(f"{folder}: the cache cannot be written ({reason}); {REMEDY}")
    return folder
