"""Folders that are either complete or recognizably not: written beside their place, then renamed.

A process that is killed leaves a folder named `.partial-...`, which nothing reads and the next
process that works beside it removes: its owner held a lock on it, and the kernel let go of that.

A folder takes the place of another in one step where the file system can exchange two names (ext4,
xfs, btrfs, tmpfs, overlayfs). Elsewhere (NFS) it takes two renames; a process that is killed
between them leaves the old folder as `.replaced-NAME`, and the next that works there puts it back.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

__all__ = ["locked", "partial_folder", "put_in_place"]

PREFIX = ".partial-"
REPLACED = ".replaced-"
AT_FDCWD = -100
RENAME_EXCHANGE = 2  # of linux/fs.h


@contextlib.contextmanager
def partial_folder(parent: Path) -> Iterator[Path]:
    """Give a new folder in `parent` to work in; it is removed at the end, renamed parts are not.

    What killed processes left in `parent` is removed or put back first.
    """
    parent.mkdir(parents=True, exist_ok=True)
    with locked(parent):  # between making a folder and locking it, it would look abandoned
        for path in parent.glob(f"{PREFIX}*"):
            _remove_if_abandoned(path)
        for path in parent.glob(f"{REPLACED}*"):
            _put_back(path)
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
            if _exchange(made, target):
                return  # the old one, under the new one's name, goes with the partial folder
            aside = target.with_name(f"{REPLACED}{target.name}")
            target.rename(aside)
            try:
                made.rename(target)
            except BaseException:
                aside.rename(target)
                raise
            aside.rename(made)
        else:
            made.rename(target)


@contextlib.contextmanager
def locked(path: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold a lock on a folder or file that exists; other processes wait here.

    Args:
        path: The folder or file.
        waiting: Called first if another process holds the lock.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is not None:
                waiting()
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


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change names in one step; False where the system or file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    names = os.fsencode(one), os.fsencode(other)
    return bool(rename(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) == 0)


def _put_back(aside: Path) -> None:
    """End a replacement whose process was killed, while nobody else is at one."""
    target = aside.with_name(aside.name.removeprefix(REPLACED))
    if target.exists():
        shutil.rmtree(aside, ignore_errors=True)
    else:
        aside.rename(target)
