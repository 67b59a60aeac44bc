"""Counters of the front end in Prometheus's text format."""

from __future__ import annotations

import bisect
from collections import Counter
from dataclasses import dataclass, field

BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0, 300.0)
PREFIX = "twotower_openai"


@dataclass(slots=True)
class Histogram:
    """Durations in seconds."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS) + 1))
    total: float = 0.0

    def add(self, seconds: float) -> None:
        """Count a duration."""
        self.counts[bisect.bisect_left(BUCKETS, seconds)] += 1
        self.total += seconds

    def lines(self, name: str) -> list[str]:
        """Return the samples."""
        lines, below = [], 0
        for bound, count in zip((*map(str, BUCKETS), "+Inf"), self.counts, strict=True):
            below += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {below}')
        return [*lines, f"{name}_sum {self.total:.6f}", f"{name}_count {below}"]


@dataclass(slots=True)
class Metrics:
    """The counters of the front end.

    Attributes:
        requests: Requests that ended, by path and HTTP status; 499 where the caller left.
        running: Requests under way.
        prompt_tokens: Tokens of prompts.
        generation_tokens: Tokens of answers.
        denoiser_calls: Denoiser calls of complete answers.
        first: Seconds to the first block.
        whole: Seconds to the end.
    """

    requests: Counter[tuple[str, int]] = field(default_factory=Counter)
    running: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    denoiser_calls: int = 0
    first: Histogram = field(default_factory=Histogram)
    whole: Histogram = field(default_factory=Histogram)

    def text(self) -> str:
        """Return all of it."""
        name = f"{PREFIX}_requests_total"
        lines = [
            f"# HELP {name} Requests that ended, by path and status.",
            f"# TYPE {name} counter",
        ]
        lines += [
            f'{name}{{path="{path}",status="{status}"}} {count}'
            for (path, status), count in sorted(self.requests.items())
        ]
        for short, kind, value, words in (
            ("requests_running", "gauge", self.running, "Requests under way."),
            ("prompt_tokens_total", "counter", self.prompt_tokens, "Tokens of prompts."),
            ("generation_tokens_total", "counter", self.generation_tokens, "Tokens of answers."),
            ("denoiser_calls_total", "counter", self.denoiser_calls, "Denoiser calls."),
        ):
            name = f"{PREFIX}_{short}"
            lines += [f"# HELP {name} {words}", f"# TYPE {name} {kind}", f"{name} {value}"]
        for short, histogram, words in (
            ("time_to_first_block_seconds", self.first, "Seconds to the first block."),
            ("e2e_request_latency_seconds", self.whole, "Seconds of a whole request."),
        ):
            name = f"{PREFIX}_{short}"
            lines += [f"# HELP {name} {words}", f"# TYPE {name} histogram", *histogram.lines(name)]
        return "\n".join(lines) + "\n"
