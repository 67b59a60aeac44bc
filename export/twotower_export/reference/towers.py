"""Both towers as PyTorch modules: what the graphs are checked against and what training trains.

The modules' parameter names are the checkpoint's tensor names, so loading needs no mapping. Inputs
and outputs carry the names and shapes of the exported graphs' inputs and outputs: ``states`` is a
dictionary with, for every Mamba layer ``i`` of the context tower,

    context.layers.{i}.conv_state   (batch, 3, conv_dim), compute dtype, raw xBC, newest last
    context.layers.{i}.ssm_state    (batch, heads, head_dim, state), float32

and for every attention layer

    context.layers.{i}.k_cache, .v_cache   (batch, kv_heads, capacity, head_dim), compute dtype

Rows are ragged: row ``b`` has ``lengths[b]`` valid tokens in this call and ``context_lengths[b]``
tokens before it; what lies beyond is ignored. Everything is differentiable.

Sources: NVIDIA's ``modeling_nemotron_twotower.py`` (whose functions and classes are named at each
rule), ``modeling_nemotron_h.py`` (names that begin with ``NemotronH``) and Megatron-LM's
``megatron/diffusion/two_tower``. Rounding points are those of the released bfloat16 model, so the
same modules run in bfloat16 and float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from torch.overrides import TorchFunctionMode

from twotower_contract.config import ModelConfig
from twotower_export.reference.mixers import Layer, RMSNorm, project, split_dim

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

States = dict[str, Tensor]

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Call:
    """The inputs that all layers of one forward pass share.

    Attributes:
        lengths: (batch,), valid tokens of this call.
        context_lengths: (batch,), tokens before this call.
        causal: (batch,), bool: whether attention inside the call looks back only.
        modulation: Per layer (batch, 3, hidden): shift, scale, gate; None without conditioning.
    """

    lengths: Tensor
    context_lengths: Tensor
    causal: Tensor
    modulation: list[Tensor] | None = None

    def visible(self, length: int, capacity: int) -> Tensor:
        """Return which keys each token sees, (batch, length, capacity + length).

        All of the context, whatever the tower; of the call itself, the context tower those up to
        the token (``_extend_context_cache``), the denoiser all (``_denoiser_block_attention``).
        """
        device = self.lengths.device
        here = torch.arange(length, device=device)
        past = torch.arange(capacity, device=device) < self.context_lengths[:, None]
        block = (here < self.lengths[:, None])[:, None] & (
            ~self.causal[:, None, None] | (here[None] <= here[:, None])
        )
        # Every token sees itself, so that no row of padding is a softmax of nothing.
        block = block | torch.eye(length, dtype=torch.bool, device=device)
        return torch.cat([past[:, None].expand(-1, length, -1), block], dim=-1)


class Tower(nn.Module):
    """Embeddings, layers and final norm: the part that both towers share (``NemotronHModel``)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, kind) for kind in config.pattern)
        self.norm_f = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(
        self, ids: Tensor, call: Call, states: Mapping[str, Tensor]
    ) -> tuple[Tensor, States]:
        """Return the normed hidden states (batch, length, hidden) and what the layers emit."""
        hidden = embedding(ids.long(), self.embeddings.weight)
        emitted: States = {}
        for index, layer in enumerate(self.layers):
            hidden = run_layer(cast(Layer, layer), index, hidden, call, states, emitted)
        return cast(Tensor, self.norm_f(hidden)), emitted


def run_layer(
    layer: Layer,
    index: int,
    hidden: Tensor,
    call: Call,
    states: Mapping[str, Tensor],
    emitted: States,
) -> Tensor:
    """Return the hidden states after one layer (batch, length, hidden).

    Args:
        index: Its number: of its states, and in ``call.modulation``.
        hidden: (batch, length, hidden).
        emitted: Receives the layer's new states.
    """
    if call.modulation is None:  # `NemotronHBlock`; the residual is not widened
        return hidden + _mix(layer, index, layer.norm(hidden), call, states, emitted)
    shift, scale, gate = (part[:, None] for part in call.modulation[index].unbind(1))
    # `_modulate`, in the order of `_run_denoiser_step_diffusion`: in Megatron the norm of M and *
    # is fused into their input projection and therefore comes after the modulation; the norm of E
    # stands alone and comes before it. The residual is not modulated; the gate is used as it is.
    if layer.kind == "E":
        inputs = layer.norm(hidden) * (1 + scale) + shift
    else:
        inputs = layer.norm(hidden * (1 + scale) + shift)
    return hidden + gate * _mix(layer, index, inputs, call, states, emitted)


def _mix(
    layer: Layer,
    index: int,
    inputs: Tensor,
    call: Call,
    states: Mapping[str, Tensor],
    emitted: States,
) -> Tensor:
    name = f"context.layers.{index}."
    if layer.kind == "E":
        return cast(Tensor, layer.mixer(inputs))
    if layer.kind == "M":
        mixed, conv_state, ssm_state = layer.mixer(
            inputs, call.lengths, states[name + "conv_state"], states[name + "ssm_state"]
        )
        emitted[name + "conv_state_new"] = conv_state
        emitted[name + "ssm_state_new"] = ssm_state
        return cast(Tensor, mixed)
    k_cache, v_cache = states[name + "k_cache"], states[name + "v_cache"]
    visible = call.visible(inputs.shape[1], k_cache.shape[2])
    mixed, emitted[name + "k_new"], emitted[name + "v_new"] = layer.mixer(
        inputs, visible, k_cache, v_cache
    )
    return cast(Tensor, mixed)


class ContextTower(nn.Module):
    """The frozen autoregressive tower and its head.

    ``_build_context_cache`` and ``_extend_context_cache``: prefill and extension are one rule here.
    NVIDIA's prefill runs the last token by itself, to keep the Mamba states before it for mock-AR
    (``mamba_s2``), and scans in bfloat16 where the extension scans in float32.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.context_tower = Tower(config)
        self.context_lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def every_position(
        self, ids: Tensor, lengths: Tensor, context_lengths: Tensor, states: Mapping[str, Tensor]
    ) -> tuple[Tensor, States]:
        """Return the hidden states of every position (batch, length, hidden) and the new states.

        Args:
            ids: (batch, length), integer.
            lengths: (batch,), valid tokens of this call; 0 leaves a row as it is.
            context_lengths: (batch,), tokens that the states already hold.
            states: See the module's description.
        """
        causal = torch.ones_like(lengths, dtype=torch.bool)
        call = Call(lengths, context_lengths, causal)
        return cast(tuple[Tensor, States], self.context_tower(ids, call, states))

    def forward(
        self, ids: Tensor, lengths: Tensor, context_lengths: Tensor, states: Mapping[str, Tensor]
    ) -> tuple[Tensor, States]:
        """Return each row's float32 logits of its last valid token, and the new states.

        The arguments are those of :meth:`every_position`; the logits are (batch, vocabulary).
        """
        hidden, emitted = self.every_position(ids, lengths, context_lengths, states)
        last = (lengths.long() - 1).clamp(min=0)
        newest = hidden[torch.arange(len(last), device=last.device), last]
        # In the model's dtype, then float32: `_forward_tower_with_cache`.
        return project(newest, self.context_lm_head).float(), emitted


class TimeEmbedder(nn.Module):
    """Sinusoid of t x 1000, then two linear layers (``TimestepEmbedder``)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, self.dimension = config.hidden_size, config.time_frequency_dim
        self.mlp = nn.Sequential(
            nn.Linear(self.dimension, hidden), nn.SiLU(), nn.Linear(hidden, hidden)
        )

    def forward(self, t: Tensor, rounding: torch.dtype, dtype: torch.dtype) -> Tensor:
        """Embed ``t`` (batch,), float32, as (batch, hidden) in ``dtype``.

        Args:
            t: Fraction of masked positions.
            rounding: The checkpoint's dtype: t, t x 1000 and the features are rounded to it even
                when the arithmetic is wider, because 15/16 x 1000 is 936 in bfloat16.
            dtype: Compute dtype.
        """
        angle = (t.to(rounding) * 1000).float()
        half = self.dimension // 2
        steps = torch.arange(half, dtype=torch.float32, device=t.device)
        # 10000 is the base of the sinusoid; frequencies and products are float32 in every dtype
        # (`timestep_embedding`), cosines come first.
        # Libraries differ in the last bit of float32's exp, which the cosine of a large angle makes
        # visible: take the correctly rounded one.
        frequencies = (-math.log(10000.0) * steps / half).double().exp().float()
        phases = angle[:, None] * frequencies
        features = torch.cat([phases.cos(), phases.sin()], dim=-1).to(rounding).to(dtype)
        first, activation, second = self.mlp
        inner = activation(project(features, cast(nn.Linear, first)))
        return project(inner, cast(nn.Linear, second))


class Denoiser(nn.Module):
    """The denoiser tower, its time conditioning and its head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, self.mask_id = config.hidden_size, config.mask_token_id
        self.denoiser_tower = Tower(config)
        self.lm_head = nn.Linear(hidden, config.vocab_size, bias=False)
        self.t_embedder = TimeEmbedder(config)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 3 * hidden))
        self.scale_shift_tables = nn.ParameterList(torch.zeros(3, hidden) for _ in config.pattern)
        self.time_rounding = DTYPES[config.dtype]

    def forward(
        self,
        ids: Tensor,
        lengths: Tensor,
        context_lengths: Tensor,
        conditioned: Tensor,
        states: Mapping[str, Tensor],
    ) -> Tensor:
        """Predict the tokens of a block, each at its own position.

        ``_run_denoiser_step_diffusion`` on the context tower's states of the same layers
        (``_build_denoiser_cache_diffusion``), which are only read; nothing of the block is kept.
        Not conditioned: ``_run_denoiser_step_mock_ar``.

        Args:
            ids: (batch, block), integer, the mask id where a token is still unknown.
            lengths: (batch,), valid positions of the block.
            context_lengths: (batch,), tokens before the block.
            conditioned: (batch,); 1 denoises (time conditioning, every position sees every other),
                0 is a plain causal pass (for mock-AR).
            states: See the module's description.

        Returns:
            Logits (batch, block, vocabulary), float32.
        """
        denoising = conditioned.bool()
        modulation = self.modulation(self.masked_fraction(ids, lengths), denoising)
        call = Call(lengths, context_lengths, causal=~denoising, modulation=modulation)
        hidden, _ = self.denoiser_tower(ids, call, states)
        return project(hidden, self.lm_head).float()

    def masked_fraction(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Return each row's fraction of masked positions (batch,), float32.

        Per row, as Megatron does; ``generate_mask_diffusion`` takes one mean over the batch, which
        is the same for one row.
        """
        valid = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        masked = ((ids == self.mask_id) & valid).sum(-1)
        return masked.float() / lengths.clamp(min=1).float()

    def modulation(self, t: Tensor, conditioned: Tensor) -> list[Tensor]:
        """Return each layer's shift, scale and gate, (batch, 3, hidden) (``_get_mod_params``).

        Rows that are not conditioned get 0, 0, 1, which leaves the plain layer exactly.
        """
        dtype = self.denoiser_tower.embeddings.weight.dtype
        embedded = self.t_embedder(t, self.time_rounding, dtype)
        activation, linear = self.t_block
        spread = split_dim(project(activation(embedded), cast(nn.Linear, linear)), -1, (3, -1))
        neutral = torch.tensor([0.0, 0.0, 1.0], dtype=dtype, device=t.device)[:, None]
        return [
            torch.where(conditioned.bool()[:, None, None], table.to(dtype) + spread, neutral)
            for table in self.scale_shift_tables
        ]


@dataclass(frozen=True)
class Towers:
    """Both towers of a checkpoint and its configuration."""

    config: ModelConfig
    context: ContextTower
    denoiser: Denoiser


def on_meta(make: Callable[[], Module]) -> Module:
    """Return a module without memory behind its parameters, to be filled by ``load_state_dict``.

    Initialisers are skipped: on the meta device the random ones import PyTorch's compiler, which
    takes seconds.
    """

    class WithoutInitialisers(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            given = kwargs or {}
            if getattr(func, "__module__", None) == "torch.nn.init":
                return given["tensor"] if "tensor" in given else args[0]
            return func(*args, **given)

    with torch.device("meta"), WithoutInitialisers():
        return make()


def empty_states(config: ModelConfig, batch: int, capacity: int, dtype: torch.dtype) -> States:
    """Return the states before any token: zeros (``FixedHybridCache``).

    The convolution's history has the three columns that a continuation reads, as Megatron's; NVIDIA
    keeps four.

    Args:
        config: The model.
        batch: Rows.
        capacity: Tokens that the K/V caches can hold, at least 1.
        dtype: Compute dtype; the SSM states are float32 in any case.
    """
    states: States = {}
    for index, kind in enumerate(config.pattern):
        name = f"context.layers.{index}."
        if kind == "M":
            states[name + "conv_state"] = torch.zeros(
                batch, config.conv_kernel - 1, config.conv_dim, dtype=dtype
            )
            states[name + "ssm_state"] = torch.zeros(
                batch, config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size
            )
        elif kind == "*":
            shape = (batch, config.num_key_value_heads, capacity, config.head_dim)
            states[name + "k_cache"] = torch.zeros(shape, dtype=dtype)
            states[name + "v_cache"] = torch.zeros(shape, dtype=dtype)
    return states


def advance_states(
    states: Mapping[str, Tensor],
    emitted: Mapping[str, Tensor],
    lengths: Tensor,
    context_lengths: Tensor,
) -> States:
    """Return the states after a call: what the runtime does between two calls.

    ``_extend_context_cache``: Mamba states are replaced, keys and values appended.

    Args:
        states: States that went into the call; unchanged.
        emitted: The states that the context tower returned.
        lengths: (batch,), valid tokens of the call.
        context_lengths: (batch,), tokens before the call; the new keys and values go behind them.
    """
    advanced = dict(states)
    for name, tensor in emitted.items():
        if not name.endswith((".k_new", ".v_new")):
            advanced[name.removesuffix("_new")] = tensor
            continue
        cache_name = name.removesuffix("_new") + "_cache"
        cache = states[cache_name].clone()
        for row, (length, start) in enumerate(
            zip(lengths.tolist(), context_lengths.tolist(), strict=True)
        ):
            cache[row, :, start : start + length] = tensor[row, :, :length]
        advanced[cache_name] = cache
    return advanced
