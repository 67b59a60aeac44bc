"""A line on standard error that says how far a long work is.

Nothing appears for work that ends within two seconds, nor where standard error is no terminal.
"""

from __future__ import annotations

import sys
import time

__all__ = ["ByteMeter"]

QUIET_SECONDS = 2.0
REDRAW_SECONDS = 0.2


class ByteMeter:
    """Shows bytes done, bytes in all, and the rate; call it with both numbers.

    Args:
        what: The work, as in "binding weights".
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._start = time.monotonic()
        self._drawn = 0.0

    def __call__(self, done: int, total: int) -> None:
        """Draw the line again, if it is time."""
        now = time.monotonic()
        elapsed = now - self._start
        if elapsed < QUIET_SECONDS or not sys.stderr.isatty():
            return
        if now - self._drawn < REDRAW_SECONDS and done < total:
            return
        self._drawn = now
        share = done / total if total else 1.0
        rate = done / elapsed / 1e9
        end = "\n" if done >= total else ""
        line = f"\r{self._what}: {share:4.0%} of {total / 1e9:.1f} GB, {rate:.1f} GB/s"
        print(line, end=end, file=sys.stderr, flush=True)
