"""The number of denoiser calls that a block takes, as measured on the released model.

The measurements (`data/acceptance.json`, made by `benchmarks/acceptance_statistics.py`) are runs
and traces of NVIDIA's code on the real checkpoint by junze-eng/twotower-repro. In the traces a call
commits one token two times out of three, and else a burst: anything between two tokens and all of
them. So the model has one parameter, the burst rate q:

    with probability q commit k ~ uniform(2 .. n) of the n masked tokens, else commit 1,
    but never fewer than ceil(n / steps left)                (NVIDIA's minimum)

q is fitted to the tokens per call of each task and threshold at 16 steps, and interpolated in logit
between thresholds. It was checked where it was not fitted: 8 steps come out within 12%, the spread
of calls per block in the traces within 10%. (At 4 steps it is up to 37% too slow: so few steps
force commits that the model does not feed on.) At a threshold that a task was not measured at, its
rate moves as that of the task `open` does, which was measured at five.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from twotower_contract.json_file import read_json
from twotower_engines.errors import PlanError

DATA_FILE = Path(__file__).with_name("data") / "acceptance.json"
BASE_TASK = "open"
BLOCK = 16
STEPS = 16


@dataclass(frozen=True, slots=True)
class Measurement:
    """Runs of one task at one setting, block size 16.

    Attributes:
        runs: Number of runs.
        tokens: Tokens generated in all runs.
        calls: Denoiser calls of all runs.
        seconds: Time of the reference code on two A100 80 GB, bf16, batch 1.
        burst_rate: Fitted burst rate; None for other than 16 steps.
    """

    task: str
    threshold: float
    steps: int
    runs: int
    tokens: int
    calls: int
    seconds: float
    burst_rate: float | None

    @property
    def tokens_per_call(self) -> float:
        """Tokens per denoiser call, over all runs."""
        return self.tokens / self.calls


@dataclass(frozen=True, slots=True)
class Reference:
    """Times of NVIDIA's code on two A100 80 GB, bf16, batch 1, in seconds.

    A fit of seconds = calls x denoiser_call + blocks x context_extension over all runs.
    """

    denoiser_call: float
    context_extension: float
    ar_token: float


@dataclass(frozen=True, slots=True)
class Calls:
    """Distribution of the number of denoiser calls of a block.

    Attributes:
        probabilities: Probabilities of 1, 2, .. calls.
    """

    block: int
    probabilities: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Calls per block."""
        return sum(count * p for count, p in enumerate(self.probabilities, 1))

    @property
    def deviation(self) -> float:
        """Standard deviation of the calls per block."""
        square = sum(count * count * p for count, p in enumerate(self.probabilities, 1))
        return math.sqrt(max(0.0, square - self.mean**2))

    @property
    def tokens_per_call(self) -> float:
        """Tokens per denoiser call."""
        return self.block / self.mean

    def quantile(self, share: float) -> int:
        """Return the number of calls that this share of blocks does not exceed."""
        total = 0.0
        for count, p in enumerate(self.probabilities, 1):
            total += p
            if total >= share - 1e-12:
                return count
        return len(self.probabilities)


@dataclass(frozen=True, slots=True)
class Acceptance:
    """The measurements and the model fitted to them."""

    source: str
    measurements: tuple[Measurement, ...]
    reference: Reference

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks with a fitted rate, slowest first."""
        rates = {one.task: one.burst_rate for one in self.measurements if one.burst_rate}
        return tuple(sorted(rates, key=lambda task: self.burst_rate(task, 0.8)))

    def burst_rate(self, task: str, threshold: float) -> float:
        """Return the burst rate of a task at a threshold.

        Raises:
            PlanError: The task was not measured, or the threshold is outside of the measured range.
        """
        base = self._curve(BASE_TASK)
        low, high = base[0][0], base[-1][0]
        if not low <= threshold <= high:
            raise PlanError(
                f"the threshold is {threshold:g}; acceptance was measured from {low:g} to {high:g}"
            )
        curve = self._curve(task)
        if not curve:
            measured = sorted({one.task for one in self.measurements})
            raise PlanError(f"acceptance of {task!r} was not measured, only of {measured}")
        inside = min(max(threshold, curve[0][0]), curve[-1][0])
        moved = _interpolate(base, threshold) - _interpolate(base, inside)
        return 1.0 / (1.0 + math.exp(-_interpolate(curve, inside) - moved))

    def calls(self, task: str, threshold: float, steps: int = STEPS) -> Calls:
        """Return how many calls a block of 16 takes.

        Raises:
            PlanError: The same errors as `burst_rate`.
        """
        return calls_per_block(BLOCK, steps, self.burst_rate(task, threshold))

    def _curve(self, task: str) -> list[tuple[float, float]]:
        """Return (threshold, logit of the rate) of a task, by threshold."""
        return sorted(
            (one.threshold, math.log(one.burst_rate / (1.0 - one.burst_rate)))
            for one in self.measurements
            if one.task == task and one.burst_rate is not None
        )


def calls_per_block(block: int, steps: int, burst_rate: float) -> Calls:
    """Return the distribution of calls per block, by the chain over (masked tokens, call).

    Args:
        burst_rate: Probability that a call commits a burst.
    """
    masked = {block: 1.0}
    ends = []
    for step in range(steps):
        left = steps - step
        following: dict[int, float] = {}
        end = 0.0
        for count, weight in masked.items():
            for size, p in _commits(count, burst_rate):
                rest = 0 if left == 1 else count - max(size, math.ceil(count / left))
                if rest:
                    following[rest] = following.get(rest, 0.0) + weight * p
                else:
                    end += weight * p
        ends.append(end)
        masked = following
    return Calls(block, tuple(ends))


@functools.cache
def load_acceptance() -> Acceptance:
    """Return the shipped measurements."""
    document = read_json(DATA_FILE, PlanError)
    document.check_format("twotower-acceptance", 1)
    reference = document.section("reference")
    return Acceptance(
        source=document.text("source"),
        measurements=tuple(
            one.record(Measurement, burst_rate=one.values["burst_rate"] or None)
            for one in document.items("measurements")
        ),
        reference=Reference(
            denoiser_call=reference.number("denoiser_call_seconds"),
            context_extension=reference.number("context_extension_seconds"),
            ar_token=reference.number("ar_token_seconds"),
        ),
    )


def _commits(masked: int, burst_rate: float) -> list[tuple[int, float]]:
    """Return (tokens, probability) of what one call commits of so many masked ones."""
    if masked == 1:
        return [(1, 1.0)]
    share = burst_rate / (masked - 1)
    return [(1, 1.0 - burst_rate), *((size, share) for size in range(2, masked + 1))]


def _interpolate(points: Sequence[tuple[float, float]], x: float) -> float:
    """Interpolate linearly; x lies within the points."""
    for (left, low), (right, high) in itertools.pairwise(points):
        if left <= x <= right:
            return low + (high - low) * (x - left) / (right - left)
    return points[0][1]
