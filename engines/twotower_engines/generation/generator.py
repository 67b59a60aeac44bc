"""Answers to single requests: an engine set loaded, and the scheduler turned until it is idle.

```python
engines = open_engine_set(Path("ENGINES"))
with Generator(engines) as generator:
    result = generator.generate(Request("1", prompt_ids=(5, 6, 7)))
```
A server keeps many requests in flight and turns the scheduler itself; see `scheduler.Scheduler`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from twotower_contract.engine_set import EngineSet
from twotower_engines.artifacts.tokenizer import Tokenizer
from twotower_engines.errors import GenerationError
from twotower_engines.generation.costs import costs_of_engines
from twotower_engines.generation.request import BlockEvent, FinishReason, Request
from twotower_engines.generation.scheduler import Scheduler
from twotower_engines.runtime.interface import LoadProgress
from twotower_engines.runtime.opening import open_runtime

__all__ = ["Generator", "Result", "result_of"]


@dataclass(frozen=True, slots=True)
class Result:
    """A whole answer.

    Attributes:
        output_ids: The prompt, then the new tokens.
        blocks: For each block the positions masked before each of its denoiser calls; empty in the
            autoregressive modes.
        denoiser_calls: Number of denoiser calls.
        context_calls: Number of context calls, prefill included.
        finish_reason: Why the answer ended.
        seconds: Time from submission to the last block.
    """

    output_ids: tuple[int, ...]
    blocks: tuple[tuple[int, ...], ...]
    denoiser_calls: int
    context_calls: int
    finish_reason: FinishReason
    seconds: float


class Generator:
    """A loaded engine set that answers one request at a time.

    Args:
        engines: The engine set.
        checkpoint: The checkpoint's folder, where it is not the one in the manifest.
        threads: CPU threads; None for one per core.
        progress: Receives the weights that are bound and the calls that are prepared.
        tokenizer: For stop strings; requests that have some are refused without it.
        int8: Whether the CPU computes products in 8 bits.
    """

    def __init__(
        self,
        engines: EngineSet,
        checkpoint: Path | None = None,
        threads: int | None = None,
        progress: LoadProgress | None = None,
        tokenizer: Tokenizer | None = None,
        int8: bool = False,
    ) -> None:
        self._runtime = open_runtime(engines, checkpoint, threads, progress, int8)
        costs = costs_of_engines(engines)
        self._scheduler = Scheduler(self._runtime, slots=1, tokenizer=tokenizer, costs=costs)

    def stream(self, request: Request) -> Iterator[BlockEvent]:
        """Yield the events of one request. Leaving early cancels it.

        Raises:
            RequestError: The request cannot be done.
            GenerationError: It failed on the way.
        """
        self._scheduler.submit(request)
        try:
            while not self._scheduler.idle:
                for event in self._scheduler.turn():
                    if event.error is not None:
                        raise GenerationError(f"request {event.request_id}: {event.error}")
                    yield event
        finally:
            if self._scheduler.cancel(request.request_id):
                self._scheduler.turn()

    def generate(self, request: Request) -> Result:
        """Return the whole answer to one request.

        Raises:
            RequestError: The request cannot be done.
            GenerationError: It failed on the way.
        """
        start = time.perf_counter()
        return result_of(request, list(self.stream(request)), time.perf_counter() - start)

    def close(self) -> None:
        """Free the engines; a second call does nothing."""
        self._runtime.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def result_of(request: Request, events: list[BlockEvent], seconds: float) -> Result:
    """Put the events of a finished request together."""
    last = events[-1]
    assert last.finish_reason is not None, "the last event of a request says why it ended"
    new_ids = [token for event in events for token in event.ids]
    return Result(
        output_ids=(*request.prompt_ids, *new_ids),
        blocks=tuple(event.masked_counts for event in events if event.masked_counts),
        denoiser_calls=last.denoiser_calls,
        context_calls=last.context_calls,
        finish_reason=last.finish_reason,
        seconds=seconds,
    )
