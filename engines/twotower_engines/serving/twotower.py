"""The model `twotower`: text or ids in, one response with text and ids per committed block out.

Both doors lead here. A caller who comes directly gives `text_input` or `input_ids`, gets real
errors, and is noticed when it leaves. The ensemble's step gives `request`, which `preprocessing`
made, and hears of failures in the output `error`: an ensemble that is given an error right after a
response loses that response, and counts the request as under way for ever (server 2.51).

Decoupled: `execute` hands each request to a thread that reads it, and returns. From there it goes
to the engine's thread, whose parts a third thread sends. After the final response a sender is let
go at once: one that is kept would block unloading.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from twotower_contract.engine_set import EngineSet
from twotower_contract.options import FREE
from twotower_contract.statuses import Failure, text_of
from twotower_engines.artifacts.tokenizer import (
    Tokenizer,
    added_text,
    canvas_texts,
    token_texts,
)
from twotower_engines.generation.costs import costs_of_engines
from twotower_engines.generation.request import BlockEvent, token_outputs
from twotower_engines.generation.scheduler import Scheduler
from twotower_engines.runtime.opening import open_runtime
from twotower_engines.runtime.progress import ByteMeter
from twotower_engines.serving import restarts
from twotower_engines.serving.journal import Journal, TritonSink
from twotower_engines.serving.launch import LOG_JSON, TRACES
from twotower_engines.serving.lifeline import DRAIN, LIFELINE, on_cut
from twotower_engines.serving.loop import EngineLoop, Part
from twotower_engines.serving.preprocessing import Preprocessor, content_of
from twotower_engines.serving.reading import Reader
from twotower_engines.serving.settings import Settings
from twotower_engines.serving.spans import SpanSender, Trace
from twotower_engines.serving.workers import Worker
from twotower_engines.verify.self_test import run_self_test

SECONDS_TO_DELIVER = 0.5  # for the last errors to leave a process that is about to end
# Seconds between two chances of another thread to run. A block that is sent takes a few times as
# long, which would pass between two calls of the engine (Python's own choice is 5 ms).
SWITCH_SECONDS = 0.0002
# Triton has no code for a time that is over.
CODES: dict[Failure, str] = {
    "refused": "INVALID_ARG",
    "busy": "UNAVAILABLE",
    "late": "CANCELLED",
    "failed": "INTERNAL",
}
# The scheduler's counters that are metrics.
COUNTED = (
    "reused_tokens", "denoiser_calls", "denoiser_rows", "context_calls", "context_rows",
)  # fmt: skip
NOTHING = Part(BlockEvent("", (), (), 0, 0))


class TritonReply:
    """Sends the parts of one answer through Triton's response sender.

    Args:
        triton: The module `triton_python_backend_utils`.
        sender: The request's response sender.
        sending: The thread that sends.
        tokenizer: Ids to text; None where the engines have none.
        wanted: Outputs that the caller asks for; all where it is empty.
        in_ensemble: Whether the caller is a step of the ensemble.
        mask_id: The mask token.
        trace: Takes note of what is sent; None for nobody.
    """

    def __init__(
        self,
        triton: Any,
        sender: Any,
        sending: Worker,
        tokenizer: Tokenizer | None,
        wanted: frozenset[str] = frozenset(),
        in_ensemble: bool = False,
        mask_id: int = FREE,
        trace: Trace | None = None,
    ) -> None:
        self._trace = trace
        self._triton = triton
        self._sender = sender
        self._sending = sending
        self._tokenizer = tokenizer
        self._mask_id = mask_id
        self._wanted = wanted
        self._in_ensemble = in_ensemble
        self._is_lost = False
        # Whoever asks of a request that has had its final response, asks of freed memory: that
        # ends the server (2.51) now and then.
        self._guard = threading.Lock()

    def send(self, part: Part) -> None:
        """Send a part."""
        if self._trace is not None and part.state is None:
            self._trace.saw(part.event)
        self._sending.put(partial(self._deliver, part))

    def fail(self, message: str, failure: Failure) -> None:
        """Send what went wrong, which ends the answer."""
        if self._trace is not None:
            self._trace.failed(failure, message)
        self._sending.put(partial(self._deliver, NOTHING, message, failure))

    def is_cancelled(self) -> bool:
        """Whether the caller is gone. Servers up to 2.51 never tell a step of an ensemble."""
        with self._guard:
            sender = self._sender
            return self._is_lost or (sender is not None and bool(sender.is_cancelled()))

    def _deliver(self, part: Part, message: str = "", failure: Failure | None = None) -> None:
        """Send a response. A caller that cannot be reached is taken for one that left."""
        is_last = failure is not None or part.event.is_last
        flags = self._triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL if is_last else 0
        with self._guard:
            sender = self._sender
            if sender is None:
                return
            if is_last:
                self._sender = None
            try:
                sender.send(self._response(part, message, failure), flags=flags)
            except Exception:
                self._is_lost = True
                traceback.print_exc(file=sys.stderr)

    def _response(self, part: Part, message: str, failure: Failure | None) -> Any:
        triton = self._triton
        if failure is not None and not self._in_ensemble:
            code = getattr(triton.TritonError, CODES[failure])
            error = triton.TritonError(text_of(failure, message), code)
            return triton.InferenceResponse(error=error)
        outputs = (
            whole_outputs(part, message, failure)
            if self._in_ensemble
            else outputs_of(part, self._tokenizer, self._mask_id)
        )
        names = self._wanted & outputs.keys() if self._wanted else outputs
        return triton.InferenceResponse([triton.Tensor(name, outputs[name]) for name in names])


def outputs_of(
    part: Part, tokenizer: Tokenizer | None, mask_id: int
) -> dict[str, npt.NDArray[Any]]:
    """Return the outputs of one response to a direct caller; each tensor takes time to send.

    Left out are those that have nothing to say.
    """
    event, text = part.event, ""
    if part.state is not None:
        text = json.dumps(asdict(part.state))
    elif event.text is not None:
        text = event.text
    elif tokenizer is not None and event.ids:
        text = added_text(tokenizer, part.previous_ids, event.ids, event.is_last)
    told = token_outputs(event.details)
    integers = {
        "output_ids": event.ids,
        "prompt_ids": part.prompt_ids,
        "masked_counts": event.masked_counts,
        "denoiser_calls": (event.denoiser_calls,),
        "context_calls": (event.context_calls,),
        "queue_place": (part.queue_place,) if part.queue_place else (),
        "commit_steps": told["commit_steps"],
        "top_ids": told["top_ids"],
        "canvas_ids": [FREE if token == mask_id else token for token in event.canvas],
        "reused_tokens": (event.reused_tokens,) if part.prompt_ids and event.reused_tokens else (),
    }
    numbers = {
        "logprobs": told["logprobs"],
        "top_logprobs": told["top_logprobs"],
        "canvas_confidence": event.canvas_confidence,
    }
    is_first = bool(part.prompt_ids or part.queue_place)
    texts = {
        "finish_reason": event.finish_reason or "",
        "request_id": event.request_id if is_first else "",
    }
    return {
        "text_output": _text(text),
        **{name: np.array(values, np.int32) for name, values in integers.items() if values},
        **{name: np.array(values, np.float32) for name, values in numbers.items() if values},
        **_token_texts(part, tokenizer, mask_id),
        **{name: _text(value) for name, value in texts.items() if value},
    }


def _token_texts(
    part: Part, tokenizer: Tokenizer | None, mask_id: int
) -> dict[str, npt.NDArray[np.object_]]:
    """Return the text of each token, where the caller asks to be told of tokens."""
    event = part.event
    if tokenizer is None or not (event.details or event.canvas):
        return {}
    texts: Sequence[str | None] = (
        canvas_texts(tokenizer, event.canvas, mask_id)
        if event.canvas
        else token_texts(tokenizer, part.previous_ids, event.ids, event.is_last)
    )
    return {"token_texts": np.array([(text or "").encode() for text in texts], object)}


def whole_outputs(part: Part, message: str, failure: Failure | None) -> dict[str, npt.NDArray[Any]]:
    """Return the outputs of one response to the ensemble, which waits for every tensor of a step.

    The text is left to the step that comes after.
    """
    event = part.event
    integers = {
        "output_ids": event.ids,
        "previous_ids": part.previous_ids,
        "prompt_ids": part.prompt_ids,
        "masked_counts": event.masked_counts,
        "denoiser_calls": (event.denoiser_calls,),
        "context_calls": (event.context_calls,),
        "queue_place": (part.queue_place,),
    }
    texts = {
        "finish_reason": failure or event.finish_reason or "",
        "request_id": event.request_id,
        "error": message,
    }
    return {
        "stop_text": np.array([] if event.text is None else [event.text.encode()], object),
        **{name: np.array(values, np.int32) for name, values in integers.items()},
        **{name: _text(value) for name, value in texts.items()},
    }


def _text(value: str) -> npt.NDArray[np.object_]:
    return np.array([value.encode()], object)


class TritonPythonModel:
    """The model class that Triton loads."""

    def initialize(self, arguments: dict[str, str]) -> None:
        """Load the engines and start the threads."""
        import triton_python_backend_utils as triton

        self._triton = triton
        sys.setswitchinterval(SWITCH_SECONDS)
        settings = Settings.of_model(arguments)
        engines = settings.engines()
        exists = Tokenizer.exists(engines.folder)
        self._tokenizer = Tokenizer(engines.folder) if exists else None
        self._open(settings, engines)
        self._sending = Worker("sending", _end_process)
        # Triton itself would wait for the answers under way, which may take minutes.
        on_cut(DRAIN, self._loop.drain)
        on_cut(LIFELINE, self._loop.close)

    def _open(self, settings: Settings, engines: EngineSet) -> None:
        """Load the engines, test them, and start the engine's thread."""
        self._runtime = open_runtime(
            engines, settings.checkpoint, settings.threads, ByteMeter("twotower: binding weights")
        )
        tested = run_self_test(engines, self._runtime)
        print(f"twotower: golden self-test {tested.status}: {tested.reason}", file=sys.stderr)
        tested.require()
        slots = settings.slots or self._runtime.limits.slots
        self._sink = TritonSink(self._triton)
        self._sink.set("self_test_passed", float(tested.status == "passed"))
        # At once: a total that began at 0 again would count as a start more.
        self._totals = restarts.read()
        for (name, label), count in self._totals.items():
            self._sink.add(name, label, count)
        collector = os.environ.get(TRACES)
        self._spans = SpanSender(collector) if collector else None
        scheduler = Scheduler(
            self._runtime,
            slots,
            tokenizer=self._tokenizer,
            most_waiting=settings.max_waiting,
            costs=costs_of_engines(engines),
            prefill_seconds=settings.prefill_ms / 1e3,
            prefix_bytes=settings.prefix_mib * 2**20,
        )
        as_json, room = bool(os.environ.get(LOG_JSON)), scheduler.prefix_room
        self._counters = scheduler.counters
        self._journal = Journal(self._sink, as_json, lambda: self._gauges(slots, room))
        self._loop = EngineLoop(scheduler, _end_process, self._journal)
        self._reader = Reader(
            Preprocessor(engines),
            self._loop,
            slots + settings.max_waiting,
            self._journal,
            _end_process,
        )

    def _gauges(self, slots: int, prefix_room: int) -> dict[str, float]:
        """Return the values of the gauges, and note what was counted since the last time.

        Args:
            slots: Number of slots.
            prefix_room: Bytes that the states of prompts' beginnings may take.
        """
        state, counters = self._loop.state, self._counters
        totals = {(f"{name}_total", ""): getattr(counters, name) for name in COUNTED}
        totals["turns_total", ""] = state.turns
        totals["prefix_evictions_total", ""] = counters.prefixes_evicted
        totals |= restarts.read()
        for (name, label), total in totals.items():
            self._journal.note(name, total - self._totals.get((name, label), 0), label)
        self._totals = totals
        return {
            "prefix_bytes": counters.prefix_bytes,
            "prefix_usage_ratio": counters.prefix_bytes / prefix_room if prefix_room else 0.0,
            "num_requests_running": state.running,
            "num_requests_waiting": state.waiting,
            "slot_usage_ratio": state.running / slots,
        }

    def execute(self, requests: list[Any]) -> None:
        """Hand the requests to the thread that reads them."""
        for request in requests:
            tensors, name, parameters = content_of(request)
            reply = TritonReply(
                self._triton,
                request.get_response_sender(),
                self._sending,
                self._tokenizer,
                frozenset(request.requested_output_names()),
                in_ensemble="request" in tensors,
                mask_id=self._runtime.mask_token_id,
                trace=self._trace_of(request),
            )
            self._reader.put(tensors, name, parameters, reply)

    def _trace_of(self, request: Any) -> Trace | None:
        if self._spans is None:
            return None
        context = request.trace().get_context()
        return Trace(self._spans, context) if context else None

    def is_ready(self) -> bool:
        """Say no while draining; servers from release 26.03 on ask."""
        return not self._loop.is_draining

    def finalize(self) -> None:
        """Answer what is open, end the threads and free the engines."""
        self._loop.close()
        self._reader.close()
        self._sending.close()
        self._journal.close()
        if self._spans is not None:
            self._spans.close()
        self._sink.close()
        self._runtime.close()


def _end_process() -> None:
    """End this process: a server whose engine is dead must not look healthy."""
    print("twotower: a thread of the model died; ending its process", file=sys.stderr)
    sys.stderr.flush()
    time.sleep(SECONDS_TO_DELIVER)
    os._exit(1)
