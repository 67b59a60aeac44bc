"""What can be asked of the engines, and what comes back block by block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from twotower_contract.engine_set import EngineSet
from twotower_contract.policies import POLICIES
from twotower_engines.errors import RequestError
from twotower_engines.runtime.interface import Runtime

__all__ = ["MODES", "BlockEvent", "FinishReason", "Mode", "Request", "RequestLimits"]

Mode = Literal["mask_diffusion", "mock_ar", "ar"]
MODES: tuple[str, ...] = get_args(Mode)
FinishReason = Literal["length", "eos", "cancelled"]

SEED_BOUND = 2**64
FLOAT32_MAX = (2 - 2**-23) * 2.0**127  # temperatures and thresholds are float32 in the graphs
TEMPERATURE_MIN = 2.0**-20  # 1e-6, also as float32; below it logits divided by it overflow
STEPS_BOUND = 2**31  # the graph counts steps in int32
BOUND_POLICIES = ("factor", "entropy")  # their threshold is no probability


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """What a request may ask of one engine set.

    Attributes:
        context: Tokens, prompt and answer together.
        block_size_max: Largest block.
        vocab_size: Ids must be below this.
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
class Request:
    """One prompt to continue. Defaults are NVIDIA's.

    Attributes:
        request_id: Names the request; unique among those in flight.
        prompt_ids: At least one token.
        mode: `mask_diffusion`: both towers, block by block. `ar`: the context tower alone, token by
            token. `mock_ar`: both towers, token by token.
        max_new_tokens: Length of the answer, unless an end token comes before.
        block_size: Tokens that are denoised together; in the other modes, tokens per event.
        steps: Denoiser calls per block at most. Mask diffusion only, like the next two.
        threshold: Confidence above which a position is committed; for policy `factor` the factor,
            for `entropy` the bound in nats.
        policy: What is committed in a step: one of `runtime.POLICIES`.
        temperature: 0 for the most likely tokens; otherwise at least 1e-6.
        top_k: Restrict draws to the k most likely tokens; 0 does not. `ar` and `mock_ar` only.
        top_p: Restrict draws to this probability mass; 1 does not. `ar` and `mock_ar` only.
        seed: Of all that is drawn; it fixes the answer, whatever the request is batched with.
        eos_ids: Tokens that end the answer. Mask diffusion keeps the whole block of such a token.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    mode: Mode = "mask_diffusion"
    max_new_tokens: int = 64
    block_size: int = 16
    steps: int = 16
    threshold: float = 0.9
    policy: str = "threshold"
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    eos_ids: tuple[int, ...] = ()

    def check(self, limits: RequestLimits) -> None:
        """Refuse what cannot be done, before any work.

        Raises:
            RequestError: Naming the value and the remedy.
        """
        self._check_ids(limits)
        self._check_block_size(limits)
        self.check_options()
        self._check_mode(limits)
        self._check_length(limits)

    def check_options(self) -> None:
        """Refuse what no engines can do, whatever the prompt: it needs no engines to be there.

        Raises:
            RequestError: Naming the value and the remedy.
        """
        if self.mode not in MODES:
            raise RequestError(f"mode is {self.mode!r}; it must be one of {', '.join(MODES)}")
        for name, count in (
            ("max_new_tokens", self.max_new_tokens),
            ("block_size", self.block_size),
        ):
            if count < 1:
                raise RequestError(f"{name} is {count}; it must be at least 1")
        self._check_refinement()
        self._check_sampling()

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

    def _check_refinement(self) -> None:
        if not 1 <= self.steps < STEPS_BOUND:
            raise RequestError(f"steps is {self.steps}; it must be at least 1 and below 2**31")
        if self.policy not in POLICIES:
            raise RequestError(
                f"policy is {self.policy!r}; it must be one of {', '.join(POLICIES)}"
            )
        upper = FLOAT32_MAX if self.policy in BOUND_POLICIES else 1.0
        if not 0 < self.threshold <= upper:
            raise RequestError(
                f"threshold is {self.threshold}; with policy {self.policy} it must be more than 0 "
                f"and at most {upper:.3g}"
            )

    def _check_sampling(self) -> None:
        if not 0 <= self.temperature <= FLOAT32_MAX:
            raise RequestError(
                f"temperature is {self.temperature}; it must be 0 (greedy) or more, and at most "
                f"{FLOAT32_MAX:.3g}"
            )
        if 0 < self.temperature < TEMPERATURE_MIN:
            raise RequestError(
                f"temperature is {self.temperature}: use 0 (greedy) or at least 1e-6"
            )
        if self.top_k < 0:
            raise RequestError(f"top_k is {self.top_k}; it must be at least 0, which keeps all")
        if not 0 < self.top_p <= 1:
            raise RequestError(f"top_p is {self.top_p}; it must be more than 0 and at most 1")
        if self.mode == "mask_diffusion" and (self.top_k or self.top_p < 1):
            raise RequestError(
                f"top_k is {self.top_k} and top_p {self.top_p}, but mask_diffusion draws from all "
                "tokens; leave them out, or use mode ar or mock_ar"
            )
        if not 0 <= self.seed < SEED_BOUND:
            raise RequestError(f"seed is {self.seed}; it must be at least 0 and below 2**64")


@dataclass(frozen=True, slots=True)
class BlockEvent:
    """A piece of an answer: one block, or in the autoregressive modes up to as many tokens.

    Attributes:
        request_id: Of the request.
        ids: New tokens; none beyond `max_new_tokens`.
        masked_counts: Positions masked before each denoiser call of the block; empty in the
            autoregressive modes, which mask nothing.
        denoiser_calls: Of this request until now.
        context_calls: Of this request until now, prefill included.
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
        """Whether no more comes for this request."""
        return self.finish_reason is not None or self.error is not None
