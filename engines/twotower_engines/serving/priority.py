"""The right of the engine's thread to a core.

Every caller waits for this one thread, while the threads that read, send and watch can wait for it
a little. On a busy machine the kernel gives all of them equal turns: on two cores the engine's
thread stood a seventh of its time, ready to run.
"""

from __future__ import annotations

import os

LOWEST = 1  # of the real-time priorities; all go before every thread that has none


def take_priority() -> str:
    """Let the calling thread run before all others of the machine.

    Only where a second core is left to the others. What this thread starts has no such right.

    Returns:
        Why not; empty where it does.
    """
    if len(os.sched_getaffinity(0)) < 2:
        return "the machine has one core"
    try:
        policy = os.SCHED_FIFO | os.SCHED_RESET_ON_FORK
        os.sched_setscheduler(0, policy, os.sched_param(LOWEST))
    except OSError as problem:
        return f"the system does not allow it ({problem.strerror})"
    return ""
