"""The spans of a request for a collector of OpenTelemetry, below those that Triton sends.

```
twotower > compute (Triton's) > answer > queue, prefill, block, block, ...
```
They go out as OTLP over HTTP in its JSON form, which every collector takes, once a second from a
thread of its own. What a collector does not take in time is dropped: traces cost the callers
nothing.
"""

from __future__ import annotations

import json
import queue
import secrets
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from twotower_engines.generation.request import BlockEvent
from twotower_engines.serving.workers import Periodic

FLUSH_SECONDS = 1.0
SEND_SECONDS = 5.0
MOST_SPANS = 16384  # that wait; those of 60 long answers
BATCH_SPANS = 512
INTERNAL, ERROR = 1, 2  # OTLP's numbers of a span's kind and of a status
TYPES = {int: "intValue", str: "stringValue"}


@dataclass(slots=True)
class Trace:
    """The spans of one request; they are sent when it ends.

    Args:
        sender: Sends them.
        context: Triton's context of the request: a JSON object with `traceparent`.
    """

    sender: SpanSender
    context: str
    _began: float = field(default_factory=time.perf_counter)
    _blocks: list[tuple[float, BlockEvent]] = field(default_factory=list)

    def saw(self, event: BlockEvent) -> None:
        """Note a block, or the end."""
        if event.ids or event.is_last:
            self._blocks.append((time.perf_counter(), event))
        if event.is_last:
            self._end(str(event.finish_reason))

    def failed(self, outcome: str, message: str) -> None:
        """Note an end without an answer."""
        self._end(outcome, message)

    def _end(self, outcome: str, message: str = "") -> None:
        end = time.perf_counter()
        _, trace_id, parent, *_ = json.loads(self.context)["traceparent"].split("-")
        write = _Writer(trace_id, time.time_ns() - time.perf_counter_ns())
        tokens = sum(len(event.ids) for _, event in self._blocks)
        answer = write.span(parent, "answer", self._began, end, outcome=outcome, tokens=tokens)
        if message:
            answer["status"] = {"code": ERROR, "message": message}
        below = partial(write.span, answer["spanId"])
        spans = [answer]
        if self._blocks:
            first = self._blocks[0][1]
            spans.append(below("queue", self._began, first.admitted_at or end))
            since = first.prefilled_at
            if since:
                reused = first.reused_tokens
                spans.append(below("prefill", first.admitted_at, since, reused_tokens=reused))
            for until, event in self._blocks:
                count, calls = len(event.ids), len(event.masked_counts)
                if count:
                    spans.append(below("block", since, until, tokens=count, denoiser_calls=calls))
                since = until
        self.sender.put(spans)


@dataclass(frozen=True, slots=True)
class _Writer:
    """Writes the spans of a trace in OTLP's JSON form.

    Attributes:
        trace_id: 32 hexadecimal digits.
        offset: Nanoseconds from the zero of `time.perf_counter` to that of the calendar.
    """

    trace_id: str
    offset: int

    def span(
        self, parent: str, name: str, start: float, end: float, **attributes: int | str
    ) -> dict[str, Any]:
        """Return a span.

        Args:
            parent: Id of the span above it.
            name: The event.
            start: Seconds of `time.perf_counter`.
            end: The same.
            **attributes: Its attributes.
        """
        return {
            "traceId": self.trace_id,
            "spanId": secrets.token_hex(8),
            "parentSpanId": parent,
            "name": name,
            "kind": INTERNAL,
            "startTimeUnixNano": str(self.offset + round(start * 1e9)),
            "endTimeUnixNano": str(self.offset + round(end * 1e9)),
            "attributes": [
                {"key": key, "value": {TYPES[type(value)]: str(value)}}
                for key, value in attributes.items()
            ],
        }


class SpanSender:
    """Sends spans to a collector, from a thread of its own.

    Args:
        url: Where it takes OTLP over HTTP.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._waiting: queue.Queue[dict[str, Any]] = queue.Queue(MOST_SPANS)
        self._is_heard = True
        self._sending = Periodic("spans", FLUSH_SECONDS, self._flush)

    def put(self, spans: list[dict[str, Any]]) -> None:
        """Queue spans; those for which there is no room are dropped."""
        try:
            for span in spans:
                self._waiting.put_nowait(span)
        except queue.Full:
            pass

    def close(self) -> None:
        """Send what waits, and end the thread."""
        self._sending.close()

    def _flush(self) -> None:
        while (batch := self._batch()) and self._send(batch):
            pass

    def _batch(self) -> list[dict[str, Any]]:
        count = min(self._waiting.qsize(), BATCH_SPANS)
        return [self._waiting.get() for _ in range(count)]

    def _send(self, spans: list[dict[str, Any]]) -> bool:
        service = {"key": "service.name", "value": {"stringValue": "twotower"}}
        scope = {"scope": {"name": "twotower"}, "spans": spans}
        message = {
            "resourceSpans": [{"resource": {"attributes": [service]}, "scopeSpans": [scope]}]
        }
        request = urllib.request.Request(
            self._url, json.dumps(message).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=SEND_SECONDS):
                self._is_heard = True
        except OSError as problem:
            if self._is_heard:  # else the log would fill
                print(f"twotower: spans are not taken by {self._url}: {problem}", file=sys.stderr)
            self._is_heard = False
        return self._is_heard
