"""What an operator sees: a line in the log for each request, and metrics on Triton's endpoint.

The threads that serve only leave notes here. A thread of the journal's own writes the lines and,
once a second, passes the sums on: to change one of Triton's metrics is a round trip between
processes. Names and buckets are in `METRICS`; docs/metrics.md explains each.
"""

from __future__ import annotations

import json
import queue
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from twotower_engines.serving.restarts import PARTS
from twotower_engines.serving.workers import Periodic

PREFIX = "twotower_"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
FLUSH_SECONDS = 1.0

# Outcomes of a request: how its answer ended, or why there is none.
OUTCOMES = (
    "length", "eos", "stop", "calls", "repetition", "cancelled",
    "refused", "busy", "late", "failed",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric as it is declared.

    Attributes:
        kind: Triton's word for its type.
        help: Text that the endpoint shows.
        labels: Values of its label, where it has one.
        label: Name of the label.
        buckets: Upper bounds of a histogram.
    """

    kind: str
    help: str
    labels: tuple[str, ...] = ()
    label: str = ""
    buckets: tuple[float, ...] = ()


METRICS = {
    "num_requests_running": Metric("gauge", "Requests that have a slot."),
    "num_requests_waiting": Metric("gauge", "Requests that wait for a slot."),
    "slot_usage_ratio": Metric("gauge", "Share of the slots that are taken, from 0 to 1."),
    "requests_total": Metric("counter", "Requests that ended, by outcome.", OUTCOMES, "outcome"),
    "prompt_tokens_total": Metric("counter", "Tokens of prompts of requests that ended."),
    "generation_tokens_total": Metric("counter", "Tokens that were sent."),
    "reused_tokens_total": Metric("counter", "Tokens of prompts whose states were kept."),
    "turns_total": Metric("counter", "Turns of the scheduler."),
    "denoiser_calls_total": Metric("counter", "Calls of the denoiser tower."),
    "denoiser_rows_total": Metric("counter", "Rows of these calls: over them, rows per call."),
    "context_calls_total": Metric("counter", "Calls of the context tower."),
    "context_rows_total": Metric("counter", "Rows of these calls."),
    "prefix_bytes": Metric("gauge", "Memory that the states of prompts' beginnings take."),
    "prefix_usage_ratio": Metric("gauge", "Share of the memory for these states, from 0 to 1."),
    "prefix_evictions_total": Metric("counter", "Kept states that made room for others."),
    "time_to_first_block_seconds": Metric(
        "histogram", "Seconds from arrival to the first block.", buckets=SECONDS
    ),
    "time_per_block_seconds": Metric(
        "histogram", "Seconds between two blocks of an answer.", buckets=SECONDS
    ),
    "request_queue_time_seconds": Metric(
        "histogram", "Seconds that a request waited for a slot.", buckets=SECONDS
    ),
    "e2e_request_latency_seconds": Metric(
        "histogram", "Seconds from arrival to the end.", buckets=SECONDS
    ),
    "tokens_per_denoiser_call": Metric(
        "histogram",
        "Tokens that a denoiser call of an answer committed on average.",
        buckets=(1, 1.5, 2, 3, 4, 6, 8, 12, 16),
    ),
    "self_test_passed": Metric("gauge", "1 where the golden answer was given; 0 where none is."),
    "server_restarts_total": Metric("counter", "Times that `serve` started the server again."),
    "part_restarts_total": Metric(
        "counter", "Times that `serve` started a part of the server again.", PARTS, "part"
    ),
}


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of a request, as its line in the log says it.

    Attributes:
        request_id: The server's name of it; empty where it was turned away.
        name: The caller's name of it; may be empty.
        outcome: One of `OUTCOMES`.
        reason: Why it was not answered; else empty.
        prompt_tokens: Tokens of the prompt.
        tokens: Tokens that were sent.
        denoiser_calls: Denoiser calls.
        context_calls: Context calls.
        queue_seconds: Seconds until it had a slot; None where it had none.
        first_block_seconds: Seconds until the first block; None where there was none.
        seconds: Seconds until the end.
    """

    request_id: str
    name: str
    outcome: str
    reason: str = ""
    prompt_tokens: int = 0
    tokens: int = 0
    denoiser_calls: int = 0
    context_calls: int = 0
    queue_seconds: float | None = None
    first_block_seconds: float | None = None
    seconds: float = 0.0


class Sink(Protocol):
    """Where the sums go."""

    def add(self, name: str, label: str, amount: float) -> None:
        """Add to a counter."""

    def set(self, name: str, value: float) -> None:
        """Set a gauge."""

    def observe(self, name: str, value: float) -> None:
        """Add a value to a histogram."""


class TritonSink:
    """Triton's custom metrics.

    Args:
        triton: The module `triton_python_backend_utils`.
    """

    def __init__(self, triton: Any) -> None:
        self._metrics: dict[tuple[str, str], Any] = {}
        self._families = []
        for name, one in METRICS.items():
            kind = getattr(triton.MetricFamily, one.kind.upper())
            family = triton.MetricFamily(name=PREFIX + name, description=one.help, kind=kind)
            self._families.append(family)  # which must live as long as its metrics
            for value in one.labels or ("",):
                labels = {one.label: value} if one.label else {}
                buckets = {"buckets": list(one.buckets)} if one.buckets else {}
                self._metrics[name, value] = family.Metric(labels=labels, **buckets)

    def add(self, name: str, label: str, amount: float) -> None:
        """Add to a counter."""
        self._metrics[name, label].increment(amount)

    def set(self, name: str, value: float) -> None:
        """Set a gauge."""
        self._metrics[name, ""].set(value)

    def observe(self, name: str, value: float) -> None:
        """Add a value to a histogram."""
        self._metrics[name, ""].observe(value)

    def close(self) -> None:
        """Let the metrics go, before their families."""
        self._metrics.clear()
        self._families.clear()


class Journal:
    """Takes notes from any thread, and writes them from its own.

    Args:
        sink: Where the sums go; None for nowhere.
        as_json: Whether the log's lines are JSON.
        gauges: Called once a second for the values of the gauges, by name.
    """

    def __init__(
        self, sink: Sink | None, as_json: bool, gauges: Callable[[], dict[str, float]]
    ) -> None:
        self._sink, self._as_json, self._gauges = sink, as_json, gauges
        self._notes: queue.SimpleQueue[Ended | tuple[str, float, str]] = queue.SimpleQueue()
        self._writing = Periodic("journal", FLUSH_SECONDS, self._flush)

    def ended(self, request: Ended) -> None:
        """Note the end of a request."""
        self._notes.put(request)

    def note(self, metric: str, value: float, label: str = "") -> None:
        """Note an amount of a counter, of one value of its label, or a value of a histogram."""
        self._notes.put((metric, value, label))

    def close(self) -> None:
        """Write what was noted, and end the thread."""
        self._writing.close()

    def _flush(self) -> None:
        sums: Counter[tuple[str, str]] = Counter()
        observed: list[tuple[str, float]] = []
        lines = []
        while not self._notes.empty():
            note = self._notes.get()
            if isinstance(note, Ended):
                lines.append(line_of(note, self._as_json))
                sums["requests_total", note.outcome] += 1
                observed += _observed(note)
            elif METRICS[note[0]].kind == "counter":
                sums[note[0], note[2]] += note[1]  # type: ignore[assignment]
            else:
                observed.append(note[:2])
        if lines:
            print("\n".join(lines), file=sys.stderr, flush=True)
        if self._sink is None:
            return
        for (name, label), amount in sums.items():
            self._sink.add(name, label, amount)
        for name, value in observed:
            self._sink.observe(name, value)
        for name, value in self._gauges().items():
            self._sink.set(name, value)


def _observed(ended: Ended) -> Sequence[tuple[str, float]]:
    """Return the values of histograms that the end of a request brings."""
    values: dict[str, float | None] = {
        "request_queue_time_seconds": ended.queue_seconds,
        "time_to_first_block_seconds": ended.first_block_seconds,
        "e2e_request_latency_seconds": ended.seconds if ended.request_id else None,
        "tokens_per_denoiser_call": (
            ended.tokens / ended.denoiser_calls if ended.denoiser_calls else None
        ),
    }
    return [(name, value) for name, value in values.items() if value is not None]


def line_of(ended: Ended, as_json: bool) -> str:
    """Return the log's line for the end of a request."""
    values = {
        name: round(value, 6) if isinstance(value, float) else value
        for name, value in asdict(ended).items()
        if value not in (None, "")
    }
    if as_json:
        return json.dumps({"event": "request", **values})
    # A caller's own words stay on the line, and name no field.
    return "twotower: request " + " ".join(
        f"{name}={json.dumps(value) if isinstance(value, str) and not value.isalnum() else value}"
        for name, value in values.items()
    )
