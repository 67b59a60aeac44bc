"""Layers: norm, mixer and residual, one ONNX function per tower and kind.

Context: x + mixer(norm(x)), the residual in T (NVIDIA's `modeling_nemotron_h.py`, `NemotronHBlock`;
`residual_in_fp32` is false). Denoiser (`modeling_nemotron_twotower.py`,
`_run_denoiser_step_diffusion`): Mamba and attention layers modulate and then norm, MoE layers norm
and then modulate; the mixer's result is gated and added to the hidden state as it was before
modulation. The order is Megatron's, where the former have their norm fused into the projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from twotower_contract.config import ModelConfig
from twotower_export.graph import attention, experts, mamba
from twotower_export.graph.body import Body, inputs
from twotower_export.graph.conditioning import modulation
from twotower_export.graph.norm import rms_norm


@dataclass(frozen=True)
class LayerKind:
    """The meaning of a layer's letter.

    Attributes:
        name: In function names, e.g. `Mamba` in `ContextMambaLayer`.
        states: Inputs that come from the context's cache, without the layer's prefix.
        outputs: Outputs of the mixer beside its result, for the cache.
        row_inputs: Per-row lengths that the mixer reads.
        weights: Weights of the mixer, in order.
        in_place: Outputs that are an input with this call's tokens written into it. The denoiser
            has them as well: it keeps nothing, but attention reads its block from there.
    """

    name: str
    states: tuple[str, ...]
    outputs: tuple[str, ...]
    row_inputs: tuple[str, ...]
    weights: tuple[str, ...]
    in_place: tuple[str, ...] = ()


KINDS = {
    "M": LayerKind(
        "Mamba",
        ("conv_state", "ssm_state"),
        ("conv_state_new", "ssm_state_new"),
        ("lengths",),
        mamba.MIXER_WEIGHTS,
    ),
    "*": LayerKind(
        "Attention",
        ("k_cache", "v_cache"),
        ("k_cache_new", "v_cache_new", "queries"),
        ("lengths", "context_lengths"),
        attention.MIXER_WEIGHTS,
        in_place=("k_cache_new", "v_cache_new", "queries"),
    ),
    "E": LayerKind("Experts", (), (), ("lengths",), experts.MIXER_WEIGHTS),
}
"""Layer kinds by their letter in `hybrid_override_pattern`."""

FLOAT_WEIGHTS = (
    "norm.weight",
    "norm_f.weight",
    "conv1d.weight",
    "conv1d.bias",
    "dt_bias",
    "A_log",
    ".D",
    "gate.weight",
    "gate.e_score_correction_bias",
)
"""Weights that enter float32 arithmetic as they are stored: rounding them to T would lose bits."""


@dataclass(frozen=True)
class LayerFunctions:
    """The layer functions of one tower by letter, and every function that they call."""

    by_kind: dict[str, ir.Function]
    all: list[ir.Function]
    norm: ir.Function


def layer_functions(
    config: ModelConfig, dtype: ir.DataType, *, denoiser: bool, flat_banks: bool
) -> LayerFunctions:
    """Return the functions for one tower.

    Args:
        flat_banks: Whether experts multiply with a whole bank at once; see `sparse_experts`.
    """
    norm = rms_norm(config, dtype)
    step = mamba.mamba_block_step(config, dtype)
    choice = experts.router(config, dtype)
    routed = experts.sparse_experts(config, dtype, is_flat=flat_banks, is_gated=denoiser)
    mixers = {
        "M": mamba.mamba_mixer(config, dtype, step),
        "*": attention.attention_mixer(config, dtype, causal=not denoiser),
        "E": experts.experts_mixer(config, dtype, choice, routed, is_gated=denoiser),
    }
    kinds = [kind for kind in KINDS if kind in config.pattern]
    everything = [norm, step, choice, routed, *(mixers[kind] for kind in kinds)]
    if denoiser:
        modulate = modulation(config, dtype)
        everything.append(modulate)
        layers = {k: _denoiser_layer(k, dtype, norm, mixers[k], modulate) for k in kinds}
    else:
        layers = {k: _context_layer(k, dtype, norm, mixers[k]) for k in kinds}
    unused = [step] * ("M" not in kinds) + [choice, routed] * ("E" not in kinds)
    called = [function for function in everything if function not in unused]
    return LayerFunctions(layers, [*called, *layers.values()], norm)


def _context_layer(
    kind: str, dtype: ir.DataType, norm: ir.Function, mixer: ir.Function
) -> ir.Function:
    letter = KINDS[kind]
    b = Body(dtype)
    args = inputs("hidden", *letter.states, *letter.row_inputs, *weight_suffixes(kind))
    hidden, *states_and_rows = args[: 1 + len(letter.states) + len(letter.row_inputs)]
    norm_weight, *weights = args[1 + len(states_and_rows) :]
    b.begin("norm")
    (x,) = b.call(norm, [hidden, norm_weight])
    b.begin("mixer")
    added = [hidden] if kind == "E" else []
    y, *new = b.call(mixer, [x, *states_and_rows, *added, *weights])
    b.begin("residual")
    hidden_out = y if kind == "E" else b.op.Add(hidden, y)
    outputs = {"hidden_out": hidden_out, **dict(zip(letter.outputs, new, strict=True))}
    doc = f"Context tower, {letter.name} layer: hidden + mixer(norm(hidden))."
    return b.function(f"Context{letter.name}Layer", args, outputs, doc)


def _denoiser_layer(
    kind: str, dtype: ir.DataType, norm: ir.Function, mixer: ir.Function, modulate: ir.Function
) -> ir.Function:
    letter = KINDS[kind]
    b = Body(dtype)
    args = inputs(
        *("hidden", "embedding", "conditioned"),
        *letter.states,
        *letter.row_inputs,
        "table",
        *weight_suffixes(kind),
    )
    hidden, embedding, conditioned, *rest = args
    count = len(letter.states) + len(letter.row_inputs)
    states_and_rows, (table, norm_weight, *weights) = rest[:count], rest[count:]
    b.begin("modulation")
    scale, shift, gate = b.call(modulate, [embedding, table, conditioned])

    def modulated(x: ir.Value) -> ir.Value:
        """`_modulate`: x * (1 + scale) + shift."""
        b.begin("modulated")
        return b.op.Add(b.op.Mul(x, scale), shift)

    def normed(x: ir.Value) -> ir.Value:
        b.begin("norm")
        return b.call(norm, [x, norm_weight])[0]

    x = modulated(normed(hidden)) if kind == "E" else normed(modulated(hidden))
    b.begin("mixer")
    added = [hidden, gate] if kind == "E" else []
    y, *new = b.call(mixer, [x, *states_and_rows, *added, *weights])
    b.begin("residual")
    outputs = {"hidden_out": y if kind == "E" else b.op.Add(hidden, b.op.Mul(gate, y))}
    outputs |= {name: new[letter.outputs.index(name)] for name in letter.in_place}
    order = "modulate(norm(hidden))" if kind == "E" else "norm(modulate(hidden))"
    doc = f"Denoiser tower, {letter.name} layer: hidden + gate * mixer({order})."
    return b.function(f"Denoiser{letter.name}Layer", args, outputs, doc)


def weight_suffixes(kind: str) -> Sequence[str]:
    """Names of a layer's weights after `<tower>.layers.<i>.`, in the order of its function."""
    return ["norm.weight", *(f"mixer.{name}" for name in KINDS[kind].weights)]
