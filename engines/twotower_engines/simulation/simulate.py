"""Runs the real scheduler on simulated engines, and measures on their clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from twotower_engines.errors import GenerationError
from twotower_engines.generation.counters import Counters
from twotower_engines.generation.scheduler import Scheduler
from twotower_engines.simulation.engines import SimulatedRuntime
from twotower_engines.simulation.workload import Arrival

PERCENTILES = (50, 95, 99)


@dataclass(slots=True)
class _Times:
    """When a request came, whose it was, and when it got each of its blocks."""

    came: float
    caller: str
    blocks: list[float] = field(default_factory=list)
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a simulation; times in seconds.

    Attributes:
        seconds: From the start to the end of the last request.
        requests: Requests that were answered.
        refused: Requests that were turned away.
        tokens: Tokens of the answers.
        first_block: Percentile to the time from a request's coming to its first block.
        first_block_of: The same for each priority and tenant that there is.
        block_gap: The same of the time between two blocks of a request.
        whole: The same of the time to the last block.
        row_share: Cause to the share of all slots' time: what rows did, what they waited for, and
            slots without a request.
        busy_share: Kind of call to its share of the time.
        counters: The scheduler's counts.
    """

    seconds: float
    requests: int
    refused: int
    tokens: int
    first_block: dict[int, float]
    first_block_of: dict[str, dict[int, float]]
    block_gap: dict[int, float]
    whole: dict[int, float]
    row_share: dict[str, float]
    busy_share: dict[str, float]
    counters: Counters

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of all requests."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def rows_per_denoiser_call(self) -> float:
        """Rows of a denoiser call, on average."""
        return self.counters.denoiser_rows / max(1, self.counters.denoiser_calls)

    @property
    def tokens_per_denoiser_row(self) -> float:
        """Tokens per row of a denoiser call."""
        return self.tokens / max(1, self.counters.denoiser_rows)

    def as_json(self) -> dict[str, Any]:
        """Return all numbers, for programs."""
        return {
            **asdict(self),
            "tokens_per_second": self.tokens_per_second,
            "rows_per_denoiser_call": self.rows_per_denoiser_call,
            "tokens_per_denoiser_row": self.tokens_per_denoiser_row,
        }


def simulate(
    runtime: SimulatedRuntime,
    scheduler: Scheduler,
    arrivals: Sequence[Arrival],
    progress: Callable[[int, int], None] | None = None,
) -> Outcome:
    """Answer all requests.

    Args:
        runtime: The scheduler's runtime.
        scheduler: A scheduler that has done nothing yet, on the runtime's clock.
        arrivals: Requests with a time in the order of their times; the others come when one ends.
        progress: Receives how many requests ended, and of how many.

    Raises:
        GenerationError: A request failed.
    """
    coming = deque(one for one in arrivals if one.at is not None)
    following = deque(one for one in arrivals if one.at is None)
    times: dict[str, _Times] = {}
    clock, ended, refused = runtime.clock, 0, 0
    runtime.active = lambda: scheduler.active

    def submit(one: Arrival, came: float) -> None:
        times[one.request.request_id] = _Times(
            came, f"{one.request.priority} {one.request.tenant}".rstrip()
        )
        scheduler.submit(one.request)

    while coming or not scheduler.idle:
        while coming and (coming[0].at or 0.0) <= clock.now:
            one = coming.popleft()
            submit(one, one.at or 0.0)
        if scheduler.idle:
            runtime.wait_until(coming[0].at or 0.0)
            continue
        for event in scheduler.turn():
            if event.error is not None and event.retry_after is None:
                raise GenerationError(f"request {event.request_id}: {event.error}")
            told = times[event.request_id]
            refused += event.error is not None
            if event.ids:
                told.blocks.append(clock.now)
                told.tokens += len(event.ids)
            if event.is_last:
                ended += 1
                if following:
                    submit(following.popleft(), clock.now)
                if progress is not None:
                    progress(ended, len(arrivals))
    return _outcome(runtime, scheduler, times, refused)


def _outcome(
    runtime: SimulatedRuntime, scheduler: Scheduler, times: dict[str, _Times], refused: int
) -> Outcome:
    answered = [one for one in times.values() if one.blocks]
    gaps = [gap for one in answered for gap in np.diff(one.blocks)]
    seconds = runtime.clock.now
    total = seconds * runtime.limits.slots or 1.0
    shares = {
        "denoising": runtime.row_seconds["denoise"] + runtime.row_seconds["predict"],
        "being committed": runtime.row_seconds["commit"],
        "reading its prompt": runtime.row_seconds["prefill"],
        "waiting for others' steps": runtime.stalled["denoise"] + runtime.stalled["predict"],
        "waiting for others' commits": runtime.stalled["commit"],
        "waiting for others' prompts": runtime.stalled["prefill"],
        "without a request": runtime.empty,
    }
    return Outcome(
        seconds,
        len(answered),
        refused,
        sum(one.tokens for one in answered),
        _first_blocks(answered),
        {who: _first_blocks(answered, who) for who in sorted({one.caller for one in answered})},
        _percentiles(gaps),
        _percentiles([one.blocks[-1] - one.came for one in answered]),
        {name: share / total for name, share in shares.items()},
        {name: busy / (seconds or 1.0) for name, busy in sorted(runtime.busy.items())},
        scheduler.counters,
    )


def _first_blocks(answered: Sequence[_Times], caller: str | None = None) -> dict[int, float]:
    """Return the percentiles of the time to the first block, of one caller or of all."""
    chosen = [one for one in answered if caller in (None, one.caller)]
    return _percentiles([one.blocks[0] - one.came for one in chosen])


def _percentiles(values: Sequence[float]) -> dict[int, float]:
    return {one: float(np.percentile(values, one)) if values else 0.0 for one in PERCENTILES}
