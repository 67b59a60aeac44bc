"""Answers and their blocks, as a caller gets them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from twotower_contract.options import FREE


@dataclass(frozen=True, slots=True)
class TokenDetail:
    """One token of an answer, and how sure the model was of it.

    Attributes:
        text: Text that the token adds.
        logprob: Log-probability of the token; in mask diffusion the denoiser's when it was
            committed.
        call: Denoiser call of its block that committed it, from 1; 0 where the request fixed it.
        top: Id and log-probability of the most likely tokens, as many as `top_logprobs` asks for.
    """

    text: str
    logprob: float
    call: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Block:
    """One committed block of an answer, as it arrives.

    Attributes:
        text: Text that this block adds. A character whose bytes are split between two blocks
            belongs to the later one.
        ids: Token ids that this block adds.
        masked_counts: Positions still masked before each denoiser call of this block.
        denoiser_calls: Denoiser calls of the request so far.
        context_calls: Context-tower calls of the request so far, the prompt's included.
        finish_reason: None while more is to come; then `length`, `eos`, `stop`, `calls`,
            `repetition` or `cancelled`.
        seconds: Seconds from the sending of the request to the arrival of this block.
        details: One for each of `ids`, where the request asks for `logprobs`; else empty.
    """

    text: str
    ids: tuple[int, ...]
    masked_counts: tuple[int, ...]
    denoiser_calls: int
    context_calls: int
    finish_reason: str | None
    seconds: float
    details: tuple[TokenDetail, ...] = ()


@dataclass(frozen=True, slots=True)
class Canvas:
    """A block that is not finished, after one of its denoiser calls.

    Attributes:
        ids: Token id of each position; -1 where nothing is decided.
        texts: Text of each position; empty where nothing is decided.
        confidence: Probability of the token at each position; where nothing is decided, of the one
            that the call predicted.
    """

    ids: tuple[int, ...]
    texts: tuple[str, ...]
    confidence: tuple[float, ...]

    @property
    def tokens(self) -> tuple[tuple[str, float] | None, ...]:
        """Text of each position, and the confidence at it; None where nothing is decided."""
        places = zip(self.ids, self.texts, self.confidence, strict=True)
        return tuple(None if token == FREE else (text, sure) for token, text, sure in places)


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer.

    Attributes:
        text: Generated text, without the prompt.
        prompt_ids: Token ids of the prompt, as the server saw them.
        ids: Generated token ids.
        blocks: Blocks in the order in which they were committed.
        finish_reason: `length`, `eos` or `cancelled`.
        denoiser_calls: Number of denoiser calls.
        context_calls: Number of context-tower calls, the prompt's included.
        seconds: Seconds from the sending of the request to the last block.
        request_id: Name of the request on the server.
        reused_tokens: Tokens of the prompt whose states the server kept from an earlier prompt.
    """

    text: str
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    blocks: tuple[Block, ...]
    finish_reason: str
    denoiser_calls: int
    context_calls: int
    seconds: float
    request_id: str
    reused_tokens: int

    @property
    def details(self) -> tuple[TokenDetail, ...]:
        """One for each of `ids`, where the request asks for `logprobs`; else empty."""
        return tuple(one for block in self.blocks for one in block.details)

    @property
    def output_ids(self) -> tuple[int, ...]:
        """Token ids of prompt and answer together, as `twotower run` reports them."""
        return self.prompt_ids + self.ids

    @property
    def tokens_per_denoiser_call(self) -> float | None:
        """Tokens that a denoiser call committed on average; None in `ar` mode."""
        return len(self.ids) / self.denoiser_calls if self.denoiser_calls else None


def details_as_json(details: Sequence[TokenDetail]) -> dict[str, list[Any]]:
    """Return what is told of tokens by the names of the model's outputs, for JSON.

    Left out are those that have nothing to say.
    """
    tops = [pair for one in details for pair in one.top]
    outputs: dict[str, list[Any]] = {
        "logprobs": [one.logprob for one in details],
        "commit_steps": [one.call for one in details],
        "top_ids": [token for token, _ in tops],
        "top_logprobs": [logprob for _, logprob in tops],
        "token_texts": [one.text for one in details],
    }
    return {name: values for name, values in outputs.items() if values}
