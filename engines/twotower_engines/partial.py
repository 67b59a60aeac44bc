"""Folders that are either complete or recognizably not: written beside their place, then renamed.

A process that is killed leaves a folder named `.partial-...`, which nothing reads and the next
process that works beside it removes: its owner held a lock on it, and the kernel let go of that.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["locked", "partial_folder", "put_in_place"]

PREFIX = ".partial-"


@contextlib.contextmanager
def partial_folder(parent: Path) -> Iterator[Path]:
    """Give a new folder in `parent` to work in; it is removed at the end, renamed parts are not.

    Folders that killed processes left in `parent` are removed first.
    """
    parent.mkdir(parents=True, exist_ok=True)
    with locked(parent):  # between making a folder and locking it, it would look abandoned
        for path in parent.glob(f"{PREFIX}*"):
            _remove_if_abandoned(path)
        made = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        descriptor = os.open(made, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)
        os.close(descriptor)


def put_in_place(made: Path, target: Path, *, replace: bool = True) -> None:
    """Rename a complete folder to `target`.

    Args:
        made: A folder inside a `partial_folder` of target's parent.
        target: Its place.
        replace: Whether a folder that is there goes; else it stays, and `made` goes.
    """
    with locked(target.parent):
        if target.exists():
            if not replace:
                return
            # a rename, so that nobody finds half of the old one; it goes with the partial folder
            old = made.with_name(f"{made.name}.replaced")
            target.rename(old)
            try:
                made.rename(target)
            except BaseException:
                old.rename(target)
                raise
        else:
            made.rename(target)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock on a folder or file that exists; other processes wait here."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remove_if_abandoned(path: Path) -> None:
    with contextlib.suppress(OSError):  # in use, or already gone
        descriptor = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(descriptor)
