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

from twotower_engines.errors import EnginesError
from twotower_engines.runtime import open_runtime
from twotower_engines.scheduler import Scheduler

from .failure import Failure, triton_error
from .loop import EngineLoop, Part
from .settings import Settings
from .wire import decode

__all__ = ["TritonPythonModel"]

SECONDS_TO_DELIVER = 0.5  # for the last errors to leave a process that is about to end


class TritonReply:
    """Sends the parts of one answer through Triton's response sender.

    Args:
        triton: The module `triton_python_backend_utils`.
        sender: Of the request.
    """

    def __init__(self, triton: Any, sender: Any) -> None:
        self._triton = triton
        self._sender = sender

    def send(self, part: Part) -> None:
        """Send a part."""
        event = part.event
        integers = {
            "output_ids": event.ids,
            "previous_ids": part.previous_ids,
            "prompt_ids": part.prompt_ids,
            "masked_counts": event.masked_counts,
            "denoiser_calls": (event.denoiser_calls,),
            "context_calls": (event.context_calls,),
        }
        tensors = [
            self._triton.Tensor(name, np.array(values, dtype=np.int32))
            for name, values in integers.items()
        ]
        reason = np.array([(event.finish_reason or "").encode()], dtype=np.object_)
        tensors.append(self._triton.Tensor("finish_reason", reason))
        self._send(self._triton.InferenceResponse(tensors), event.is_last)

    def fail(self, message: str, failure: Failure) -> None:
        """Send an error, which ends the answer."""
        self._send(triton_error(self._triton, message, failure), last=True)

    def is_cancelled(self) -> bool:
        """Whether the caller is gone. Servers up to 2.51 never tell a step of an ensemble."""
        return self._sender is not None and bool(self._sender.is_cancelled())

    def _send(self, response: Any, last: bool) -> None:
        flags = self._triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL if last else 0
        sender = self._sender
        if last:
            self._sender = None
        sender.send(response, flags=flags)


class TritonPythonModel:
    """What Triton calls."""

    def initialize(self, arguments: dict[str, str]) -> None:
        """Load the engines and start the thread that turns them."""
        import triton_python_backend_utils as triton

        self._triton = triton
        settings = Settings.of_model(arguments)
        self._runtime = open_runtime(
            settings.engines(), settings.checkpoint, threads=settings.threads
        )
        slots = settings.slots or self._runtime.limits.slots
        scheduler = Scheduler(self._runtime, slots)
        self._loop = EngineLoop(scheduler, slots + settings.max_waiting, _end_process)

    def execute(self, requests: list[Any]) -> None:
        """Hand the requests to the engine's thread. Inputs are copied: Triton frees them."""
        triton = self._triton
        for request in requests:
            reply = TritonReply(triton, request.get_response_sender())
            content = triton.get_input_tensor_by_name(request, "request").as_numpy()
            try:
                message = decode(bytes(content.reshape(-1)[0]))
            except EnginesError as problem:
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
