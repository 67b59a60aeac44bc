"""Progress of `twotower build`, on standard error."""

from __future__ import annotations

from twotower_contract.progress import StatusLine

WIDTH = 100


class BuildProgress:
    """Shows what each tower's build is doing; call it with a tower and a text."""

    def __init__(self, sku: str) -> None:
        self._sku = sku
        self._line = StatusLine(log_seconds=10.0)
        self._towers: dict[str, str] = {}

    def __call__(self, tower: str, text: str) -> None:
        """Take in news, and show it if it is time."""
        self._towers[tower] = text
        if self._line.is_due():
            doing = "; ".join(f"{name}: {what}" for name, what in self._towers.items())
            self._line.draw(f"building {self._sku}, {self._line.seconds:.0f} s: {doing}"[:WIDTH])

    def close(self) -> None:
        """Clear the line."""
        self._line.clear()
