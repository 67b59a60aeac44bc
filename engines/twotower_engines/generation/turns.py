"""Which rows extend their context in a turn.

A context pass costs nearly the same for one row as for many, so finished blocks wait for each other
for a while, and so do prompts. And a turn has a budget for prompts: while some prefill, the others'
blocks must not stand still. Nothing here changes an answer, only when its parts are computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from twotower_contract.engine_set import Limits
from twotower_engines.generation.costs import Costs, between
from twotower_engines.generation.row import Row, Stage
from twotower_engines.runtime.interface import ExtendRow
from twotower_engines.runtime.resident.calls import SMALLEST_BLOCK, bucket

LEAST_CHUNK = 32
CHUNK_SLACK = 1.25
"""A chunk may cost so much more per token than the cheapest size: small ones start others sooner,
and more of a prompt's beginning can be kept for the next."""

SHARED_COST = 0.8
"""Another prompt's chunk in a call saves something where it adds at most so much of one alone."""

USUAL_CALLS = 5.0
"""Denoiser calls of a block, until some were counted."""

MEMORY = 64
"""Blocks, or turns, over which is averaged."""

PACE_KEPT = 0.9
"""Share of the sums of times that is kept from one call to the next."""


def chunk_tokens(costs: Costs, limits: Limits) -> int:
    """Return into how many tokens prompts are cut, the same for every request of these engines.

    An answer may depend on the cut, in the last bits of a sum; so it does not depend on the load.
    """
    sizes = [limits.max_tokens_per_call]
    while sizes[-1] // 2 >= LEAST_CHUNK:
        sizes.append(sizes[-1] // 2)
    per_token = {size: costs.extend(1, size) / size for size in sizes}
    least = min(per_token.values())
    return min(size for size in sizes if per_token[size] <= CHUNK_SLACK * least)


@dataclass(slots=True)
class Turns:
    """The choices of a scheduler, by the costs of its engines.

    Attributes:
        costs: Seconds of the calls.
        limits: Limits of the engines.
        prefill_seconds: Time that prompts may take from running rows in a turn, where they share
            its call at a gain; else as long as the rows' own step takes. At least one chunk of one
            prompt is prefilled.
        groups_calls: Whether rows that need a context call wait for each other.
        chunk: Tokens of a prompt in one call.
        calls_per_block: Denoiser calls that blocks took lately, on average.
        prompts_per_turn: Rows that came with a chunk of a prompt in a turn lately, on average.
        measured: Seconds that calls for prompts took lately, summed.
        modelled: Seconds that `costs` gives for the same calls.
    """

    costs: Costs
    limits: Limits
    prefill_seconds: float
    groups_calls: bool = True
    chunk: int = 0
    calls_per_block: float = USUAL_CALLS
    prompts_per_turn: float = 0.0
    measured: float = 0.0
    modelled: float = 0.0

    def __post_init__(self) -> None:
        """Choose the size of chunks."""
        self.chunk = self.chunk or chunk_tokens(self.costs, self.limits)

    def extensions(self, rows: Sequence[Row]) -> list[list[Row]]:
        """Return the rows of each context call of this turn.

        Args:
            rows: All rows, in the order of their slots.
        """
        waiting = [row for row in rows if row.pending.size]
        self._count_prompts(waiting)
        prompts = set(self._prompts(rows, waiting))
        ready = [row for row in waiting if row.stage is Stage.COMMITTING or row in prompts]
        # a single token is a step of its own, which nobody waits for
        return [
            some for size, some in self._calls(ready) if size == 1 or self._pays(rows, some, size)
        ]

    def part(self, row: Row) -> ExtendRow:
        """Return the next tokens of a row that go into one call."""
        size, mode = self._tokens(row), row.request.mode
        is_last = size == row.pending.size
        return ExtendRow(
            row.slot,
            row.pending[:size],
            logits=is_last and mode == "ar",
            keep_previous=is_last and mode == "mock_ar",
        )

    def stepped(self, rows: Sequence[Row], stepping: Sequence[Row]) -> None:
        """Count a denoiser call: the rows that need a context call waited for it."""
        size = max(row.block.size for row in stepping)
        seconds = self.costs.denoise(len(stepping), size)
        for row in rows:
            if row.pending.size:
                row.waited += seconds

    def finished(self, calls: int) -> None:
        """Count the denoiser calls of a block."""
        self.calls_per_block += (calls - self.calls_per_block) / MEMORY

    def prefilled(self, rows: int, tokens: int, seconds: float) -> None:
        """Compare a call for chunks of prompts with its cost; the last few count."""
        if tokens == self.chunk:
            self.measured = self.measured * PACE_KEPT + seconds
            self.modelled = self.modelled * PACE_KEPT + self.costs.extend(rows, tokens)

    @property
    def pace(self) -> float:
        """Measured time of calls for prompts over the time that `costs` gives for them."""
        return self.measured / self.modelled if self.modelled else 1.0

    def _tokens(self, row: Row) -> int:
        """Return how many of a row's tokens go into one call."""
        size = min(row.pending.size, self.chunk)
        if row.request.mode == "mock_ar" and row.pending.size > 1:
            # the last token goes alone, so that the states before it can be kept
            size = min(size, row.pending.size - 1)
        return size

    def _calls(self, rows: Sequence[Row]) -> list[tuple[int, list[Row]]]:
        """Return the size and the rows of each call, single tokens apart.

        Rows are padded to the longest of their call; those of different sizes share one where that
        costs less than a call of their own.
        """
        by_size: dict[int, list[Row]] = {}
        for row in rows:
            size = self._tokens(row)
            size = size if size == 1 else bucket(size, self.chunk, SMALLEST_BLOCK)
            by_size.setdefault(size, []).append(row)
        cost = self.costs.extend
        calls: list[tuple[int, list[Row]]] = []
        for size, some in sorted(by_size.items(), reverse=True):
            if calls and size > 1:
                large, others = calls[-1]
                apart = cost(len(others), large) + cost(len(some), size)
                if cost(len(others) + len(some), large) <= apart:
                    calls[-1] = large, sorted(others + some, key=lambda row: row.slot)
                    continue
            calls.append((size, some))
        return calls

    def _prompts(self, rows: Sequence[Row], waiting: Sequence[Row]) -> list[Row]:
        """Return the rows whose prompts go on: the oldest, as many as the turn has time for."""
        prompts = [row for row in waiting if row.stage is Stage.PREFILLING]
        prompts.sort(key=lambda row: row.number)
        running = len(rows) - len(prompts)
        if not running:  # nobody waits for them
            return prompts
        step = self.costs.denoise(running, SMALLEST_BLOCK)
        count, size, alone, before = 0, 0, 0.0, 0.0
        for row in prompts:
            size = max(size, self._tokens(row))
            seconds = self.pace * self.costs.extend(count + 1, size)
            alone = alone or seconds
            is_shared = seconds - before <= SHARED_COST * alone
            if count and seconds > (self.prefill_seconds if is_shared else step):
                break
            count, before = count + 1, seconds
        return prompts[:count]

    def _count_prompts(self, waiting: Sequence[Row]) -> None:
        """Average how many rows come with another part of a prompt in a turn."""
        new = sum(row.stage is Stage.PREFILLING and not row.waited for row in waiting)
        self.prompts_per_turn += (new - self.prompts_per_turn) / MEMORY

    def _pays(self, rows: Sequence[Row], ready: Sequence[Row], size: int) -> bool:
        """Whether a context call is made now, rather than a step later for more rows.

        The choice of least time lost per row of the call: rows that wait for it lose the time of
        each step, and all rows lose the time of the call.
        """
        denoising = [
            row
            for row in rows
            if row.stage is Stage.STEPPING and row.request.mode == "mask_diffusion"
        ]
        if not denoising or not self.groups_calls:
            return True
        count = len(ready)
        step = self.costs.denoise(len(denoising), max(row.block.size for row in denoising))
        lost = sum(row.waited for row in ready)
        if max(row.waited for row in ready) >= self.calls_per_block * step / 2:
            return True  # a block must not take half as long again
        stages = {row.stage for row in ready}
        coming = 0.0
        if Stage.PREFILLING in stages:
            coming += self.prompts_per_turn
        if Stage.COMMITTING in stages:
            coming += len(denoising) / self.calls_per_block
        now = lost + len(rows) * between(self.costs.extend, count, size)
        later = lost + count * step + len(rows) * between(self.costs.extend, count + coming, size)
        return now / count <= later / (count + coming)
