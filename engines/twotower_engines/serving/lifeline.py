"""End a server together with the command that started it, however that one ends.

The command holds the only writing end of a pipe. The pipe breaks when the command lets go of it, or
when the command dies, even of SIGKILL: the kernel closes it. Two listen. The model `twotower` tells
its open requests that the server is shutting down, so that no client waits in vain. A keeper, which
is this file run as a program in a session of its own, kills the server's process group a second
later and removes what it left. (A server that is asked to end, 2.51, unloads its models for
seconds, in which it answers every request at once with an error, and a balancer sends it all of
them.) A second pipe, cut before, lets the model drain: it takes no new requests and finishes those
that are open.

Nothing but the standard library is imported: the keeper starts in a few hundredths of a second.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

# Variables that hold the descriptors of the pipes' reading ends.
LIFELINE = "TWOTOWER_LIFELINE"
DRAIN = "TWOTOWER_DRAIN"
SHARED_MEMORY = Path("/dev/shm")
SECONDS_TO_TELL = 1.0  # for what the open requests are told to be on its way


def on_cut(pipe: str, act: Callable[[], None]) -> None:
    """Call `act` from a thread once a pipe is cut; never in a server started without one.

    Args:
        pipe: `LIFELINE` or `DRAIN`.
        act: Called once.
    """
    descriptor = os.environ.get(pipe, "")
    if not descriptor:
        return

    def listen() -> None:
        while os.read(int(descriptor), 1):
            pass
        act()

    threading.Thread(target=listen, name="lifeline", daemon=True).start()


def start_keeper(lifeline: int, server: int, prefix: str, folder: Path) -> subprocess.Popen[bytes]:
    """Start the process that ends a server once the lifeline is cut.

    Args:
        lifeline: Descriptor of the pipe's reading end.
        server: Process id of the server, which leads its process group.
        prefix: Prefix of its shared-memory regions.
        folder: Its temporary folder.
    """
    program = [sys.executable, "-I", "-S", __file__]
    return subprocess.Popen(
        [*program, str(server), prefix, str(folder)],
        stdin=lifeline,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,  # a Ctrl-C at the terminal is not for it
    )


def remove_left(prefix: str, folder: Path) -> None:
    """Remove the shared memory and the temporary folder of a server that has ended."""
    for left in SHARED_MEMORY.glob(f"{prefix}*"):
        left.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _keep(server: int, prefix: str, folder: Path) -> None:
    """Be the keeper; the lifeline is standard input."""
    ends = []
    with contextlib.suppress(OSError):  # it has ended already, or the kernel is older than 5.3
        ends.append(os.pidfd_open(server))
    sys.stdin.buffer.read()
    select.select(ends, [], [], SECONDS_TO_TELL)
    # The Python models' processes are in the same group.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server, signal.SIGKILL)
    remove_left(prefix, folder)


if __name__ == "__main__":
    _keep(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
