"""Spans of a request; `test_metrics` sends them from a real server."""

from __future__ import annotations

import json
import time

from tests.support.collector import collector
from twotower_engines.generation.request import BlockEvent
from twotower_engines.serving.spans import SpanSender, Trace

CONTEXT = json.dumps({"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"})


class Kept(SpanSender):
    """A sender that keeps what it is given."""

    def __init__(self) -> None:
        self.spans: list[dict] = []

    def put(self, spans: list[dict]) -> None:
        self.spans += spans


def test_a_request_that_was_cancelled_in_the_queue_only_waited() -> None:
    kept = Kept()
    trace = Trace(kept, CONTEXT)
    trace.saw(BlockEvent("x", (), (), 0, 0))  # a notice of its place
    trace.saw(BlockEvent("x", (), (), 0, 0, "cancelled"))
    answer, waited = kept.spans
    assert (answer["name"], answer["parentSpanId"]) == ("answer", "b" * 16)
    assert (waited["name"], waited["parentSpanId"]) == ("queue", answer["spanId"])
    assert waited["startTimeUnixNano"] == answer["startTimeUnixNano"]
    assert {"key": "outcome", "value": {"stringValue": "cancelled"}} in answer["attributes"]


def test_a_request_that_failed_between_blocks_says_so() -> None:
    kept = Kept()
    trace = Trace(kept, CONTEXT)
    now = time.perf_counter()
    event = BlockEvent("x", (5, 6), (2, 1), 2, 1, admitted_at=now, prefilled_at=now)
    trace.saw(event)
    trace.failed("late", "not finished within 1 s")
    answer = kept.spans[0]
    assert answer["status"] == {"code": 2, "message": "not finished within 1 s"}
    assert [span["name"] for span in kept.spans[1:]] == ["queue", "prefill", "block"]
    assert {"key": "denoiser_calls", "value": {"intValue": "2"}} in kept.spans[3]["attributes"]
    assert abs(int(answer["endTimeUnixNano"]) - time.time_ns()) < 60e9


def test_a_collector_gets_batches_and_one_that_is_gone_is_named_once(capsys) -> None:
    names = [str(number) for number in range(600)]

    def send() -> None:
        sender = SpanSender(url)
        sender.put([{"name": name} for name in names])
        sender.close()

    with collector() as (url, arrived):
        send()
        spans = [
            arrived.get(timeout=20)["resourceSpans"][0]["scopeSpans"][0]["spans"] for _ in "ab"
        ]
    assert [one["name"] for batch in spans for one in batch] == names
    send()
    assert capsys.readouterr().err.count("spans are not taken by") == 1
