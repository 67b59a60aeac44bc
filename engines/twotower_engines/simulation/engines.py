"""A runtime that computes nothing: its calls take the planner's time, on a clock that it moves.

A rule says what a denoise step commits. Everything else that decides which calls are made is the
real scheduler.
"""

from __future__ import annotations

import functools
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from twotower_contract.engine_set import Limits
from twotower_contract.sizes import conv_bytes, kv_bytes_per_token, ssm_bytes
from twotower_engines.generation.costs import Costs, RooflineCosts
from twotower_engines.planning.acceptance import load_acceptance
from twotower_engines.planning.plan import MemoryPlan
from twotower_engines.planning.roofline import machine_of
from twotower_engines.runtime.interface import Denoised, DenoiseRow, ExtendRow, PredictRow

MASK, TOKEN = 0, 1
VOCABULARY = 1 << 16

Commits = Callable[[DenoiseRow, int], int]
"""How many of the masked positions a denoise step commits, at least one."""

Call = tuple[str, int, int]
"""A call: `denoise`, `predict`, `commit` or `prefill`; its rows; tokens of its longest row."""


def burst_commits(task: str) -> Commits:
    """Return the planner's rule for a task: one token, or at some rate a burst (`acceptance`)."""
    rate = functools.cache(functools.partial(load_acceptance().burst_rate, task))

    def commits(row: DenoiseRow, masked: int) -> int:
        draw = random.Random(row.seed)
        is_burst = draw.random() < rate(row.threshold)
        count = draw.randint(2, masked) if is_burst and masked > 1 else 1
        return masked if row.steps_left <= 1 else max(count, -(-masked // row.steps_left))

    return commits


@dataclass(slots=True)
class Clock:
    """A clock that stands still but for calls.

    Attributes:
        now: Seconds since the start.
    """

    now: float = 0.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now


@dataclass(slots=True)
class SimulatedStore:
    """Room for prefixes that holds nothing."""

    places: int
    place_bytes: int

    def save(self, place: int, slot: int, tokens: int) -> None:
        """Do nothing."""

    def restore(self, slot: int, places: Sequence[int]) -> None:
        """Do nothing."""


@dataclass(slots=True)
class SimulatedRuntime:
    """A runtime that only costs time; see `runtime.interface.Runtime` for its methods.

    Attributes:
        limits: Limits of the engines.
        costs: Seconds of the calls.
        commits: What a denoise step commits.
        clock: Moved by each call.
        place_bytes: Memory of a kept prefix of so many tokens.
        active: Tells how many rows there are.
        calls: Every call so far, in order, where `records`.
        busy: Seconds of each kind of call.
        row_seconds: Seconds of each kind of call, times the rows that took part.
        stalled: The same, times the rows that had to wait for it.
        empty: Seconds times slots without a request.
        reading: Slots whose prompt is not read yet.
    """

    limits: Limits
    costs: Costs
    commits: Commits
    clock: Clock = field(default_factory=Clock)
    place_bytes: Callable[[int], int] = lambda tokens: 1
    active: Callable[[], int] = lambda: 0
    records: bool = False
    calls: list[Call] = field(default_factory=list)
    busy: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    row_seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    stalled: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    empty: float = 0.0
    reading: set[int] = field(default_factory=set)
    vocab_size: int = VOCABULARY
    mask_token_id: int = MASK
    eos_token_ids: tuple[int, ...] = ()
    has_denoiser: bool = True

    def reset(self, slot: int) -> None:
        """Begin a request, whose prompt comes next."""
        self.reading.add(slot)

    def extend(self, rows: Sequence[ExtendRow]) -> list[npt.NDArray[np.float32] | None]:
        """Take the time of a context call."""
        tokens = max(row.ids.size for row in rows)
        kind = "commit" if self.reading.isdisjoint(row.slot for row in rows) else "prefill"
        self._spend(kind, len(rows), tokens, self.costs.extend(len(rows), tokens))
        self.reading.difference_update(row.slot for row in rows if row.logits)
        logits = np.zeros(VOCABULARY, np.float32)
        logits[TOKEN] = 1
        return [logits if row.logits else None for row in rows]

    def denoise(self, rows: Sequence[DenoiseRow]) -> list[Denoised]:
        """Take the time of a denoiser call, and commit what the rule says."""
        tokens = max(row.ids.size for row in rows)
        self._spend("denoise", len(rows), tokens, self.costs.denoise(len(rows), tokens))
        self.reading.difference_update(row.slot for row in rows)
        return [self._refined(row) for row in rows]

    def predict(self, rows: Sequence[PredictRow]) -> npt.NDArray[np.float32]:
        """Take the time of a denoiser call of single tokens."""
        self._spend("predict", len(rows), 1, self.costs.denoise(len(rows), 1))
        self.reading.difference_update(row.slot for row in rows)
        logits = np.zeros((len(rows), VOCABULARY), np.float32)
        logits[:, TOKEN] = 1
        return logits

    def state_store(self, size: int, tokens: int) -> SimulatedStore:
        """Return room for as many prefixes as there would be."""
        place_bytes = self.place_bytes(tokens)
        return SimulatedStore(size // place_bytes, place_bytes)

    def close(self) -> None:
        """Do nothing."""

    def wait_until(self, time: float) -> None:
        """Let the time pass in which there is nothing to do."""
        self.empty += (time - self.clock.now) * self.limits.slots
        self.busy["idle"] += time - self.clock.now
        self.clock.now = time

    def _refined(self, row: DenoiseRow) -> Denoised:
        masked = np.flatnonzero(row.ids == MASK)
        count = self.commits(row, masked.size)
        ids = row.ids.copy()
        ids[masked[:count]] = TOKEN
        return Denoised(ids, masked.size - count, np.ones(row.ids.size, np.float32))

    def _spend(self, kind: str, rows: int, tokens: int, seconds: float) -> None:
        if self.records:
            self.calls.append((kind, rows, tokens))
        self.clock.now += seconds
        active = self.active()
        self.busy[kind] += seconds
        self.row_seconds[kind] += rows * seconds
        self.stalled[kind] += (active - rows) * seconds
        self.empty += (self.limits.slots - active) * seconds


def runtime_of_plan(plan: MemoryPlan, task: str) -> SimulatedRuntime:
    """Return engines of a plan that only take time, and the steps of a task's blocks."""
    config, machine = plan.model.config, machine_of(plan)
    limits = Limits(plan.slots, plan.context, plan.max_tokens_per_call, plan.block_size_max)

    def place_bytes(tokens: int) -> int:
        states = ssm_bytes(config) + conv_bytes(config, machine.item)
        return states + tokens * kv_bytes_per_token(config, machine.item)

    costs = RooflineCosts(plan.model, machine, limits, len(plan.gpus) == 2)
    return SimulatedRuntime(limits, costs, burst_commits(task), place_bytes=place_bytes)
