"""The tensors of a checkpoint, and how the graphs' weight inputs are made of them.

Names and shapes are those of NVIDIA's released checkpoint (`modeling_nemotron_twotower.py` and
`modeling_nemotron_h.py` declare them). A weight input carries the name of its checkpoint tensor;
the experts of a layer are one input, `...mixer.experts.up_proj` [experts, width, hidden].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from twotower_contract.config import ModelConfig

Tower = Literal["context", "denoiser"]
How = Literal["as_is", "stack", "squeeze", "widen"]
Shape = tuple[int, ...]

TOWERS: Final[tuple[Tower, ...]] = ("context", "denoiser")

HEADS: Final[Mapping[Tower, str]] = {
    "context": "context_lm_head.weight",
    "denoiser": "lm_head.weight",  # the bare name is the denoiser's
}

BANKS: Final = ("experts.up_proj", "experts.down_proj")
"""Ends of the names of the inputs that hold a matrix of each expert of a layer."""

FLAT: Final = ".flat"
"""After the name of a bank of down-projections [experts, hidden, width] where an engine takes it as
one matrix [hidden, experts x width]: the matrices side by side."""

ROW_LISTS: Final = {"sampled_rows": "sampled", "entropy_rows": "uncertain", "logits_rows": "shown"}
"""Inputs of a denoiser's engine that list rows of a call, and the names of their lengths: rows that
draw noise, rows whose policy asks for entropy, and rows whose logits are an output."""

BASE_PREFIX: Final = "backbone"
"""Prefix of the single-tower base checkpoint, which has `lm_head.weight` as its only head."""


@dataclass(frozen=True, slots=True)
class WeightSource:
    """How a weight input of a graph is made.

    Attributes:
        how: `as_is`; `stack`: the sources along a new first axis; `squeeze`: drop axis 1, of
            size 1; `widen`: in float32, however it is stored.
        shape: Shape of the input.
        sources: Names of the checkpoint's tensors.
    """

    how: How
    shape: Shape
    sources: tuple[str, ...]


def expected_tensors(
    config: ModelConfig, towers: Sequence[Tower] = TOWERS, *, base: bool = False
) -> dict[str, Shape]:
    """Name and shape of every tensor that a checkpoint with these towers has.

    Args:
        config: The model.
        towers: The towers; the denoiser brings the time conditioning.
        base: Names of the single-tower base checkpoint; only `("context",)` then.
    """
    expected: dict[str, Shape] = {}
    for tower in towers:
        for source in graph_weights(config, tower, base=base).values():
            for name in source.sources:
                expected[name] = source_shape(source)
    return expected


def source_shape(weight: WeightSource) -> Shape:
    """Shape of each of the tensors that make up a weight input."""
    if weight.how == "stack":
        return weight.shape[1:]
    if weight.how == "squeeze":
        return (weight.shape[0], 1, *weight.shape[1:])
    return weight.shape


def graph_weights(
    config: ModelConfig, tower: Tower, *, base: bool = False
) -> dict[str, WeightSource]:
    """Weight inputs of a tower's graph, in the order of the graph.

    The denoiser's graph has its head, the time embedding and the tables of modulation as well.

    Args:
        base: Take the sources' names from the single-tower base checkpoint. Inputs keep theirs.
    """
    if base and tower != "context":
        raise ValueError("the base checkpoint has a context tower only")
    weights = dict(_tower(config, tower))
    if tower == "denoiser":
        weights |= dict(_time_conditioning(config))
    if base:
        return {
            name: replace(weight, sources=tuple(map(base_name, weight.sources)))
            for name, weight in weights.items()
        }
    return weights


def _tower(config: ModelConfig, tower: Tower) -> Iterator[tuple[str, WeightSource]]:
    prefix = f"{tower}_tower"
    h, vocab = config.hidden_size, config.vocab_size
    yield _as_is(f"{prefix}.embeddings.weight", vocab, h)
    mixers = {"M": _mamba, "*": _attention, "E": _experts}
    for index, kind in enumerate(config.pattern):
        yield _as_is(f"{prefix}.layers.{index}.norm.weight", h)
        yield from mixers[kind](config, f"{prefix}.layers.{index}.mixer")
    yield _as_is(f"{prefix}.norm_f.weight", h)
    yield _as_is(HEADS[tower], vocab, h)


def _mamba(config: ModelConfig, mixer: str) -> Iterator[tuple[str, WeightSource]]:
    h, heads = config.hidden_size, config.mamba_num_heads
    yield _as_is(f"{mixer}.in_proj.weight", config.projection_width, h)
    conv = f"{mixer}.conv1d.weight"
    yield conv, WeightSource("squeeze", (config.conv_dim, config.conv_kernel), (conv,))
    yield _as_is(f"{mixer}.conv1d.bias", config.conv_dim)
    yield _as_is(f"{mixer}.dt_bias", heads)
    yield _as_is(f"{mixer}.A_log", heads)
    yield _as_is(f"{mixer}.D", heads)
    yield _as_is(f"{mixer}.norm.weight", config.d_inner)
    yield _as_is(f"{mixer}.out_proj.weight", h, config.d_inner)


def _attention(config: ModelConfig, mixer: str) -> Iterator[tuple[str, WeightSource]]:
    h = config.hidden_size
    yield _as_is(f"{mixer}.q_proj.weight", config.query_width, h)
    yield _as_is(f"{mixer}.k_proj.weight", config.kv_width, h)
    yield _as_is(f"{mixer}.v_proj.weight", config.kv_width, h)
    yield _as_is(f"{mixer}.o_proj.weight", h, config.query_width)


def _experts(config: ModelConfig, mixer: str) -> Iterator[tuple[str, WeightSource]]:
    h, count = config.hidden_size, config.num_experts
    routed, shared = config.moe_intermediate_size, config.shared_intermediate_size
    # the router works in float32: widened once, not at every call
    yield f"{mixer}.gate.weight", WeightSource("widen", (count, h), (f"{mixer}.gate.weight",))
    yield _as_is(f"{mixer}.gate.e_score_correction_bias", count)
    for bank, shape in zip(BANKS, ((routed, h), (h, routed)), strict=True):
        folder, _, name = bank.partition(".")
        sources = tuple(f"{mixer}.{folder}.{e}.{name}.weight" for e in range(count))
        yield f"{mixer}.{bank}", WeightSource("stack", (count, *shape), sources)
    yield _as_is(f"{mixer}.shared_experts.up_proj.weight", shared, h)
    yield _as_is(f"{mixer}.shared_experts.down_proj.weight", h, shared)


def _time_conditioning(config: ModelConfig) -> Iterator[tuple[str, WeightSource]]:
    h = config.hidden_size
    yield _as_is("t_embedder.mlp.0.weight", h, config.time_frequency_dim)
    yield _as_is("t_embedder.mlp.0.bias", h)
    yield _as_is("t_embedder.mlp.2.weight", h, h)
    yield _as_is("t_embedder.mlp.2.bias", h)
    # t_block.0 is a SiLU, without weights; rows of t_block.1 and tables: shift, scale, gate
    yield _as_is("t_block.1.weight", 3 * h, h)
    yield _as_is("t_block.1.bias", 3 * h)
    for index in range(config.num_layers):
        yield _as_is(f"scale_shift_tables.{index}", 3, h)


def _as_is(name: str, *shape: int) -> tuple[str, WeightSource]:
    return name, WeightSource("as_is", shape, (name,))


def base_name(name: str) -> str:
    """Name in the single-tower base checkpoint of a tensor of the context tower."""
    if name == HEADS["context"]:
        return "lm_head.weight"
    return name.replace("context_tower.", f"{BASE_PREFIX}.", 1)
