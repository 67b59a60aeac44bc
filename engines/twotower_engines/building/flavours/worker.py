"""The process in which NVIDIA's library builds one plan.

`python -m twotower_engines.building.flavours.worker JOB_FILE EVENT_FD` reads a job (JSON) and
writes events, one JSON object per line, to a pipe that its parent passed:

    {"progress": [phase, done, total]}     many
    {"versions": {...}}                    once the library is loaded and has built one node
    {"done": {...}}                        the engine is written
    {"failed": kind, "message": text}      kind: import, check, build, system

Where the job has a timing cache, SIGTERM ends the build at its next step, and the cache is written.

A process of its own, because the library may terminate it, and because it can be killed at any
time.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twotower_engines.building.flavours.library_build import (
    RefusedError,
    build_engine_file,
    one_node_engine,
)

PROGRESS_SECONDS = 0.1
TRIM_SECONDS = 0.5
PR_SET_PDEATHSIG = 1


class _FailedError(Exception):
    """Work ended with a message for the parent."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class _Events:
    """Writer of events, from any thread; progress at most ten times a second.

    Attributes:
        stopped: Set when the build is to end at its next step.
    """

    def __init__(self, descriptor: int) -> None:
        self.stopped = threading.Event()
        self._stream = os.fdopen(descriptor, "w", encoding="utf-8", buffering=1)
        self._lock = threading.Lock()
        self._last = 0.0

    def send(self, event: Mapping[str, Any]) -> None:
        with self._lock, contextlib.suppress(BrokenPipeError):
            self._stream.write(json.dumps(event) + "\n")

    def progress(self, phase: str, done: int, total: int) -> bool:
        now = time.monotonic()
        if now - self._last >= PROGRESS_SECONDS:
            self._last = now
            self.send({"progress": [phase, done, total]})
        return not self.stopped.is_set()


def main() -> None:
    """Do the job; exit code 0 unless the library ends the process."""
    _die_with_parent()
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    events = _Events(int(sys.argv[2]))
    if job.get("timing_cache"):
        _stop_on_sigterm(events.stopped)
    threading.Thread(target=_give_back_memory, daemon=True).start()
    try:
        trt = _import(job["module"])
        _check(trt)
        events.send({"versions": {job["module"]: str(trt.__version__)}})
        made = build_engine_file(trt, job, events.progress)
        usage = resource.getrusage(resource.RUSAGE_SELF)
        made |= {
            "peak_rss": usage.ru_maxrss << 10,
            "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
            "waited_seconds": _waited(),
        }
        events.send({"done": made})
    except _FailedError as problem:
        events.send({"failed": problem.kind, "message": str(problem)})
    except RefusedError as problem:
        events.send({"failed": "build", "message": str(problem)})
    except OSError as problem:
        where = problem.filename2 or problem.filename or Path(job.get("plan", "")).parent
        message = f"{where}: {problem.strerror or problem}"
        events.send({"failed": "system", "message": message})
    sys.stdout.flush()
    os._exit(0)  # the library's own teardown is not always survived, and nothing is left to lose


def _die_with_parent() -> None:
    """Have the kernel end this process if the parent is killed without a chance to do it."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _stop_on_sigterm(stopped: threading.Event) -> None:
    """Set an event at SIGTERM, even while the main thread is deep inside the library.

    Python runs handlers in the main thread only, so a thread waits for the signal; called before
    there are others, which inherit the blocked signal.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        signal.sigwait({signal.SIGTERM})
        stopped.set()

    threading.Thread(target=wait, daemon=True).start()


def _give_back_memory() -> None:
    """Return freed memory to the system again and again.

    The compiler's many small objects leave holes all over the heap, which malloc keeps: a fifth of
    the peak.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    while trim is not None:
        time.sleep(TRIM_SECONDS)
        trim(0)


def _waited() -> float:
    """Return the seconds that this process was ready to run and had no core."""
    try:
        return round(int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9, 2)
    except (OSError, IndexError):
        return 0.0


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as problem:
        raise _FailedError("import", str(problem)) from problem


def _check(trt: Any) -> None:
    """Build one node before a graph goes in."""
    try:
        one_node_engine(trt)
    except RefusedError as problem:
        raise _FailedError("check", str(problem)) from problem


if __name__ == "__main__":
    main()
