"""Requests to the engines, their checks, and the events that answer them block by block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from twotower_contract.engine_set import EngineSet
from twotower_contract.options import MODES, OPTIONS, RequestOptions, refusal
from twotower_engines.errors import RequestError
from twotower_engines.runtime.interface import Runtime

__all__ = ["BlockEvent", "FinishReason", "Request", "RequestLimits"]

FinishReason = Literal["length", "eos", "cancelled"]


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """Limits of the requests to one engine set.

    Attributes:
        context: Tokens of prompt and answer together.
        block_size_max: Largest block.
        vocab_size: Upper bound of token ids, exclusive.
        modes: Modes that the engines can run.
    """

    context: int
    block_size_max: int
    vocab_size: int
    modes: tuple[str, ...] = MODES

    @classmethod
    def of_engines(cls, engines: EngineSet) -> RequestLimits:
        """Return the limits of an engine set, without loading it."""
        limits, modes = engines.build.limits, MODES
        if "denoiser" not in engines.build.plans:
            modes = ("ar",)
        vocab_size = engines.manifest.model.vocab_size
        return cls(limits.context, limits.block_size_max, vocab_size, modes)

    @classmethod
    def of_runtime(cls, runtime: Runtime) -> RequestLimits:
        """Return the limits of a loaded runtime."""
        limits = runtime.limits
        modes = MODES if runtime.has_denoiser else ("ar",)
        return cls(limits.context, limits.block_size_max, runtime.vocab_size, modes)


@dataclass(frozen=True, slots=True)
class Request(RequestOptions):
    """One prompt to continue, with the options of `twotower_contract.options.RequestOptions`.

    The seed fixes the answer, whatever the request is batched with. Mask diffusion keeps the whole
    block of an end token; in the other modes, `block_size` is the number of tokens per event.

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
        for what, ids in (("prompt", self.prompt_ids), ("eos_ids", self.eos_ids)):
            if min(ids, default=0) < 0 or max(ids, default=0) >= limits.vocab_size:
                place, value = next(
                    (place, value)
                    for place, value in enumerate(ids)
                    if not 0 <= value < limits.vocab_size
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
    """

    request_id: str
    ids: tuple[int, ...]
    masked_counts: tuple[int, ...]
    denoiser_calls: int
    context_calls: int
    finish_reason: FinishReason | None = None
    error: str | None = None

    @property
    def is_last(self) -> bool:
        """Whether this is the last event of its request."""
        return self.finish_reason is not None or self.error is not None
