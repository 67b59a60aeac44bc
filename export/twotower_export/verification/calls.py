"""Random inputs of the shapes that serving has: ragged rows, a chunk, a block, a single token.

Names, shapes and dtypes are those of the graphs' inputs; float inputs are float32. Whatever a graph
is to ignore (tokens past a row's length, keys past its context) is random, too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from twotower_contract.config import ModelConfig
from twotower_contract.layout import Tower
from twotower_contract.policies import POLICIES

Array = npt.NDArray[Any]
Feed = dict[str, Array]

LONGEST: Final = 45
"""Tokens of the longest context; its cache is full but for the room of the call."""

STATE_SCALE: Final = 30.0
"""Magnitude of the random SSM states: those of long contexts are far from one."""

MASKED_SHARE: Final = 0.7

STATES: Final = {"M": ("conv_state", "ssm_state"), "*": ("k_cache", "v_cache"), "E": ()}
"""States that a layer of each kind takes; inputs of both towers' graphs."""

CACHES_NEW: Final = ("k_cache_new", "v_cache_new")

QUERIES: Final = "queries"
"""An output of attention layers that is there for its place in memory only."""

NEW_STATES: Final = {
    "context": {"M": ("conv_state_new", "ssm_state_new"), "*": (*CACHES_NEW, QUERIES), "E": ()},
    "denoiser": {"M": (), "*": (*CACHES_NEW, QUERIES), "E": ()},
}
"""States that a layer of each tower and kind returns; outputs of the graph."""

REFINED: Final = ("new_ids", "confidence", "committed", "still_masked")
RULES: Final = ("threshold", "steps_left", "temperature", "policy", "seed")
"""How each row of the denoiser's graph is refined: inputs of it, and of the refinement inside."""

# Which policy a row of a denoiser call follows. `entropy` is left to the op's own tests: its order
# is not among the outputs, so equal but for rounding could not be told from wrong.
_POLICIES: Final = ("threshold", "quota", "factor", "leftmost")
_THRESHOLDS: Final = {"threshold": 0.5, "factor": 0.8}


@dataclass(frozen=True)
class CallShape:
    """One call of a graph.

    Attributes:
        name: In reports.
        tokens: Width of `ids`.
        lengths: Valid tokens of each row; 0 is an inactive row.
        context_lengths: Tokens of each row before the call.
        conditioned: Denoiser: 1 denoises; 0 is the plain pass of mock-AR, which has one token.
    """

    name: str
    tokens: int
    lengths: tuple[int, ...]
    context_lengths: tuple[int, ...]
    conditioned: tuple[int, ...]


def call_shapes(tower: Tower, chunk: int) -> tuple[CallShape, ...]:
    """Return the calls that one tower is verified with.

    Args:
        chunk: Tokens of a prefill chunk of the context tower.
    """
    rows, past = 4, (0, LONGEST, 3, 17)
    if tower == "context":
        return (
            CallShape("chunk", chunk, (chunk, chunk // 3 + 1), (0, LONGEST), (0, 0)),
            CallShape("block", 16, (16, 7, 0, 16), past, (0,) * rows),
            CallShape("token", 1, (1, 1, 0, 1), past, (0,) * rows),
        )
    return (
        CallShape("block", 16, (16, 7, 0, 16), past, (1,) * rows),
        CallShape("mixed", 8, (8, 1, 1, 5), past, (1, 0, 0, 1)),
        CallShape("token", 1, (1, 1, 0, 1), past, (0,) * rows),
    )


def random_feed(
    config: ModelConfig,
    tower: Tower,
    shape: CallShape,
    seed: int,
    layers: Collection[int] | None = None,
) -> Feed:
    """Every input of a call but the weights.

    Args:
        layers: Layers whose states to make; all by default.
    """
    generator = np.random.default_rng((seed, shape.tokens, len(tower)))
    rows = len(shape.lengths)
    ids = generator.integers(0, config.vocab_size, (rows, shape.tokens), dtype=np.int32)
    feed: Feed = {
        "ids": ids,
        "lengths": np.array(shape.lengths, np.int32),
        "context_lengths": np.array(shape.context_lengths, np.int32),
        **_states(config, rows, LONGEST + shape.tokens, generator, layers),
    }
    if tower == "denoiser":
        ids[generator.random(ids.shape) < MASKED_SHARE] = config.mask_token_id
        feed |= _rules(rows, generator)
        feed["conditioned"] = np.array(shape.conditioned, np.int32)
    return feed


def random_hidden(config: ModelConfig, shape: CallShape, seed: int) -> Array:
    """Hidden states to feed a layer that is verified on its own, (rows, tokens, hidden)."""
    generator = np.random.default_rng((seed, 1))
    size = (len(shape.lengths), shape.tokens, config.hidden_size)
    return generator.standard_normal(size, dtype=np.float32)


def cleared(feed: Mapping[str, Array], outputs: Mapping[str, Array]) -> dict[str, Array]:
    """Zero the outputs that nobody reads: past a row's length, and inactive rows' logits.

    New states are compared everywhere, because an inactive row must keep its own; caches as well,
    but for what a call writes past a row's length, or the denoiser into the room at their end.
    """
    lengths, tokens = feed["lengths"], feed["ids"].shape[1]
    made: dict[str, Array] = {}
    for name, value in outputs.items():
        token_axis = _token_axis(name, value.ndim)
        if token_axis is None:
            made[name] = value
            continue
        if name.endswith(CACHES_NEW):
            place = np.arange(value.shape[token_axis])
            if "conditioned" in feed:
                inside = np.broadcast_to(place < place.size - tokens, (len(lengths), place.size))
            else:
                after = place - feed["context_lengths"][:, None]
                inside = (after < lengths[:, None]) | (after >= tokens)
            inside = inside[:, None, :, None]
        elif value.ndim == 2:  # the logits of a row's last token
            inside = (lengths > 0)[:, None]
        else:
            inside = np.arange(value.shape[token_axis]) < lengths[:, None]
            extra = tuple(axis for axis in range(1, value.ndim) if axis != token_axis)
            inside = np.expand_dims(inside, extra)
        made[name] = np.where(inside, value, np.float32(0))
    return made


def _token_axis(name: str, rank: int) -> int | None:
    """Return the axis of an output that counts tokens; None for one that is compared whole."""
    last = name.rpartition(".")[2]
    if last in CACHES_NEW:
        return 2
    if last in ("hidden", "logits"):
        return min(rank - 1, 1)
    return None


def _states(
    config: ModelConfig,
    rows: int,
    capacity: int,
    generator: np.random.Generator,
    layers: Collection[int] | None,
) -> Feed:
    def draw(*shape: int) -> Array:
        return generator.standard_normal((rows, *shape), dtype=np.float32)

    states: Feed = {}
    for index, kind in enumerate(config.pattern):
        name = f"context.layers.{index}."
        if layers is not None and index not in layers:
            continue
        if kind == "M":
            states[name + "conv_state"] = draw(config.conv_kernel - 1, config.conv_dim)
            sizes = (config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size)
            states[name + "ssm_state"] = np.float32(STATE_SCALE) * draw(*sizes)
        elif kind == "*":
            for part in ("k_cache", "v_cache"):
                sizes = (config.num_key_value_heads, capacity, config.head_dim)
                states[name + part] = draw(*sizes)
    return states


def _rules(rows: int, generator: np.random.Generator) -> Feed:
    """How each row is refined: every policy, greedy and sampled, early and last steps."""
    policies = [_POLICIES[row % len(_POLICIES)] for row in range(rows)]
    return {
        "policy": np.array([POLICIES[policy] for policy in policies], np.int32),
        "threshold": np.array([_THRESHOLDS.get(policy, 0.0) for policy in policies], np.float32),
        "steps_left": np.array([6, 5, 4, 1][:rows], np.int32),
        "temperature": np.array([0.0, 0.7, 0.0, 0.3][:rows], np.float32),
        "seed": generator.integers(0, 2**31 - 1, rows, dtype=np.int32),
    }


def inputs_of(config: ModelConfig, tower: Tower) -> Sequence[str]:
    """Names of all inputs but the weights that a tower's graph must have, in no order."""
    rows = ["ids", "lengths", "context_lengths"]
    if tower == "denoiser":
        rows += ["conditioned", *RULES]
    return rows + _per_layer(config, STATES)


def outputs_of(config: ModelConfig, tower: Tower) -> Sequence[str]:
    """Names of all outputs that a tower's graph must have, in no order."""
    refined = REFINED if tower == "denoiser" else ()
    return ["logits", *refined, *_per_layer(config, NEW_STATES[tower])]


def _per_layer(config: ModelConfig, parts: Mapping[str, Sequence[str]]) -> list[str]:
    return [
        f"context.layers.{index}.{part}"
        for index, kind in enumerate(config.pattern)
        for part in parts[kind]
    ]
