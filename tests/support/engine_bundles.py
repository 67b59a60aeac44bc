"""What the tests of the builders share: bundles to build, and an eye on processes."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
from pathlib import Path

from tests.support import TWOTOWER
from tests.support.exports import without_golden
from tests.support.sparse_checkpoint import write_sparse_checkpoint

COMMAND = [*TWOTOWER, "build"]
SMALL = "M*E"


def write_bundle_of(folder: Path, pattern: str = SMALL, dtype: str = "bfloat16") -> Path:
    """Write a bundle of a small random checkpoint."""
    from twotower_export.bundle import write_bundle
    from twotower_export.checkpoint import open_checkpoint
    from twotower_export.tiny.checkpoints import write_random_checkpoint

    write_random_checkpoint(folder / "checkpoint", pattern, 32, 0, dtype, vocab_size=300)
    with without_golden():
        write_bundle(open_checkpoint(folder / "checkpoint"), folder / "bundle")
    return folder / "bundle"


def write_full_size_bundle(folder: Path) -> Path:
    """Write the bundle of a checkpoint of the released model's size, whose weights are holes."""
    from twotower_export.bundle import write_bundle
    from twotower_export.checkpoint import open_checkpoint

    checkpoint = write_sparse_checkpoint(folder / "hub")
    write_bundle(open_checkpoint(checkpoint), folder / "bundle")
    return folder / "bundle"


def run_build(*arguments, **environment):
    """Run `twotower build` as a user does; returns the finished process."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def start_build(*arguments):
    """Start `twotower build` and return the process."""
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def json_of(process):
    """The JSON that a finished build printed, of its only SKU."""
    assert process.returncode == 0, process.stderr
    (result,) = json.loads(process.stdout)["engine_sets"]
    return result


def descendants(pid: int) -> list[int]:
    """A process and everything that it started."""
    found, waiting = [], [pid]
    while waiting:
        found.append(waiting.pop())
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{found[-1]}/task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
    return found


class MemoryWatch:
    """Samples the memory of a process tree; pages that processes share count once.

    A process outside of the tree that maps the same library takes a part of its pages, 50 MB of
    TensorRT-RTX's: figures hold where no other build of this installation runs.

    Attributes:
        peak: the most that was seen, in bytes.
    """

    def __init__(self, pid: int) -> None:
        self.peak = 0
        self._pid = pid
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        self._done.set()
        self._thread.join()
        return self.peak

    def _watch(self) -> None:
        while not self._done.wait(0.1):
            self.peak = max(self.peak, sum(map(proportional_size, descendants(self._pid))))


def proportional_size(pid: int) -> int:
    """Resident bytes of a process, its share only of pages that others map as well."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) << 10
    return 0
