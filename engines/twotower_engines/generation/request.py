"""Requests to the engines, their checks, and the events that answer them block by block."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from twotower_contract.engine_set import EngineSet
from twotower_contract.options import FREE, MODES, OPTIONS, RequestOptions, last_pinned, refusal
from twotower_engines.artifacts.tokenizer import Tokenizer
from twotower_engines.errors import RequestError
from twotower_engines.runtime.interface import Runtime

__all__ = ["BlockEvent", "FinishReason", "Request", "RequestLimits", "TokenDetail"]

FinishReason = Literal["length", "eos", "stop", "calls", "repetition", "cancelled"]
"""Why an answer ended: its length; an end token; a stop string; its most denoiser calls; a token
that repeats itself; nobody wants it any more."""

GIVEN = -1
"""Step of a token that the request fixed."""


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """Limits of the requests to one engine set.

    Attributes:
        context: Tokens of prompt and answer together.
        block_size_max: Largest block.
        vocab_size: Upper bound of token ids, exclusive.
        modes: Modes that the engines can run.
        end_ids: The model's own end tokens.
        mask_token_id: The token that no canvas may fix; None where it is not known.
        has_text: Whether there is a tokenizer, which stop strings need.
    """

    context: int
    block_size_max: int
    vocab_size: int
    modes: tuple[str, ...] = MODES
    end_ids: tuple[int, ...] = ()
    mask_token_id: int | None = None
    has_text: bool = False

    @classmethod
    def of_engines(cls, engines: EngineSet) -> RequestLimits:
        """Return the limits of an engine set, without loading it."""
        limits, model = engines.build.limits, engines.manifest.model
        return cls(
            limits.context,
            limits.block_size_max,
            model.vocab_size,
            MODES if "denoiser" in engines.build.plans else ("ar",),
            model.eos_token_ids,
            model.mask_token_id,
            Tokenizer.exists(engines.folder),
        )

    @classmethod
    def of_runtime(cls, runtime: Runtime, has_text: bool = False) -> RequestLimits:
        """Return the limits of a loaded runtime."""
        limits = runtime.limits
        return cls(
            limits.context,
            limits.block_size_max,
            runtime.vocab_size,
            MODES if runtime.has_denoiser else ("ar",),
            runtime.eos_token_ids,
            runtime.mask_token_id,
            has_text,
        )


@dataclass(frozen=True, slots=True)
class Request(RequestOptions):
    """One prompt to continue, with the options of `twotower_contract.options.RequestOptions`.

    The seed fixes the answer, whatever the request is batched with. An answer ends with its end
    token: the rest of a denoised block is not sent. In the autoregressive modes, `block_size` is
    the number of tokens per event.

    Attributes:
        request_id: Names the request; unique among those in flight.
        prompt_ids: At least one token.
    """

    request_id: str
    prompt_ids: tuple[int, ...]

    def check(self, limits: RequestLimits) -> None:
        """Refuse a request that cannot be done, before any work.

        Raises:
            RequestError: The message names the value and the remedy.
        """
        self._check_ids(limits)
        self._check_block_size(limits)
        self.check_options()
        self._check_mode(limits)
        self._check_length(limits)
        self._check_canvas(limits)
        if self.stop and not limits.has_text:
            raise RequestError(
                "stop is given, but these engines have no tokenizer to find text with; use eos_ids"
            )

    def check_options(self) -> None:
        """Refuse options that no engines accept, whatever the prompt.

        Raises:
            RequestError: The message names the value and the remedy.
        """
        why = refusal({name: getattr(self, name) for name in OPTIONS})
        if why is not None:
            raise RequestError(why)

    def _check_mode(self, limits: RequestLimits) -> None:
        if self.mode not in limits.modes:
            raise RequestError(
                f"mode {self.mode} needs the denoiser tower, and these engines have none; "
                f"use --mode {limits.modes[0]}, or export and build both towers"
            )

    def _check_ids(self, limits: RequestLimits) -> None:
        if not self.prompt_ids:
            raise RequestError("the prompt is empty; give at least one token")
        lists = (("prompt", self.prompt_ids, 0), ("eos_ids", self.eos_ids, 0))
        for what, ids, low in (*lists, ("canvas", self.canvas, FREE)):
            if min(ids, default=0) < low or max(ids, default=0) >= limits.vocab_size:
                place, value = next(
                    (place, value)
                    for place, value in enumerate(ids)
                    if not low <= value < limits.vocab_size
                )
                raise RequestError(
                    f"{what}: token {value} at place {place} is outside the vocabulary; "
                    f"ids go from 0 to {limits.vocab_size - 1}"
                )

    def _check_block_size(self, limits: RequestLimits) -> None:
        if not 1 <= self.block_size <= limits.block_size_max:
            raise RequestError(
                f"block_size is {self.block_size}; these engines take 1 to {limits.block_size_max}"
            )

    def _check_length(self, limits: RequestLimits) -> None:
        count = len(self.prompt_ids)
        total = count + self.max_new_tokens
        if total > limits.context:
            tokens = "1 token" if count == 1 else f"{count} tokens"
            raise RequestError(
                f"the prompt has {tokens} and max_new_tokens is "
                f"{self.max_new_tokens}, {total} together; these engines hold {limits.context}: "
                f"shorten one of them, or build with --context {total} or more"
            )

    def _check_canvas(self, limits: RequestLimits) -> None:
        """Refuse a canvas with what no answer holds: masks, or text after its end."""
        if limits.mask_token_id in self.canvas:
            raise RequestError(
                f"canvas holds the mask token, {limits.mask_token_id}; write {FREE} where the "
                "model fills"
            )
        ends = () if self.ignore_eos else limits.end_ids
        early = next((one for one in self.canvas[: last_pinned(self.canvas)] if one in ends), None)
        if early is not None:
            raise RequestError(
                f"canvas has the model's end token {early} before its last fixed token; leave it "
                "out, or set ignore_eos"
            )


@dataclass(frozen=True, slots=True)
class TokenDetail:
    """How sure the model was of one token.

    Attributes:
        logprob: Log-probability of the token in the distribution that it was taken from, before
            temperature, top-k and top-p; in mask diffusion the denoiser's when it was committed.
        step: Denoiser call of its block that committed it, from 0; `GIVEN` where the request fixed
            it; 0 in the autoregressive modes.
        top: Id and log-probability of the most likely tokens, as many as asked for.
    """

    logprob: float
    step: int
    top: tuple[tuple[int, float], ...] = ()

    @property
    def confidence(self) -> float:
        """The token's probability."""
        return math.exp(self.logprob)


def token_outputs(details: Sequence[TokenDetail]) -> dict[str, list[Any]]:
    """Return what is told of tokens by the names of the served model's outputs."""
    return {
        "logprobs": [one.logprob for one in details],
        "commit_steps": [one.step + 1 for one in details],
        "top_ids": [token for one in details for token, _ in one.top],
        "top_logprobs": [value for one in details for _, value in one.top],
    }


@dataclass(frozen=True, slots=True)
class BlockEvent:
    """A piece of an answer: one block, or in the autoregressive modes up to as many tokens.

    Attributes:
        request_id: Id of the request.
        ids: New tokens; none beyond `max_new_tokens`.
        masked_counts: Positions masked before each denoiser call of the block; empty in the
            autoregressive modes, which mask nothing.
        denoiser_calls: Denoiser calls of this request until now.
        context_calls: Context calls of this request until now, prefill included.
        finish_reason: Set in the last event of a request, unless it failed.
        error: Why the request failed; set in its last event.
        text: Text that may go out now, of a request with stop strings: up to the one that ended
            it, less what may become one. None for others, whose ids are their text.
        details: One for each of `ids`, where the request asks for logprobs.
        canvas: The block after a step, the mask token where nothing is decided; only in the events
            between blocks that `stream_mode=denoise` asks for.
        canvas_confidence: Of each place of `canvas` the probability of the token there, or of the
            step's prediction where it is still masked; 1 where the request fixed it.
        reused_tokens: Tokens of the prompt whose states were kept from an earlier one.
        retry_after: Seconds after which to try again, where `error` says that there was no room.
        admitted_at: Time of the scheduler's clock at which the request got its slot; 0 where it has
            had none.
        prefilled_at: The same for the end of its prompt's prefill.
    """

    request_id: str
    ids: tuple[int, ...]
    masked_counts: tuple[int, ...]
    denoiser_calls: int
    context_calls: int
    finish_reason: FinishReason | None = None
    error: str | None = None
    text: str | None = None
    details: tuple[TokenDetail, ...] = ()
    canvas: tuple[int, ...] = ()
    canvas_confidence: tuple[float, ...] = ()
    reused_tokens: int = 0
    retry_after: float | None = None
    admitted_at: float = field(default=0.0, compare=False)
    prefilled_at: float = field(default=0.0, compare=False)

    @property
    def is_last(self) -> bool:
        """Whether this is the last event of its request."""
        return self.finish_reason is not None or self.error is not None
