"""Many requests over a fixed number of slots, all denoising together.

A request waits until a slot is free. Its prompt is then prefilled, a chunk per turn; from there it
alternates between refining a block (one denoiser call per turn, shared by all rows, each at its own
step, threshold, policy and seed) and committing it (one context call, shared by all rows that
finished a block and all that still prefill). Rows join and leave at any turn.

```
waiting -> prefilling -> stepping <-> committing
                            |
                            v
                          done: length, eos, cancelled, or failed
```
The rules of generation are NVIDIA's `generate_mask_diffusion`, `generate_mock_ar` and `generate_ar`
(`modeling_nemotron_twotower.py`). For one request whose length is a multiple of the block they give
the same tokens. The differences are:

- Every row is on its own: the masked fraction t, the count of committed positions, the end. NVIDIA
  takes one t for a batch, of prompts of one length, and stops all rows when one meets an end token.
- `max_new_tokens` need not be a multiple of the block: the last block is denoised whole and its ids
  are cut, as in Megatron's `DiffusionEngine`. NVIDIA asserts. An end token ends the request only
  if it is among the ids that are left.
- The context is not extended by the last block or token of a request, which nothing would read, and
  mock_ar's prefill keeps the states before the last token by extending by it alone (`mamba_s2`).
- The mask token has probability 0, not that of a logit of -1e12. It is never predicted.
- Logits that hold a NaN fail the request; NVIDIA commits such positions first. (Infinity fails one
  in ar and mock_ar.)
- Noise and draws depend on the request's seed, the position, the step and the token, and not on a
  generator that a batch shares (`sampling`).
- Prompts of one token work: the states before it are zero. NVIDIA's prefill of no tokens fails.
- Policies besides `threshold` are not NVIDIA's; see the exporter's `graph/refine.py`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import numpy.typing as npt

from twotower_contract.policies import POLICIES
from twotower_engines.errors import RequestError
from twotower_engines.generation.request import BlockEvent, FinishReason, Request, RequestLimits
from twotower_engines.generation.sampling import row_seed, sample
from twotower_engines.runtime.interface import DenoiseRow, ExtendRow, PredictRow, Runtime

__all__ = ["Scheduler"]


class _Stage(Enum):
    EXTENDING = "tokens of the prompt or of a finished block wait to be appended to the context"
    STEPPING = "a denoise step or a token comes next"
    DONE = "the last event was made"


@dataclass(slots=True, eq=False)
class _Row:
    """One request in a slot.

    Attributes:
        pending: Tokens that must be appended to the context.
        block: The block as it is now, masks included; mask_diffusion only.
        unsent: Tokens of the next event; empty in mask_diffusion, which sends whole blocks.
        masked_counts: Masked positions before each denoiser call of the block.
        generated: Number of tokens in earlier events.
        last_id: The newest token of the sequence.
        logits: Logits of the next token, once the context holds all before it; ar only.
    """

    request: Request
    slot: int
    pending: npt.NDArray[np.int32]
    block: npt.NDArray[np.int32]
    last_id: int
    stage: _Stage = _Stage.EXTENDING
    unsent: list[int] = field(default_factory=list)
    masked_counts: list[int] = field(default_factory=list)
    generated: int = 0
    logits: npt.NDArray[np.float32] | None = None
    denoiser_calls: int = 0
    context_calls: int = 0
    cancelled: bool = False

    @property
    def position(self) -> int:
        """Position in the sequence of the first token after all earlier events."""
        return len(self.request.prompt_ids) + self.generated

    def event(
        self,
        ids: Sequence[int] = (),
        finish_reason: FinishReason | None = None,
        error: str | None = None,
    ) -> BlockEvent:
        """Make an event and count its tokens as given."""
        self.generated += len(ids)
        counts = tuple(self.masked_counts)
        self.masked_counts.clear()
        if finish_reason is not None or error is not None:
            self.stage = _Stage.DONE
        return BlockEvent(
            self.request.request_id,
            tuple(ids),
            counts,
            self.denoiser_calls,
            self.context_calls,
            finish_reason,
            error,
        )


class Scheduler:
    """Advances requests turn by turn. Not thread safe: one thread submits, cancels and turns.

    Args:
        runtime: Loaded engines.
        slots: Number of slots to use; all of the engines' where not given.
    """

    def __init__(self, runtime: Runtime, slots: int | None = None) -> None:
        self._runtime = runtime
        self._limits = RequestLimits.of_runtime(runtime)
        count = runtime.limits.slots if slots is None else slots
        if not 1 <= count <= runtime.limits.slots:
            raise RequestError(
                f"slots is {count}; these engines have 1 to {runtime.limits.slots}, "
                "build with --slots to have more"
            )
        self._free = list(range(count))
        self._rows: dict[int, _Row] = {}
        self._waiting: deque[Request] = deque()
        self._cancelled_waiting: list[str] = []

    @property
    def idle(self) -> bool:
        """Whether a turn would have nothing to do."""
        return not (self._rows or self._waiting or self._cancelled_waiting)

    @property
    def waiting_ids(self) -> tuple[str, ...]:
        """Requests that have no slot yet, the next one first."""
        return tuple(request.request_id for request in self._waiting)

    @property
    def active(self) -> int:
        """Requests that have a slot."""
        return len(self._rows)

    def submit(self, request: Request) -> None:
        """Check a request and queue it, first come, first served.

        Raises:
            RequestError: The request cannot be done, or its id is in use.
        """
        request.check(self._limits)
        if self._find(request.request_id) is not None or any(
            waiting.request_id == request.request_id for waiting in self._waiting
        ):
            raise RequestError(f"request_id {request.request_id!r} is in use by another request")
        self._waiting.append(request)

    def cancel(self, request_id: str) -> bool:
        """Stop a request: the next turn gives its last event and frees its slot.

        Returns:
            False where no such request is in flight; it may have ended just now.
        """
        row = self._find(request_id)
        if row is not None:
            row.cancelled = True
            return True
        for request in self._waiting:
            if request.request_id == request_id:
                self._waiting.remove(request)
                self._cancelled_waiting.append(request_id)
                return True
        return False

    def turn(self) -> list[BlockEvent]:
        """Advance every request by one step.

        At most one denoiser call for all diffusing rows, one for all `mock_ar` rows, and one
        context call per size of extension.

        Returns:
            The events of this turn; the order across requests is unspecified.
        """
        events = self._drop_cancelled()
        self._admit()
        self._extend()
        stepping = [row for row in self._in_order() if row.stage is _Stage.STEPPING]
        by_mode = {"mask_diffusion": self._denoise, "mock_ar": self._predict, "ar": self._read}
        for mode, step in by_mode.items():
            rows = [row for row in stepping if row.request.mode == mode]
            if rows:
                events += step(rows)
        self._release()
        return events

    def _find(self, request_id: str) -> _Row | None:
        rows = self._rows.values()
        return next((row for row in rows if row.request.request_id == request_id), None)

    def _in_order(self) -> list[_Row]:
        """Return the rows by slot: the same rows then always make the same batch."""
        return [self._rows[slot] for slot in sorted(self._rows)]

    def _drop_cancelled(self) -> list[BlockEvent]:
        events = [BlockEvent(name, (), (), 0, 0, "cancelled") for name in self._cancelled_waiting]
        self._cancelled_waiting.clear()
        for row in self._in_order():
            if row.cancelled:
                events.append(row.event(row.unsent, "cancelled"))
        self._release()
        return events

    def _release(self) -> None:
        for slot, row in list(self._rows.items()):
            if row.stage is _Stage.DONE:
                del self._rows[slot]
                self._free.append(slot)
        self._free.sort()

    def _admit(self) -> None:
        while self._free and self._waiting:
            slot, request = self._free.pop(0), self._waiting.popleft()
            self._runtime.reset(slot)
            prompt = np.array(request.prompt_ids, np.int32)
            block = self._masked_block(request)
            self._rows[slot] = _Row(request, slot, prompt, block, int(prompt[-1]))

    def _masked_block(self, request: Request) -> npt.NDArray[np.int32]:
        return np.full(request.block_size, self._runtime.mask_token_id, np.int32)

    def _extend(self) -> None:
        """Append pending tokens, in one call for each kind of size, to keep padding small."""
        block = self._runtime.limits.block_size_max
        calls: dict[int, list[tuple[_Row, ExtendRow]]] = {}
        for row in self._in_order():
            if row.stage is _Stage.EXTENDING:
                part = self._next_part(row)
                size = part.ids.size
                kind = 1 if size == 1 else block if size <= block else block + 1
                calls.setdefault(kind, []).append((row, part))
        for call in calls.values():
            logits = self._runtime.extend([part for _, part in call])
            for (row, part), row_logits in zip(call, logits, strict=True):
                row.pending = row.pending[part.ids.size :]
                row.context_calls += 1
                row.logits = row_logits
                if not row.pending.size:
                    row.stage = _Stage.STEPPING

    def _next_part(self, row: _Row) -> ExtendRow:
        """Return the next tokens of a row that go into one call."""
        size = min(row.pending.size, self._runtime.limits.max_tokens_per_call)
        is_mock = row.request.mode == "mock_ar"
        if is_mock and row.pending.size > 1:
            # the last token goes alone, so that the states before it can be kept
            size = min(size, row.pending.size - 1)
        is_last = size == row.pending.size
        return ExtendRow(
            row.slot,
            row.pending[:size],
            logits=is_last and row.request.mode == "ar",
            keep_previous=is_last and is_mock,
        )

    def _denoise(self, rows: Sequence[_Row]) -> list[BlockEvent]:
        """Refine the block of every row once."""
        calls = []
        for row in rows:
            request, step = row.request, len(row.masked_counts)
            row.masked_counts.append(int((row.block == self._runtime.mask_token_id).sum()))
            row.denoiser_calls += 1
            calls.append(
                DenoiseRow(
                    row.slot,
                    row.block,
                    threshold=request.threshold,
                    steps_left=request.steps - step,
                    temperature=request.temperature,
                    policy=POLICIES[request.policy],
                    seed=row_seed(request.seed, row.position, step),
                )
            )
        events = []
        for row, refined in zip(rows, self._runtime.denoise(calls), strict=True):
            if refined.still_masked < 0:
                events.append(row.event(error=_not_a_number(row)))
                continue
            row.block = refined.ids
            if refined.still_masked == 0:
                events.append(self._finish_block(row))
        return events

    def _finish_block(self, row: _Row) -> BlockEvent:
        """Return a finished block, and prepare its commit unless it was the last."""
        request, block = row.request, row.block
        ids = block[: request.max_new_tokens - row.generated].tolist()
        reason: FinishReason | None = None
        if not set(request.eos_ids).isdisjoint(ids):
            reason = "eos"
        elif row.generated + len(ids) >= request.max_new_tokens:
            reason = "length"
        if reason is None:
            row.pending, row.block = block, self._masked_block(request)
            row.stage = _Stage.EXTENDING
        return row.event(ids, reason)

    def _predict(self, rows: Sequence[_Row]) -> list[BlockEvent]:
        """Take the next token of every row from the denoiser tower."""
        logits = self._runtime.predict([PredictRow(row.slot, row.last_id) for row in rows])
        events = []
        for row, row_logits in zip(rows, logits, strict=True):
            row.denoiser_calls += 1
            events += self._take_token(row, row_logits)
        return events

    def _read(self, rows: Sequence[_Row]) -> list[BlockEvent]:
        """Take the next token of every row from the logits of its last extension."""
        events = []
        for row in rows:
            assert row.logits is not None, "the extension before this step asked for logits"
            events += self._take_token(row, row.logits)
        return events

    def _take_token(self, row: _Row, logits: npt.NDArray[np.float32]) -> list[BlockEvent]:
        """Choose a row's next token; return an event when a block is full, or at the end."""
        request = row.request
        if not np.isfinite(logits).all():
            return [row.event(row.unsent, error=_not_a_number(row))]
        token = sample(
            logits,
            request.temperature,
            request.top_k,
            request.top_p,
            request.seed,
            row.position + len(row.unsent),
        )
        row.last_id = token
        row.unsent.append(token)
        reason: FinishReason | None = None
        if token in request.eos_ids:
            reason = "eos"
        elif row.generated + len(row.unsent) == request.max_new_tokens:
            reason = "length"
        else:
            row.pending, row.stage = np.array([token], np.int32), _Stage.EXTENDING
        if reason is None and len(row.unsent) < request.block_size:
            return []
        ids, row.unsent = row.unsent, []
        return [row.event(ids, reason)]


def _not_a_number(row: _Row) -> str:
    return (
        f"the model's logits hold NaN or infinity at token {row.position} of the sequence; "
        "check the engines with `twotower verify`"
    )
