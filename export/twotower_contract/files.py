"""Files that others wrote, read with care: no wait at a pipe, no endless file, no stand-in."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from twotower_contract.errors import CheckpointError, TwoTowerError
from twotower_contract.machine import read_at

MAX_FILE_BYTES: Final = 256 * 2**20
"""Most bytes of a file that is read whole; a tokenizer of 260,000 tokens has 33 MB."""


def refuse_dangling(path: Path, error: type[TwoTowerError] = CheckpointError) -> None:
    """Refuse a link to nothing: what an interrupted download, or a cache cut short, leaves.

    Raises:
        TwoTowerError: It is one.
    """
    if path.is_symlink() and not path.exists():
        raise error(
            f"{path}: is a link to {path.readlink()}, which is not there: the download did "
            "not finish; fetch the checkpoint again, finished files are kept"
        )


def refuse_pointer(path: Path, content: bytes, error: type[TwoTowerError]) -> None:
    """Refuse the pointer that Git leaves where a file of Git LFS was not fetched.

    Args:
        path: Its file.
        content: Its first bytes.
        error: The error class to raise.

    Raises:
        TwoTowerError: It is one.
    """
    if content.startswith(b"version https://git-lfs"):
        raise error(
            f"{path}: is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder"
        )


@contextmanager
def opened(path: Path, error: type[TwoTowerError], what: str, remedy: str) -> Iterator[int]:
    """Give the descriptor of an ordinary file, opened to read.

    Args:
        path: The file.
        error: The error class to raise.
        what: Kind of file for messages, as `shard`.
        remedy: End of every message: what to do.

    Raises:
        TwoTowerError: It is missing, or no ordinary file.
    """
    refuse_dangling(path, error)
    try:
        # a pipe that nobody writes to would keep a plain open waiting
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError as problem:
        raise error(f"{path}: this {what} is missing; {remedy}") from problem
    except OSError as problem:
        raise error(f"{path}: cannot be read: {problem.strerror}; {remedy}") from problem
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            found = "a folder" if stat.S_ISDIR(mode) else "no ordinary file"
            raise error(f"{path}: is {found}, not a {what}; {remedy}")
        yield descriptor
    finally:
        os.close(descriptor)


def read_file(
    path: Path, error: type[TwoTowerError], remedy: str, most: int = MAX_FILE_BYTES
) -> bytes:
    """Return the content of a small file.

    Raises:
        TwoTowerError: It cannot be read, has more bytes than `most`, or is a Git LFS pointer.
    """
    with opened(path, error, "file", remedy) as descriptor:
        size = os.fstat(descriptor).st_size
        if size > most:
            raise error(
                f"{path}: has {size:,} bytes, and {most:,} are read at most: it is not what its "
                f"name says; {remedy}"
            )
        content = read_at(descriptor, size, 0)
    refuse_pointer(path, content, error)
    return content
