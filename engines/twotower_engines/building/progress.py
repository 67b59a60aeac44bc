"""What `twotower build` says on standard error while it works.

On a terminal one line is drawn again and again; elsewhere a line appears every ten seconds, so that
a log shows that something happens.
"""

from __future__ import annotations

import sys
import time

QUIET_SECONDS = 2.0
REDRAW_SECONDS = 0.2
LOG_SECONDS = 10.0
WIDTH = 100


class BuildProgress:
    """Shows what each tower's build is doing; call it with a tower and a text.

    Args:
        sku: Named in front.
    """

    def __init__(self, sku: str) -> None:
        self._sku = sku
        self._start = time.monotonic()
        self._drawn = self._start
        self._is_drawn = False
        self._towers: dict[str, str] = {}

    def __call__(self, tower: str, text: str) -> None:
        """Take in news, and show it if it is time."""
        self._towers[tower] = text
        now = time.monotonic()
        is_terminal = sys.stderr.isatty()
        interval = REDRAW_SECONDS if is_terminal else LOG_SECONDS
        if now - self._start < QUIET_SECONDS or now - self._drawn < interval:
            return
        self._drawn = now
        doing = "; ".join(f"{name}: {what}" for name, what in self._towers.items())
        line = f"building {self._sku}, {now - self._start:.0f} s: {doing}"[:WIDTH]
        start, end = ("\r", "") if is_terminal else ("", "\n")
        print(f"{start}{line:<{WIDTH if is_terminal else 0}}", end=end, file=sys.stderr, flush=True)
        self._is_drawn = is_terminal

    def close(self) -> None:
        """Clear the line."""
        if self._is_drawn:
            print(f"\r{'':<{WIDTH}}\r", end="", file=sys.stderr, flush=True)
