"""Many requests over a fixed number of slots, all denoising together.

A request waits until a slot is free. Its prompt is then prefilled, a chunk per turn; from there it
alternates between refining a block (one denoiser call per turn, shared by all rows, each at its own
step, threshold, policy and seed) and committing it (one context call, shared by rows that finished
a block; see `turns`). Rows join and leave at any turn.

```
waiting -> prefilling -> stepping <-> committing
                            |
                            v
                          done
```
The rules of generation are NVIDIA's `generate_mask_diffusion`, `generate_mock_ar` and `generate_ar`
(`modeling_nemotron_twotower.py`). For one request whose length is a multiple of the block they give
the same tokens. The differences are:

- Every row is on its own: the masked fraction t, the count of committed positions, the end. NVIDIA
  takes one t for a batch, of prompts of one length, and stops all rows when one meets an end token.
- `max_new_tokens` need not be a multiple of the block: the last block is denoised whole and its ids
  are cut, as in Megatron's `DiffusionEngine`. NVIDIA asserts.
- An answer ends with its end token; NVIDIA keeps the rest of the block.
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

import time
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from twotower_contract.policies import POLICIES
from twotower_contract.statuses import try_again
from twotower_engines.artifacts.tokenizer import Tokenizer
from twotower_engines.errors import RequestError
from twotower_engines.generation.costs import Costs, LinearCosts
from twotower_engines.generation.counters import Counters
from twotower_engines.generation.ending import Ending
from twotower_engines.generation.prefixes import Prefixes
from twotower_engines.generation.request import BlockEvent, Request, RequestLimits, TokenDetail
from twotower_engines.generation.row import Row, Stage
from twotower_engines.generation.sampling import likeliest, row_seed, sample
from twotower_engines.generation.turns import Turns
from twotower_engines.generation.waiting import WaitingRequests
from twotower_engines.planning.plan import PREFILL_MS
from twotower_engines.runtime.interface import DenoiseRow, ExtendRow, PredictRow, Runtime

__all__ = ["Scheduler"]

USUAL_COSTS = LinearCosts()
LEAST_RETRY = 0.5
"""Seconds after which those who were turned away are told to try again, at least."""


class Scheduler:
    """Advances requests turn by turn. Not thread safe: one thread submits, cancels and turns.

    Args:
        runtime: Loaded engines.
        slots: Number of slots to use; all of the engines' where not given.
        tokenizer: For stop strings; requests that have some are refused without it.
        most_waiting: Requests that may wait for a slot; None for any number.
        costs: The time that calls take, for the choice of which to make.
        prefill_seconds: Time that prompts may take from running rows in a turn.
        groups_calls: Whether rows wait for each other's context calls where that pays.
        prefix_bytes: Memory for the states of prompts' beginnings, beside the slots; 0 for none.
        clock: Tells the time in seconds.
    """

    def __init__(
        self,
        runtime: Runtime,
        slots: int | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        most_waiting: int | None = None,
        costs: Costs = USUAL_COSTS,
        prefill_seconds: float = PREFILL_MS / 1e3,
        groups_calls: bool = True,
        prefix_bytes: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._runtime, self._tokenizer = runtime, tokenizer
        self._limits = RequestLimits.of_runtime(runtime, has_text=tokenizer is not None)
        count = runtime.limits.slots if slots is None else slots
        if not 1 <= count <= runtime.limits.slots:
            raise RequestError(
                f"slots is {count}; these engines have 1 to {runtime.limits.slots}, "
                "build with --slots to have more"
            )
        self._turns = Turns(costs, runtime.limits, prefill_seconds, groups_calls)
        self._clock = clock
        self.counters = Counters()
        self._prefixes: Prefixes | None = None
        if prefix_bytes:
            chunk = self._turns.chunk
            store = runtime.state_store(prefix_bytes, chunk)
            self._prefixes = Prefixes(store, chunk) if store.places else None
        self._free = list(range(count))
        self._rows: dict[int, Row] = {}
        self._waiting = WaitingRequests(most_waiting)
        self._unstarted: list[BlockEvent] = []  # last events of requests that got no slot
        self._admitted = 0
        self._between_ends = 0.0  # seconds from the end of one request to the next, on average
        self._ended_at: float | None = None

    @property
    def prefix_room(self) -> int:
        """Bytes that the states of prompts' beginnings may take, whole entries counted."""
        return 0 if self._prefixes is None else self._prefixes.total_bytes

    @property
    def idle(self) -> bool:
        """Whether a turn would have nothing to do."""
        return not (self._rows or self._waiting or self._unstarted)

    @property
    def waiting_ids(self) -> tuple[str, ...]:
        """Requests that have no slot yet, the next one first."""
        return tuple(one.request_id for one in self._waiting.in_order(self._holders))

    @property
    def waiting(self) -> int:
        """Requests that have no slot yet."""
        return len(self._waiting)

    @property
    def active(self) -> int:
        """Requests that have a slot."""
        return len(self._rows)

    def submit(self, request: Request) -> None:
        """Check a request and queue it: callers take turns, see `waiting`.

        A full queue turns one away, in its last event: this one, or the newest of a caller who has
        more there.

        Raises:
            RequestError: The request cannot be done, or its id is in use.
        """
        request.check(self._limits)
        name = request.request_id
        if self._find(name) is not None or any(one.request_id == name for one in self._waiting):
            raise RequestError(f"request_id {name!r} is in use by another request")
        for turned_away in self._waiting.add(request, len(self._free)):
            name, count = turned_away.request_id, len(self._waiting)
            after = self.retry_after(count)
            why = f"{count} requests wait already; {try_again(after)}"
            event = BlockEvent(name, (), (), 0, 0, error=why, retry_after=after)
            self._unstarted.append(event)

    def retry_after(self, waiting: int) -> float:
        """Return the seconds until half of so many requests will have ended; for any thread."""
        return max(LEAST_RETRY, round(self._between_ends * waiting / 2, 1))

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
                self._unstarted.append(BlockEvent(request_id, (), (), 0, 0, "cancelled"))
                return True
        return False

    def turn(self) -> list[BlockEvent]:
        """Advance every request by one step.

        At most one denoiser call for all diffusing rows, one for all `mock_ar` rows, and one
        context call per size of extension.

        Returns:
            The events of this turn; the order across requests is unspecified.
        """
        events, self._unstarted = self._unstarted, []
        events += self._drop_cancelled()
        self._admit()
        self._extend()
        stepping = [row for row in self._in_order() if row.stage is Stage.STEPPING]
        by_mode = {"mask_diffusion": self._denoise, "mock_ar": self._predict, "ar": self._read}
        for mode, step in by_mode.items():
            rows = [row for row in stepping if row.request.mode == mode]
            if rows:
                events += step(rows)
        self._release()
        return events

    @property
    def _holders(self) -> Counter[str]:
        """The number of slots of each caller."""
        return Counter(row.request.tenant for row in self._rows.values())

    def _find(self, request_id: str) -> Row | None:
        rows = self._rows.values()
        return next((row for row in rows if row.request.request_id == request_id), None)

    def _in_order(self) -> list[Row]:
        """Return the rows by slot: the same rows then always make the same batch."""
        return [self._rows[slot] for slot in sorted(self._rows)]

    def _drop_cancelled(self) -> list[BlockEvent]:
        events = [row.give_up("cancelled") for row in self._in_order() if row.cancelled]
        self._release()
        return events

    def _release(self) -> None:
        done = [slot for slot, row in self._rows.items() if row.stage is Stage.DONE]
        if not done:
            return
        for slot in done:
            del self._rows[slot]
        self._free = sorted(self._free + done)
        now = self._clock()
        if self._ended_at is not None and self._waiting:
            self._between_ends += ((now - self._ended_at) / len(done) - self._between_ends) / 8
        self._ended_at = now

    def _admit(self) -> None:
        while self._free and self._waiting:
            slot, request = self._free.pop(0), self._waiting.pop(self._holders)
            self._runtime.reset(slot)
            prompt = np.array(request.prompt_ids, np.int32)
            ending = Ending(request, self._limits.end_ids, self._tokenizer)
            mask_id, last_id = self._runtime.mask_token_id, int(prompt[-1])
            row = Row(request, slot, self._admitted, prompt, ending, mask_id, last_id)
            if self._prefixes is not None and request.prefix_cache:
                row.prefix = self._prefixes.restore(slot, prompt)
                row.reused = len(row.prefix) * self._turns.chunk
                row.pending = prompt[row.reused :]
            row.admitted_at = self._clock()
            self._rows[slot] = row
            self._admitted += 1
            self.counters.admitted(row)

    def _extend(self) -> None:
        """Append pending tokens, in one call for each kind of size, to keep padding small."""
        for rows in self._turns.extensions(self._in_order()):
            parts = [self._turns.part(row) for row in rows]
            start = self._clock()
            logits = self._runtime.extend(parts)
            self.counters.extended(parts)
            if all(row.stage is Stage.PREFILLING for row in rows):
                size = max(part.ids.size for part in parts)
                self._turns.prefilled(len(rows), size, self._clock() - start)
            for row, part, row_logits in zip(rows, parts, logits, strict=True):
                row.pending, row.waited = row.pending[part.ids.size :], 0.0
                row.context_calls += 1
                row.logits = row_logits
                if row.stage is Stage.PREFILLING:
                    self._keep(row, part)
                if not row.pending.size:
                    row.stage = Stage.STEPPING
                    row.prefilled_at = row.prefilled_at or self._clock()

    def _keep(self, row: Row, part: ExtendRow) -> None:
        """Keep a prompt's states after a full chunk, for prompts that begin alike."""
        chunk, read = self._turns.chunk, len(row.request.prompt_ids) - row.pending.size
        is_next = read == (len(row.prefix) + 1) * chunk
        if self._prefixes is not None and row.request.prefix_cache and is_next:
            self._prefixes.save(row.slot, row.prefix, part.ids)
            self.counters.prefix_bytes = self._prefixes.used_bytes
            self.counters.prefixes_evicted = self._prefixes.evicted

    def _denoise(self, rows: Sequence[Row]) -> list[BlockEvent]:
        """Refine the block of every row once; one that its request fixed whole needs no step."""
        masked = [row for row in rows if row.masked]
        events = [row.finish_block() for row in rows if not row.masked]
        if not masked:
            return events
        refined = self._runtime.denoise([self._step(row) for row in masked])
        self.counters.denoised(len(masked))
        self._turns.stepped(self._in_order(), masked)
        for row, one in zip(masked, refined, strict=True):
            if one.still_masked < 0:
                events.append(row.give_up(error=_not_a_number(row)))
                continue
            row.refine(one)
            if one.still_masked == 0:
                self._turns.finished(len(row.masked_counts))
                events.append(row.finish_block())
            elif row.request.stream_mode == "denoise":
                events.append(row.snapshot())
        return events

    def _step(self, row: Row) -> DenoiseRow:
        """Return the next denoise step of a row, and count it."""
        request, step = row.request, len(row.masked_counts)
        steps_left = min(request.steps - step, row.calls_left)
        row.masked_counts.append(row.masked)
        row.denoiser_calls += 1
        return DenoiseRow(
            row.slot,
            row.block,
            threshold=request.threshold,
            steps_left=int(steps_left),
            temperature=request.temperature,
            policy=POLICIES[request.policy],
            seed=row_seed(request.seed, row.position, step),
        )

    def _predict(self, rows: Sequence[Row]) -> list[BlockEvent]:
        """Take the next token of every row from the denoiser tower."""
        logits = self._runtime.predict([PredictRow(row.slot, row.last_id) for row in rows])
        self.counters.denoised(len(rows))
        events = []
        for row, row_logits in zip(rows, logits, strict=True):
            row.denoiser_calls += 1
            events += self._take_token(row, row_logits)
        return events

    def _read(self, rows: Sequence[Row]) -> list[BlockEvent]:
        """Take the next token of every row from the logits of its last extension."""
        events = []
        for row in rows:
            assert row.logits is not None, "the extension before this step asked for logits"
            events += self._take_token(row, row.logits)
        return events

    def _take_token(self, row: Row, logits: npt.NDArray[np.float32]) -> list[BlockEvent]:
        """Choose a row's next token; return an event when a block is full, or at the end."""
        request = row.request
        if not np.isfinite(logits).all():
            return [row.give_up(error=_not_a_number(row))]
        allowed = logits
        if row.ending.count < row.ending.least - 1 and row.ending.ids:
            allowed = logits.copy()
            allowed[list(row.ending.ids)] = -np.inf
        token = sample(
            allowed,
            request.temperature,
            request.top_k,
            request.top_p,
            request.seed,
            row.position + len(row.unsent),
        )
        detail = None
        if request.logprobs:
            logprob, top = likeliest(logits, token, request.top_logprobs)
            detail = TokenDetail(logprob, 0, top)
        return row.take_token(token, detail)


def _not_a_number(row: Row) -> str:
    return (
        f"the model's logits hold NaN or infinity at token {row.position} of the sequence; "
        "check the engines with `twotower verify`"
    )
