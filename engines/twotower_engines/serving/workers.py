"""Threads for work that must not hold up another: what is queued, or one thing again and again."""

from __future__ import annotations

import queue
import sys
import threading
import traceback
from collections.abc import Callable

Work = Callable[[], None]


class Worker:
    """Does what it is given, in order.

    Args:
        name: Name of the thread.
        on_death: Called by the dying thread where a piece of work raised.
    """

    def __init__(self, name: str, on_death: Callable[[], None]) -> None:
        self._on_death = on_death
        self._work: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Pieces of work that wait."""
        return self._work.qsize()

    def put(self, work: Work) -> None:
        """Queue a piece of work, and return at once."""
        self._work.put(work)

    def close(self) -> None:
        """Do what is queued, and end the thread."""
        self._work.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while (work := self._work.get()) is not None:
                work()
        except BaseException:
            traceback.print_exc(file=sys.stderr)
            self._on_death()


class Periodic:
    """Calls a function again and again, and once more at its end, from a thread of its own.

    What it raises is printed and costs nobody anything.

    Args:
        name: Name of the thread.
        seconds: Time from the end of one call to the next.
        work: The function.
    """

    def __init__(self, name: str, seconds: float, work: Work) -> None:
        self._seconds, self._work = seconds, work
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Call it once more, and end the thread."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._stop.wait(self._seconds)
            try:
                self._work()
            except Exception:
                traceback.print_exc(file=sys.stderr)
