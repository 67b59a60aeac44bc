"""Starts worker processes that build engines, follows them, and ends them.

The caller is safe from the library: a crash becomes an error with a name, an interrupt kills the
workers, and a worker whose parent is gone is ended by the kernel.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from twotower_engines.errors import BuildError

Progress = Callable[[str, str], None]
"""Called with a tower and the state of its build."""

Job = dict[str, Any]
STDERR_LINES = 8
GRACE_SECONDS = 10.0
"""How long an interrupted worker may take to reach its next step and write its timing cache."""

ALLOCATOR = ":".join(
    (
        "glibc.malloc.hugetlb=1",
        "glibc.malloc.mxfast=0",
        "glibc.malloc.tcache_count=500",
        "glibc.malloc.tcache_max=256",
    )
)
"""Settings of glibc's malloc for a compiler that makes millions of small objects: with the defaults
a quarter of its time goes into consolidating free lists. Another libc ignores them."""

MEMORY_TO_SHARE = 2_300_000_000
"""Bytes that workers may hold together and all keep running; 0.1 GB of each is the library, which
they share. Both full-size towers hold 2.0 GB at their end, so none waits for the other."""


@dataclass(frozen=True, slots=True)
class Library:
    """One of NVIDIA's builders, and how a process comes to have it.

    Attributes:
        title: For people.
        module: Module of its Python API.
        install: Remedy where it is missing or does not work.
    """

    title: str
    module: str
    install: str


def build_engine_files(
    library: Library, jobs: Mapping[str, Job], at_once: int, progress: Progress
) -> dict[str, dict[str, Any]]:
    """Build engines, each in a worker of its own.

    Args:
        library: The builder.
        jobs: Tower to the job of `library_build.build_engine_file`. Files of the work in progress
            go beside the engine file.
        at_once: How many workers may run at the same time.
        progress: Called while they run.

    Returns:
        Tower to the result of `build_engine_file`, with `versions`, `peak_rss` in bytes,
        `cpu_seconds` and `waited_seconds` (ready to run, without a core).

    Raises:
        BuildError: The library is missing or wrong, refuses a graph, or crashed.
        KeyboardInterrupt: Passed on, after every worker is gone.
    """
    workers = [
        _Worker(library, tower, {"module": library.module, **job}, Path(job["plan"]).parent)
        for tower, job in jobs.items()
    ]
    return _follow(workers, progress, at_once)


def _follow(
    workers: Sequence[_Worker], progress: Progress, at_once: int
) -> dict[str, dict[str, Any]]:
    """Run all workers to their end; whatever goes wrong, none is left running."""
    waiting = list(workers)
    running: dict[_Worker, None] = {}
    results: dict[str, dict[str, Any]] = {}
    try:
        with selectors.DefaultSelector() as selector:
            while waiting or running:
                while waiting and len(running) < at_once:
                    worker = waiting.pop(0)
                    selector.register(worker.start(), selectors.EVENT_READ, worker)
                    running[worker] = None
                _share_memory(list(running))
                for key, _ in selector.select(timeout=0.1):
                    worker = key.data
                    if not worker.read(progress):
                        selector.unregister(key.fileobj)
                        del running[worker]
                        results[worker.tower] = worker.result()
    finally:
        for worker in workers:
            worker.end()
    return results


def _share_memory(running: Sequence[_Worker]) -> None:
    """Pause all workers but the oldest while they hold much memory together."""
    is_much = sum(worker.resident() for worker in running) > MEMORY_TO_SHARE
    for index, worker in enumerate(running):
        worker.pause(is_much and index > 0)


class _Worker:
    """One worker process and what it has said so far."""

    def __init__(self, library: Library, tower: str, job: Job, folder: Path) -> None:
        self.tower = tower
        self._library = library
        self._has_timings = bool(job.get("timing_cache"))
        self._job_file = folder / f"{tower}.json"
        self._job_file.write_text(json.dumps(job), encoding="utf-8")
        self._errors = (folder / f"{tower}.stderr").open("w+", encoding="utf-8", errors="replace")
        self._process: subprocess.Popen[bytes] | None = None
        self._events: TextIO | None = None
        self._pending = ""
        self._said: dict[str, Any] = {}
        self._phase = "loading the library"
        self._is_paused = False

    def start(self) -> int:
        """Start the process; returns the descriptor on which it reports."""
        reading, writing = os.pipe()
        module = "twotower_engines.building.flavours.worker"
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, str(self._job_file), str(writing)],
                env={"GLIBC_TUNABLES": ALLOCATOR, **os.environ},
                pass_fds=[writing],
                stdin=subprocess.DEVNULL,
                stdout=self._errors,  # the library prints on both
                stderr=self._errors,
                start_new_session=True,  # an interrupt from the terminal is ours to handle
            )
        finally:
            os.close(writing)
        os.set_blocking(reading, False)
        self._events = os.fdopen(reading, encoding="utf-8")
        return reading

    def read(self, progress: Progress) -> bool:
        """Take in what the worker has said; returns False once it has closed its end."""
        assert self._events is not None
        chunk = os.read(self._events.fileno(), 1 << 16).decode("utf-8", errors="replace")
        *lines, self._pending = (self._pending + chunk).split("\n")
        for line in lines:
            event = json.loads(line)
            if "progress" in event:
                phase, done, total = event["progress"]
                self._phase = phase
                progress(self.tower, f"{phase} {done}/{total}" if total else phase)
            else:
                self._said |= event
        return bool(chunk)

    def resident(self) -> int:
        """Return the bytes of memory that the process holds."""
        assert self._process is not None
        try:
            fields = Path(f"/proc/{self._process.pid}/statm").read_text().split()
        except OSError:
            return 0
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")

    def pause(self, is_wanted: bool) -> None:
        """Stop the process, or let it go on."""
        assert self._process is not None
        if is_wanted != self._is_paused:
            self._process.send_signal(signal.SIGSTOP if is_wanted else signal.SIGCONT)
            self._is_paused = is_wanted

    def result(self) -> dict[str, Any]:
        """Return what the worker made.

        Raises:
            BuildError: It failed or was terminated.
        """
        assert self._process is not None
        code = self._process.wait()
        if "done" in self._said:
            return {**self._said["done"], "versions": self._said["versions"]}
        if "failed" in self._said:
            raise BuildError(self._explained(self._said["failed"], self._said["message"]))
        how = f"exit code {code}" if code >= 0 else f"signal {_signal_name(-code)}"
        raise BuildError(
            f"{self._library.title} ended the process that was building {self.tower} ({how}, in "
            f"the phase `{self._phase}`): {self._last_errors()}; {_advice(-code)}"
        )

    def end(self) -> None:
        """End the process, if it still runs, and close what was open.

        One that has timings is asked first, and writes them; all others are killed.
        """
        if self._process is not None and self._process.poll() is None:
            try:
                if self._has_timings:
                    self.pause(False)
                    self._process.terminate()
                    self._process.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                pass
            finally:  # also where a second interrupt ends the wait
                self._process.kill()
                self._process.wait()
        if self._events is not None:
            self._events.close()
        self._errors.close()

    def _explained(self, kind: str, message: str) -> str:
        library = self._library
        if kind == "import":
            return f"{library.title} cannot be loaded: {message}; {library.install}"
        if kind == "check":
            return (
                f"{library.title} loads, but cannot build a network of one node: {message}; "
                f"{library.install}"
            )
        if kind == "system":
            return f"{message}, while the {self.tower} engine was built or written"
        return (
            f"{library.title} refuses the {self.tower} graph: {message}; "
            "export the checkpoint again with this version of twotower"
        )

    def _last_errors(self) -> str:
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
        return " | ".join(lines[-STDERR_LINES:]) or "it printed nothing"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)


def _advice(number: int) -> str:
    if number == signal.SIGKILL:
        return "the machine may have run out of memory (a full-size tower takes about 1 GB)"
    return "the graph may hold something that this library cannot take without a GPU"
