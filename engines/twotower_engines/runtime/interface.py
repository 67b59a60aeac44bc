"""The interface of every flavour of engine: a fixed number of slots, and calls over rows of them.

A slot holds the context of one request: keys and values of its attention layers, convolution and
SSM states of its Mamba layers, and how many tokens they stand for. The scheduler decides which
slots take part in a call; the runtime gathers their states into a batch, runs one engine, and puts
the results back. Rows of a call may differ in everything but the engine.

The interface leaves the layout to the flavour: on the CPU a slot's states are arrays of their own;
on a GPU they are rows of resident buffers, and a context call writes the new states to a landing
buffer, from which the rows that took part are copied to their slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from twotower_contract.engine_set import Limits

CLOSED = "these engines are closed; open the engine set again"
"""Message of the RuntimeError of every call after `Runtime.close`."""


@dataclass(frozen=True, slots=True)
class ExtendRow:
    """Tokens to append to a slot's context.

    Attributes:
        slot: Number of the slot.
        ids: (tokens,) int32, from 1 to `limits.max_tokens_per_call` of them.
        logits: Whether the logits of the last token are wanted.
        keep_previous: Keep the Mamba states from before this call for `predict`; one token only.
    """

    slot: int
    ids: npt.NDArray[np.int32]
    logits: bool = False
    keep_previous: bool = False


@dataclass(frozen=True, slots=True)
class DenoiseRow:
    """A block to refine once against a slot's context, which is only read.

    Attributes:
        slot: Number of the slot.
        ids: (block,) int32; the mask token where nothing is decided yet.
        threshold: Confidence threshold; the factor for policy `factor`, the bound in nats for
            `entropy`.
        steps_left: Denoiser calls left for this block, this one included.
        temperature: 0 for greedy predictions.
        policy: One of the numbers in `POLICIES`.
        seed: Seed of the Gumbel noise, from 0 to 2**31 - 1.
    """

    slot: int
    ids: npt.NDArray[np.int32]
    threshold: float
    steps_left: int
    temperature: float = 0.0
    policy: int = 0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class PredictRow:
    """The last known token of a slot, for one autoregressive step of the denoiser tower."""

    slot: int
    id: int


@dataclass(frozen=True, slots=True)
class Denoised:
    """One refined block.

    Attributes:
        ids: (block,) int32.
        still_masked: Positions still masked; -1 where the logits held a NaN.
        confidence: (block,) float32, the probability of each prediction; +inf where nothing was
            masked.
    """

    ids: npt.NDArray[np.int32]
    still_masked: int
    confidence: npt.NDArray[np.float32]


class StateStore(Protocol):
    """Room beside the slots for the states of some prefixes, where the slots' states are.

    Attributes:
        places: Number of prefixes that there is room for.
        place_bytes: Bytes of a place.
    """

    places: int
    place_bytes: int

    def save(self, place: int, slot: int, tokens: int) -> None:
        """Copy a slot's Mamba states, and the keys and values of its last tokens, to a place.

        Args:
            place: Number of the place.
            slot: Number of the slot.
            tokens: Number of tokens, as given to `Runtime.state_store`.
        """

    def restore(self, slot: int, places: Sequence[int]) -> None:
        """Fill an empty slot: the keys and values of all places, the Mamba states of the last."""


class Runtime(Protocol):
    """Loaded engines with their weights bound.

    Attributes:
        limits: Limits that the engines were built for.
        vocab_size: Tokens of the vocabulary.
        mask_token_id: The token that means "not decided yet" inside a block.
        eos_token_ids: The model's own end tokens.
        has_denoiser: False where only the context tower was built.
    """

    limits: Limits
    vocab_size: int
    mask_token_id: int
    eos_token_ids: tuple[int, ...]
    has_denoiser: bool

    def reset(self, slot: int) -> None:
        """Empty a slot: no tokens, zero states."""

    def extend(self, rows: Sequence[ExtendRow]) -> list[npt.NDArray[np.float32] | None]:
        """Append tokens to the context of some slots, in one call of the context engine.

        Args:
            rows: Rows of different slots.

        Returns:
            For each row (vocab,) float32 logits of its last token, or None where not asked for.
        """

    def denoise(self, rows: Sequence[DenoiseRow]) -> list[Denoised]:
        """Refine one block of each row, in one call of the denoiser engine.

        Args:
            rows: Rows of different slots; blocks may differ in size.
        """

    def predict(self, rows: Sequence[PredictRow]) -> npt.NDArray[np.float32]:
        """Run the denoiser tower on each slot's last token, unconditioned, to predict the next.

        The token sees the context before it: attention to all but the last cached token, and the
        Mamba states that the last `extend` kept (`ExtendRow.keep_previous`). NVIDIA's
        `generate_mock_ar`.

        Returns:
            (rows, vocab) float32 logits.
        """

    def state_store(self, size: int, tokens: int) -> StateStore:
        """Return room for prefixes.

        Args:
            size: Bytes that it may take.
            tokens: Tokens whose keys and values a place holds.
        """

    def close(self) -> None:
        """Free the engines, the weights and the states.

        A second close does nothing; any other call after it raises RuntimeError.
        """


class LoadProgress(Protocol):
    """Receives the progress of loading."""

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` of `total` bytes of weights are bound."""

    def prepared(self, done: int, total: int) -> None:
        """Show that `done` of `total` calls are prepared; only for flavours that prepare calls."""
