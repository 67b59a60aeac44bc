"""The right of the engine's thread to a core.

Every caller waits for this one thread, while the threads that read, send and watch can wait for it
a little. On a busy machine the kernel gives all of them equal turns: on two cores the engine's
thread stood a seventh of its time, ready to run.

Such threads leave nothing to others on the cores that they have. So there is one fewer of them on a
machine than it has cores: two servers on two cores, one thread each, would starve everything else,
their own answers and the watchdog's questions too.
"""

from __future__ import annotations

import os
import socket
import threading

NAME = "twotower-priority"  # of an abstract socket for each right that there is
LOWEST = 1  # of the real-time priorities; all go before every thread that has none


def take_priority() -> str:
    """Let the calling thread run before all others of the machine, until it ends.

    Only where a core is left to the others. What this thread starts has no such right.

    Returns:
        Why not; empty where it does.
    """
    cores = len(os.sched_getaffinity(0))
    if cores < 2:
        return "the machine has one core"
    if not _claim(cores - 1):
        return "other engines on this machine have all cores but one"
    try:
        policy = os.SCHED_FIFO | os.SCHED_RESET_ON_FORK
        os.sched_setscheduler(0, policy, os.sched_param(LOWEST))
    except OSError as problem:
        del _held.claim
        return f"the system does not allow it ({problem.strerror})"
    return ""


_held = threading.local()  # closed by Python when its thread has ended, by the kernel with us


def _claim(count: int) -> bool:
    """Take one of so many rights, if one is left."""
    for number in range(count):
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0{NAME}-{number}")
        except OSError:
            claim.close()
        else:
            _held.claim = claim
            return True
    return False
