"""How a process of ours is ended, and how it ends those that it started.

SIGTERM (Slurm, Kubernetes, `docker stop`) and SIGHUP (a terminal that is closed) are Ctrl-C: what
is half done is removed, and the exit code is `INTERRUPTED`, which nothing else uses.
"""

from __future__ import annotations

import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

Item = TypeVar("Item")

INTERRUPTED = 130
GRACE_SECONDS = 10.0  # for a child to remove what it made
HEARD_SECONDS = 0.2  # in which a wait notices that the process is to end
ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)


def interruptible() -> None:
    """Let SIGTERM and SIGHUP interrupt this process as Ctrl-C does.

    Those that are ignored (`nohup`) or handled already stay as they are.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for number in (signal.SIGINT, *ENDING):
        if signal.getsignal(number) in DEFAULTS:
            signal.signal(number, _interrupt)


def next_of(items: queue.SimpleQueue[Item], timeout: float = float("inf")) -> Item:
    """Return the next item, and let a signal interrupt the wait for it.

    Python handles a signal in the main thread, between two steps of it. One that comes just before
    a wait, or in another thread, does not end the wait; so the main thread waits for short times.

    Raises:
        queue.Empty: There was none for `timeout` seconds.
    """
    if threading.current_thread() is not threading.main_thread():
        return items.get(timeout=None if timeout == float("inf") else timeout)
    end = time.monotonic() + timeout
    while True:
        left = max(0.0, end - time.monotonic())
        try:
            return items.get(timeout=min(left, HEARD_SECONDS))
        except queue.Empty:
            if left <= HEARD_SECONDS:
                raise


@contextmanager
def told_to_end(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Hand Ctrl-C, SIGTERM and SIGHUP over to a handler, as long as the block runs."""
    numbers = (signal.SIGINT, *ENDING)
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_child(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[bytes]:
    """Run a program of ours to its end, as `subprocess.run` does; end it first if we are ended.

    Args:
        command: Program and arguments.
        **options: As for `subprocess.Popen`.

    Raises:
        KeyboardInterrupt: We or the program were interrupted; it has cleaned up.
    """
    with subprocess.Popen(command, **options) as child:
        try:
            said = child.communicate()
        except BaseException:
            child.terminate()
            try:
                child.wait(GRACE_SECONDS)
            finally:
                child.kill()
            raise
    if child.returncode == INTERRUPTED:
        raise KeyboardInterrupt
    return subprocess.CompletedProcess(command, child.returncode, *said)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt; a request to end that follows does not disturb the cleaning up.

    A terminal's Ctrl-C reaches a whole family of processes, and the parent tells each child again.
    """
    for one in ENDING:
        signal.signal(one, signal.SIG_IGN)
    raise KeyboardInterrupt
