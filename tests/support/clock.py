"""A clock that a test moves, so that a time passes where it should and nowhere else."""

from __future__ import annotations

import time


class Clock:
    """Stands in the place of a module's `time`, and is ahead of it by what a test says.

    Args:
        is_held: Whether it stands still until it is let go.
    """

    def __init__(self, is_held: bool = False) -> None:
        self._ahead = 0.0
        self._held_at = time.monotonic() if is_held else None

    def monotonic(self) -> float:
        """Return the time in seconds."""
        now = time.monotonic() if self._held_at is None else self._held_at
        return now + self._ahead

    def forward(self, seconds: float) -> None:
        """Let so many seconds pass at once."""
        self._ahead += seconds

    def let_go(self) -> None:
        """Go on from where it was held; a second time does nothing."""
        if self._held_at is not None:
            self._ahead += self._held_at - time.monotonic()
            self._held_at = None
