"""Counts of what a scheduler did since it was made, for metrics and for the simulator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from twotower_engines.generation.row import Row
from twotower_engines.runtime.interface import ExtendRow


@dataclass(slots=True)
class Counters:
    """Sums; rows over calls is how full the calls were.

    Attributes:
        requests: Requests that got a slot.
        prompt_tokens: Tokens of their prompts.
        reused_tokens: Those whose states were kept from an earlier prompt.
        denoiser_calls: Calls of the denoiser tower.
        denoiser_rows: Rows of these calls.
        context_calls: Calls of the context tower.
        context_rows: Rows of these calls.
        context_tokens: Tokens of these rows.
        prefix_bytes: Memory that kept prefixes take now.
        prefixes_evicted: Kept prefixes that made room for others.
    """

    requests: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    denoiser_calls: int = 0
    denoiser_rows: int = 0
    context_calls: int = 0
    context_rows: int = 0
    context_tokens: int = 0
    prefix_bytes: int = 0
    prefixes_evicted: int = 0

    def admitted(self, row: Row) -> None:
        """Count a request that got a slot."""
        self.requests += 1
        self.prompt_tokens += len(row.request.prompt_ids)
        self.reused_tokens += row.reused

    def extended(self, parts: Sequence[ExtendRow]) -> None:
        """Count a call of the context tower."""
        self.context_calls += 1
        self.context_rows += len(parts)
        self.context_tokens += sum(part.ids.size for part in parts)

    def denoised(self, rows: int) -> None:
        """Count a call of the denoiser tower."""
        self.denoiser_calls += 1
        self.denoiser_rows += rows
