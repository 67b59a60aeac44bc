"""One request in a slot: what it waits for, and the events that it makes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import numpy.typing as npt

from twotower_contract.options import FREE
from twotower_engines.generation.ending import Ending
from twotower_engines.generation.request import (
    GIVEN,
    BlockEvent,
    FinishReason,
    Request,
    TokenDetail,
)
from twotower_engines.runtime.interface import Denoised

LEAST_PROBABILITY = 1e-45  # the least float32; a confidence below it is written as 0


class Stage(Enum):
    """The next thing that a row needs."""

    PREFILLING = "tokens of the prompt wait to be appended to the context"
    COMMITTING = "tokens of the answer wait to be appended to the context"
    STEPPING = "a denoise step or a token comes next"
    DONE = "the last event was made"


@dataclass(slots=True, eq=False)
class Row:
    """One request in a slot.

    Attributes:
        number: Order of admission.
        pending: Tokens that must be appended to the context.
        ending: Where the answer ends.
        mask_id: The mask token.
        last_id: The newest token of the sequence.
        stage: What comes next.
        block: The block as it is now, masks included; mask_diffusion only.
        unsent: Tokens of the next event; empty in mask_diffusion, which sends whole blocks.
        unsent_text: Their text, for stop strings.
        details: Details of `unsent`, or of the block's tokens that are decided, by place.
        masked: Masked positions of the block.
        confidence: Of each place of the block the probability of what stands there, or of the
            newest prediction; 1 where the request fixed it.
        masked_counts: Masked positions before each denoiser call of the block.
        generated: Number of tokens in earlier events.
        logits: Logits of the next token, once the context holds all before it; ar only.
        waited: Seconds for which the row has waited for a context call, by the cost model.
        prefix: Kept entries of the prompt's first chunks, where the request takes part.
        reused: Tokens of the prompt whose states were kept from an earlier one.
        admitted_at: When it got the slot.
        prefilled_at: When its prompt was read; 0 until then.
    """

    request: Request
    slot: int
    number: int
    pending: npt.NDArray[np.int32]
    ending: Ending
    mask_id: int
    last_id: int
    stage: Stage = Stage.PREFILLING
    block: npt.NDArray[np.int32] = field(init=False)
    masked: int = field(init=False)
    confidence: npt.NDArray[np.float32] = field(init=False)
    unsent: list[int] = field(default_factory=list)
    unsent_text: str = ""
    details: dict[int, TokenDetail] = field(default_factory=dict)
    masked_counts: list[int] = field(default_factory=list)
    generated: int = 0
    logits: npt.NDArray[np.float32] | None = None
    denoiser_calls: int = 0
    context_calls: int = 0
    waited: float = 0.0
    prefix: list[int] = field(default_factory=list)
    reused: int = 0
    admitted_at: float = 0.0
    prefilled_at: float = 0.0
    cancelled: bool = False

    def __post_init__(self) -> None:
        """Lay out the first block."""
        self.begin_block()

    @property
    def position(self) -> int:
        """Position in the sequence of the first token after all earlier events."""
        return len(self.request.prompt_ids) + self.generated

    @property
    def calls_left(self) -> float:
        """Denoiser calls that the request may still make."""
        most = self.request.max_denoiser_calls
        return most - self.denoiser_calls if most else math.inf

    def begin_block(self) -> None:
        """Lay out the next block: masked, but for what the request's canvas fixes there."""
        size, fixed = self.request.block_size, self.request.canvas
        self.block = np.full(size, self.mask_id, np.int32)
        self.confidence = np.ones(size, np.float32)
        self.details.clear()
        for place, token in enumerate(fixed[self.generated : self.generated + size]):
            if token != FREE:
                self.block[place] = token
                self.details[place] = TokenDetail(0.0, GIVEN)
        self.masked = size - len(self.details)

    def refine(self, refined: Denoised) -> None:
        """Take over a denoise step."""
        if self._is_watched:
            was_masked = self.block == self.mask_id
            self.confidence[was_masked] = refined.confidence[was_masked]
            step = len(self.masked_counts) - 1
            for place in np.flatnonzero(was_masked & (refined.ids != self.mask_id)):
                probability = max(float(refined.confidence[place]), LEAST_PROBABILITY)
                self.details[int(place)] = TokenDetail(math.log(probability), step)
        self.block, self.masked = refined.ids, refined.still_masked

    def snapshot(self) -> BlockEvent:
        """Return the block as it is, for those who watch it."""
        return BlockEvent(
            self.request.request_id,
            (),
            (),
            self.denoiser_calls,
            self.context_calls,
            canvas=tuple(self.block.tolist()),
            canvas_confidence=tuple(self.confidence.tolist()),
            reused_tokens=self.reused,
        )

    def finish_block(self) -> BlockEvent:
        """Return the decided block, and prepare its commit unless the answer ends in it."""
        piece = self.ending.take(self.block.tolist(), is_last=self.calls_left <= 0)
        ids = self.block[: piece.count].tolist()
        details = [self.details[place] for place in range(len(ids))] if self._tells else []
        event = self.event(ids, piece.reason, text=piece.text, details=details)
        if piece.reason is None:
            self.pending, self.stage, self.waited = self.block, Stage.COMMITTING, 0.0
            self.begin_block()
        return event

    def take_token(self, token: int, detail: TokenDetail | None) -> list[BlockEvent]:
        """Take the next token; return an event when a block is full, or at the end."""
        if detail is not None:
            self.details[len(self.unsent)] = detail
        self.last_id = token
        self.unsent.append(token)
        piece = self.ending.take([token], is_last=self.calls_left <= 0)
        self.unsent_text += piece.text or ""
        if piece.reason is None:
            self.pending, self.stage = np.array([token], np.int32), Stage.COMMITTING
            if len(self.unsent) < self.request.block_size:
                return []
        return [self.flush(piece.reason)]

    def flush(self, reason: FinishReason | None = None, error: str | None = None) -> BlockEvent:
        """Return an event of the tokens that were chosen one by one."""
        text = self.unsent_text if self.request.stop else None
        details = list(self.details.values()) if self.unsent and self._tells else []
        event = self.event(self.unsent, reason, error, text, details)
        self.unsent, self.unsent_text = [], ""
        self.details.clear()
        return event

    def give_up(self, reason: FinishReason | None = None, error: str | None = None) -> BlockEvent:
        """Return the last event of an answer that is not complete, with all that was chosen."""
        self.unsent_text += self.ending.rest()
        return self.flush(reason, error)

    def event(
        self,
        ids: Sequence[int] = (),
        finish_reason: FinishReason | None = None,
        error: str | None = None,
        text: str | None = None,
        details: Sequence[TokenDetail] = (),
    ) -> BlockEvent:
        """Make an event and count its tokens as given."""
        self.generated += len(ids)
        counts = tuple(self.masked_counts)
        self.masked_counts.clear()
        if finish_reason is not None or error is not None:
            self.stage = Stage.DONE
        return BlockEvent(
            self.request.request_id,
            tuple(ids),
            counts,
            self.denoiser_calls,
            self.context_calls,
            finish_reason,
            error,
            text,
            tuple(details),
            reused_tokens=self.reused,
            admitted_at=self.admitted_at,
            prefilled_at=self.prefilled_at,
        )

    @property
    def _tells(self) -> bool:
        return self.request.logprobs

    @property
    def _is_watched(self) -> bool:
        """Whether anybody is told how sure a step was."""
        return self.request.logprobs or self.request.stream_mode == "denoise"
