"""The model `generate`: checked requests in, one response per committed block out.

Decoupled: `execute` hands each request to the engine's thread and returns; the thread sends. After
the final response a sender is let go at once: one that is kept would block unloading.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import numpy as np

from twotower_contract.errors import TwoTowerError
from twotower_engines.artifacts.tokenizer import Tokenizer
from twotower_engines.generation.costs import costs_of_engines
from twotower_engines.generation.request import BlockEvent
from twotower_engines.generation.scheduler import Scheduler
from twotower_engines.runtime.opening import open_runtime
from twotower_engines.runtime.progress import ByteMeter
from twotower_engines.serving.lifeline import on_cut
from twotower_engines.serving.loop import EngineLoop, Failure, Part
from twotower_engines.serving.settings import Settings
from twotower_engines.serving.wire import decode
from twotower_engines.verify.self_test import run_self_test

SECONDS_TO_DELIVER = 0.5  # for the last errors to leave a process that is about to end


class TritonReply:
    """Sends the parts of one answer through Triton's response sender.

    Args:
        triton: The module `triton_python_backend_utils`.
        sender: The request's response sender.
    """

    def __init__(self, triton: Any, sender: Any) -> None:
        self._triton = triton
        self._sender = sender

    def send(self, part: Part) -> None:
        """Send a part."""
        self._respond(part, part.event.finish_reason or "", "", part.event.is_last)

    def fail(self, message: str, failure: Failure) -> None:
        """Send what went wrong, which ends the answer.

        As an ordinary response: an ensemble that is given an error right after a response loses
        that response, and counts the request as under way for ever (server 2.51).
        """
        self._respond(Part(BlockEvent("", (), (), 0, 0)), failure, message, last=True)

    def is_cancelled(self) -> bool:
        """Whether the caller is gone. Servers up to 2.51 never tell a step of an ensemble."""
        return self._sender is not None and bool(self._sender.is_cancelled())

    def _respond(self, part: Part, finish_reason: str, error: str, last: bool) -> None:
        triton, event = self._triton, part.event
        integers = {
            "output_ids": event.ids,
            "previous_ids": part.previous_ids,
            "prompt_ids": part.prompt_ids,
            "masked_counts": event.masked_counts,
            "denoiser_calls": (event.denoiser_calls,),
            "context_calls": (event.context_calls,),
            "queue_place": (part.queue_place,),
        }
        texts = {"finish_reason": finish_reason, "error": error}
        tensors = [
            *(triton.Tensor(name, np.array(ids, np.int32)) for name, ids in integers.items()),
            *(
                triton.Tensor(name, np.array([text.encode()], object))
                for name, text in texts.items()
            ),
        ]
        sender = self._sender
        if last:
            self._sender = None
        flags = triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL if last else 0
        sender.send(triton.InferenceResponse(tensors), flags=flags)


class TritonPythonModel:
    """The model class that Triton loads."""

    def initialize(self, arguments: dict[str, str]) -> None:
        """Load the engines and start the thread that turns them."""
        import triton_python_backend_utils as triton

        self._triton = triton
        settings = Settings.of_model(arguments)
        engines = settings.engines()
        self._runtime = open_runtime(
            engines, settings.checkpoint, settings.threads, ByteMeter("twotower: binding weights")
        )
        tested = run_self_test(engines, self._runtime)
        print(f"twotower: golden self-test {tested.status}: {tested.reason}", file=sys.stderr)
        tested.require()
        slots = settings.slots or self._runtime.limits.slots
        folder = engines.folder
        tokenizer = Tokenizer(folder) if Tokenizer.exists(folder) else None
        costs = costs_of_engines(engines)
        scheduler = Scheduler(self._runtime, slots, tokenizer=tokenizer, costs=costs)
        self._loop = EngineLoop(scheduler, slots + settings.max_waiting, _end_process)
        # Triton itself would wait for the answers under way, which may take minutes.
        on_cut(self._loop.close)

    def execute(self, requests: list[Any]) -> None:
        """Hand the requests to the engine's thread. Inputs are copied: Triton frees them."""
        triton = self._triton
        for request in requests:
            reply = TritonReply(triton, request.get_response_sender())
            content = triton.get_input_tensor_by_name(request, "request").as_numpy()
            try:
                message = decode(bytes(content.reshape(-1)[0]))
            except TwoTowerError as problem:
                reply.fail(str(problem), "refused")
            else:
                self._loop.put(message, reply)

    def finalize(self) -> None:
        """Answer what is open, end the thread and free the engines."""
        self._loop.close()
        self._runtime.close()


def _end_process() -> None:
    """End this process: a server whose engine is dead must not look healthy."""
    print("twotower: the engine's thread died; ending the model's process", file=sys.stderr)
    sys.stderr.flush()
    time.sleep(SECONDS_TO_DELIVER)
    os._exit(1)
