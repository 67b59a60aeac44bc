"""The meaning of each input and output of a graph: the doc strings that a viewer shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from twotower_contract.layout import WeightSource
from twotower_contract.policies import POLICIES
from twotower_contract.quantized import Format

BLOCK_IDS: Final = "Token ids; the mask id where nothing is decided yet."

TENSORS: Final = {
    "ids": "Ids of this call's tokens.",
    "lengths": "Valid tokens of each row in this call; 0 leaves a row as it is.",
    "context_lengths": "Tokens of each row that the states already hold.",
    "conditioned": "1: denoise, with time conditioning; 0: a plain causal pass, for mock-AR.",
    "threshold": "Confidence to commit above; policy factor: the factor; entropy: nats.",
    "steps_left": "Denoiser calls left for the block, this one included.",
    "temperature": "Sampling temperature; 0 takes the most likely token.",
    "policy": ", ".join(f"{number} {name}" for name, number in POLICIES.items()) + ".",
    "seed": "Seed of the Gumbel noise, 0 to 2**31 - 1.",
    "new_ids": "The block after this step.",
    "confidence": "Probability of each prediction at temperature 1; inf where nothing was masked.",
    "committed": "1 where this step decided a token.",
    "still_masked": "Positions of each row still masked; -1: the logits held a NaN.",
}
"""By name, but for logits: each graph says what its are."""

STATES: Final = {
    "conv_state": "Raw x | B | C columns of the last three tokens, newest last.",
    "ssm_state": "Mamba-2 state after the tokens of the context.",
    "k_cache": "Keys of the context's tokens, then room: ignored, but finite.",
    "v_cache": "Values of the context's tokens, then room: ignored, but finite.",
    "conv_state_new": "conv_state after the tokens of this call.",
    "ssm_state_new": "ssm_state after the tokens of this call.",
    "k_cache_new": "k_cache with this call's keys in its room; may be the same memory.",
    "v_cache_new": "v_cache with this call's values in its room; may be the same memory.",
    "queries": "Queries of this call. Nobody reads them.",
}
"""By what follows `context.layers.{i}.`."""

_HOW: Final = {
    "as_is": "as it is stored",
    "stack": "the tensors of all experts, stacked",
    "squeeze": "without its axis of size one",
    "widen": "in float32",
}

FORMS: Final[Mapping[Format, tuple[str, ...]]] = {
    "fp8": ("transposed", "a scale of each matrix"),
    "int4": ("eight codes in a word", "a scale of each group"),
    "nvfp4": ("eight codes in a word", "four E4M3 scales in a word", "a scale of each matrix"),
}
"""Content of the inputs of a quantized weight, in their order."""


def describe(name: str) -> str:
    """Return the meaning of a tensor that is no weight; `name` as in the graph."""
    return TENSORS.get(name) or STATES[name.rpartition(".")[2]]


def describe_weight(source: WeightSource, part: str | None = None) -> str:
    """Where a weight comes from; `part` says which of its inputs this is."""
    count = len(source.sources)
    tensors = source.sources[0] if count == 1 else f"{source.sources[0]} and {count - 1} more"
    return f"Weight: {', '.join(filter(None, (tensors, _HOW[source.how], part)))}."
