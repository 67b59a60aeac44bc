"""Files and folders that are either complete or recognizably not: written beside, then renamed.

A process that is killed leaves a folder named `.partial-...`, which nothing reads and the next
process that works beside it removes: its owner held a lock on it, and the kernel let go of that.

A folder takes the place of another in one step where the file system can exchange two names (ext4,
xfs, btrfs, tmpfs, overlayfs). Elsewhere (NFS) it takes two renames; a process that is killed
between them leaves the old folder as `.replaced-NAME`, and the next that works there puts it back.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from twotower_contract.errors import DryRunEndsError, TwoTowerError

PREFIX = ".partial-"
REPLACED = ".replaced-"
AT_FDCWD = -100
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
RENAME_EXCHANGE = 2  # of linux/fs.h


@dataclass(frozen=True, slots=True)
class Writing:
    """How a command may write its output.

    Attributes:
        force: Replace what is there, whatever it is, and use nothing that was made before.
        dry_run: Check everything, and write nothing.
    """

    force: bool = False
    dry_run: bool = False

    def begin(self, out: Path, what: str) -> None:
        """End a dry run, now that all is checked.

        Raises:
            DryRunEndsError: Says what would be written.
        """
        if self.dry_run:
            raise DryRunEndsError(f"would write {what} to {out}; nothing was written (--dry-run)")


WITH_CARE = Writing()
"""Replaces nothing but earlier output of the same kind."""


@contextlib.contextmanager
def partial_file(path: Path) -> Iterator[Path]:
    """Give a name beside `path` to write to; the file takes its place if the block ends well.

    A device or pipe (/dev/null, /dev/stdout, `>(...)` of a shell) is written itself: a file in its
    place would take it from everybody. Where `path` is a link, the file that it names is replaced.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    path = path.resolve()
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def check_file(path: Path) -> Path:
    """Return `path` if `write_text` could write it, before the work whose result it is to hold.

    Raises:
        OSError: It names the file, not the partial one.
    """
    if not path.exists() or path.is_file():
        try:
            with tempfile.TemporaryFile(dir=path.resolve().parent):
                pass
        except OSError as problem:
            raise OSError(problem.errno, problem.strerror, str(path)) from problem
    return path


def write_text(path: Path, text: str) -> None:
    """Write a file beside its place and rename it, so that no reader sees half of it."""
    with partial_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def new_folder(out: Path, error: type[TwoTowerError]) -> Iterator[Path]:
    """Give a new folder that takes the place of `out`, in one step, if the block ends well.

    Args:
        out: Its place; a folder that is there is replaced, see `check_replaceable`. Where it is a
            link to a folder, that one is replaced.
        error: Raised where the disk is full or the place cannot be written.
    """
    with reported(out, error):
        place = out.resolve()
        with partial_folder(place.parent) as work:
            made = work / place.name
            made.mkdir()
            made.chmod(0o755)  # whatever the umask: a server may be another user
            yield made
            put_in_place(made, place)


@contextlib.contextmanager
def reported(place: Path, error: type[TwoTowerError]) -> Iterator[None]:
    """Turn an OSError while `place` is written into an error that the user can repair."""
    try:
        yield
    except OSError as problem:
        if problem.errno == errno.EBUSY:
            raise _is_mounted(place, error) from problem
        # Where two files are named, the second was to be written; a full disk is that of the place.
        name = problem.filename2 or problem.filename
        is_place = name is None or Path(os.fsdecode(name)).name.startswith(PREFIX)
        where = place if problem.errno in FULL or is_place else given_path(name)
        why = f"cannot be written: {problem.strerror or problem}"
        raise error(f"{where}: {why}; {remedy(problem)}") from problem


def given_path(name: str | bytes) -> str:
    """Return the path that a user knows for one that may be that of a partial file or folder."""
    folders = [part for part in Path(os.fsdecode(name)).parts if not part.startswith(PREFIX)]
    return re.sub(r"\.\d+\.partial$", "", str(Path(*folders)))


def remedy(problem: OSError) -> str:
    """Return what to do about a path that the system refused."""
    if problem.errno in FULL:
        return "make room there, or name a path on another disk"
    return "name another path, or change what is at this one"


def _is_mounted(place: Path, error: type[TwoTowerError]) -> TwoTowerError:
    return error(
        f"{place}: is a mount point, which cannot be replaced; name a folder inside it, as "
        f"{place / 'new'}"
    )


def check_replaceable(
    out: Path,
    what: str,
    is_ours: Callable[[Path], bool],
    error: type[TwoTowerError],
    writing: Writing = WITH_CARE,
) -> None:
    """Refuse to write over anything but an empty folder or an earlier output of the same kind.

    Args:
        out: The folder to be written.
        what: Name of the kind in messages, as `a bundle`.
        is_ours: Whether a folder is an earlier output of this kind.
        error: Raised where there is something else.
        writing: Whether something else is replaced all the same.
    """
    if not out.exists() and not out.is_symlink():
        return
    if out.is_mount():
        raise _is_mounted(out, error)
    if not out.is_dir():
        raise error(f"{out}: is a file; name a folder for {what}")
    if any(out.iterdir()) and not writing.force and not is_ours(out):
        raise error(
            f"{out}: holds files that are not {what}, and would be replaced; name another folder, "
            "or replace them with --force"
        )


@contextlib.contextmanager
def partial_folder(parent: Path) -> Iterator[Path]:
    """Give a new folder in `parent` to work in; it is removed at the end, renamed parts are not.

    Leftovers of killed processes in `parent` are removed or put back first.
    """
    parent.mkdir(parents=True, exist_ok=True)
    with locked(parent):  # between making a folder and locking it, it would look abandoned
        for path in parent.glob(f"{PREFIX}*"):
            _remove_if_abandoned(path)
        for path in parent.glob(f"{REPLACED}*"):
            _put_back(path)
        made = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        descriptor = os.open(made, os.O_RDONLY)
        _lock(descriptor)
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
            _lock(descriptor, wait=False)
        except BlockingIOError:
            if waiting is not None:
                waiting()
            _lock(descriptor)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, *, wait: bool = True) -> None:
    import fcntl  # Windows has none: what only reads imports this module there too

    fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


def _remove_if_abandoned(path: Path) -> None:
    with contextlib.suppress(OSError):  # in use, or already gone
        descriptor = os.open(path, os.O_RDONLY)
        try:
            _lock(descriptor, wait=False)
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
