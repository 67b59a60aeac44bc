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

LEAST_CHUNK = 32
CHUNK_SLACK = 1.25
"""A chunk may cost so much more per token than the cheapest size: small ones start others sooner,
and more of a prompt's beginning can be kept for the next."""

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
        prefill_seconds: Time that prompts may take from running rows in a turn; at least one chunk
            of one prompt is prefilled.
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
        """Return the rows of each context call of this turn, one call for each kind of size.

        Args:
            rows: All rows, in the order of their slots.
        """
        kinds = {row: self._kind(row) for row in rows if row.pending.size}
        self._count_prompts(kinds)
        allowed = set(self._prompts(rows, kinds))
        ready: dict[int, list[Row]] = {}
        for row, kind in kinds.items():
            if row.stage is Stage.COMMITTING or row in allowed:
                ready.setdefault(kind, []).append(row)
        # a single token is a step of its own, which nobody waits for
        return [some for kind, some in ready.items() if kind == 1 or self._pays(rows, some, kind)]

    def part(self, row: Row) -> ExtendRow:
        """Return the next tokens of a row that go into one call."""
        size = min(row.pending.size, self.chunk)
        is_mock = row.request.mode == "mock_ar"
        if is_mock and row.pending.size > 1:
            # the last token goes alone, so that the states before it can be kept
            size = min(size, row.pending.size - 1)
        is_last = size == row.pending.size
        return ExtendRow(
            row.slot,
            row.pending[:size],
            logits=is_last and row.request.mode == "ar",
            keep_previous=is_last and is_mock,
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
        """Compare a call for prompts with its cost; the last few count."""
        if tokens > self.limits.block_size_max:
            self.measured = self.measured * PACE_KEPT + seconds
            self.modelled = self.modelled * PACE_KEPT + self.costs.extend(rows, tokens)

    @property
    def pace(self) -> float:
        """Measured time of calls for prompts over the time that `costs` gives for them."""
        return self.measured / self.modelled if self.modelled else 1.0

    def _kind(self, row: Row) -> int:
        """Return the size that a row's part is padded to: a token, a block or a chunk."""
        size, block = self.part(row).ids.size, self.limits.block_size_max
        return 1 if size == 1 else block if size <= block else block + 1

    def _prompts(self, rows: Sequence[Row], kinds: dict[Row, int]) -> list[Row]:
        """Return the rows whose prompts go on: the oldest, as many as the turn has time for."""
        prompts = [row for row in kinds if row.stage is Stage.PREFILLING]
        prompts.sort(key=lambda row: row.number)
        if len(prompts) == len(rows):  # nobody waits for them
            return prompts
        count, seconds = 0, 0.0
        sizes: list[int] = []
        for row in prompts:
            sizes.append(self.part(row).ids.size)
            seconds = self.pace * self.costs.extend(len(sizes), max(sizes))
            if count and seconds > self.prefill_seconds:
                break
            count += 1
        return prompts[:count]

    def _count_prompts(self, kinds: dict[Row, int]) -> None:
        """Average how many rows come with another chunk of a prompt in a turn."""
        chunks = (row for row, kind in kinds.items() if kind > self.limits.block_size_max)
        new = sum(not row.waited for row in chunks)
        self.prompts_per_turn += (new - self.prompts_per_turn) / MEMORY

    def _pays(self, rows: Sequence[Row], ready: Sequence[Row], kind: int) -> bool:
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
        count, size = len(ready), max(self.part(row).ids.size for row in ready)
        step = self.costs.denoise(len(denoising), max(row.block.size for row in denoising))
        lost = sum(row.waited for row in ready)
        if max(row.waited for row in ready) >= self.calls_per_block * step / 2:
            return True  # a block must not take half as long again
        is_chunk = kind > self.limits.block_size_max
        coming = self.prompts_per_turn if is_chunk else len(denoising) / self.calls_per_block
        now = lost + len(rows) * between(self.costs.extend, count, size)
        later = lost + count * step + len(rows) * between(self.costs.extend, count + coming, size)
        return now / count <= later / (count + coming)
