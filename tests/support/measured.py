"""Runs a verb in a process of its own and measures its time and peak memory."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass

# The kernel's own peak of this process image. `ru_maxrss` would not do: it survives exec, and so
# counts the memory of the test process that the child was forked from.
_PROGRAM = """
import atexit, sys
from pathlib import Path
from twotower_client.cli import main

def tell():
    status = Path("/proc/self/status").read_text()
    print(status.split("VmHWM:")[1].split()[0], file=sys.stderr)

atexit.register(tell)
main()
"""


@dataclass(frozen=True)
class Finished:
    """What a verb printed and took."""

    stdout: str
    seconds: float
    peak_bytes: int


def run_measured(*arguments: object, timeout: float = 300) -> Finished:
    """Run `twotower ARGUMENTS`, which must succeed within seconds."""
    start = time.monotonic()
    command = [sys.executable, "-c", _PROGRAM, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    seconds = time.monotonic() - start
    assert done.returncode == 0, done.stderr
    return Finished(done.stdout, seconds, int(done.stderr.split()[-1]) * 1024)
