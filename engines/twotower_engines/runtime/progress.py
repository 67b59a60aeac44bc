"""Progress of a long load; a log, as of a Triton server, has only the line at the end."""

from __future__ import annotations

import math

from twotower_contract.progress import StatusLine


class ByteMeter:
    """Shows bytes done, bytes in all, and the rate; call it with both numbers.

    The time begins with the first call of either kind, and so does the count of bytes.

    Args:
        what: The work, as in "binding weights".
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._first = 0
        self._bytes: StatusLine | None = None
        self._calls: StatusLine | None = None

    def __call__(self, done: int, total: int) -> None:
        """Draw the line again, if it is time."""
        if self._bytes is None:
            self._bytes, self._first = StatusLine(log_seconds=math.inf), done
        line, is_last = self._bytes, done >= total
        if line.is_due(is_last=is_last):
            rate = (done - self._first) / line.seconds / 1e9
            share = done / total if total else 1.0
            text = f"{share:4.0%} of {total / 1e9:.1f} GB, {rate:.1f} GB/s"
            line.draw(f"{self._what}: {text}", is_last=is_last)

    def prepared(self, done: int, total: int) -> None:
        """Draw the line of prepared calls again, if it is time."""
        self._calls = line = self._calls or StatusLine(log_seconds=math.inf)
        is_last = done >= total
        if line.is_due(is_last=is_last):
            text = f"{done} of {total}, {line.seconds:.0f} s"
            line.draw(f"preparing calls: {text}", is_last=is_last)
