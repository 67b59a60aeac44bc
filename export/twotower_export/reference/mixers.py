"""The layers of a tower as PyTorch modules: norm, Mamba-2, attention, mixture of experts.

Each mixer takes and returns its states explicitly. Rounding points are those of the released
bfloat16 model. Sources: NVIDIA's ``modeling_nemotron_h.py``, class named at each mixer, and its
``modeling_nemotron_twotower.py`` where a function is named that begins with ``_denoiser``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, relu, silu, softplus

if TYPE_CHECKING:
    from twotower_contract.config import ModelConfig


def project(x: Tensor, layer: nn.Linear) -> Tensor:
    """Apply a linear layer in the dtype of ``x``, whatever dtype its weights are stored in."""
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return linear(x, layer.weight.to(x.dtype), bias)


def split_dim(x: Tensor, dim: int, sizes: tuple[int, int]) -> Tensor:
    """Split dimension ``dim`` of ``x`` into two (a typed ``Tensor.unflatten``)."""
    split: Tensor = x.unflatten(dim, sizes)  # type: ignore[no-untyped-call]
    return split


class RMSNorm(nn.Module):
    """Root mean square norm: float32 inside, weight included, then back to the input's dtype.

    ``NemotronHRMSNorm``; with groups, the norm inside ``MambaRMSNormGated``.
    """

    def __init__(self, size: int, epsilon: float, groups: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon, self.groups = epsilon, groups

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each of the groups of the last dimension of ``x`` (..., size)."""
        grouped = split_dim(x.float(), -1, (self.groups, -1))
        scale = torch.rsqrt(grouped.square().mean(-1, keepdim=True) + self.epsilon)
        return ((grouped * scale).flatten(-2) * self.weight.float()).to(x.dtype)


def selective_scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor, chunk: int = 16
) -> tuple[Tensor, Tensor]:
    """Run the Mamba-2 recurrence S_t = exp(dt_t a) S_{t-1} + dt_t x_t b_t^T, y_t = S_t c_t.

    Within a chunk the sum over earlier tokens is written out as a masked matrix product; between
    chunks the state is carried. Exact for every chunk size (up to rounding). Dao and Gu,
    "Transformers are SSMs" (2024), section 6; ``mamba_chunk_scan_combined`` on float32, as
    ``_denoiser_block_mamba`` calls it.

    Args:
        x: (batch, length, heads, head_dim), float32.
        dt: (batch, length, heads), float32; 0 leaves the state as it is.
        a: (heads,), float32, negative.
        b: (batch, length, groups, state), float32; consecutive heads share a group.
        c: As ``b``.
        state: (batch, heads, head_dim, state), float32.
        chunk: Tokens per matrix product.

    Returns:
        y as ``x``, and the state after the last token.
    """
    groups = b.shape[2]
    state = split_dim(state, 1, (groups, -1))
    pieces = []
    for start in range(0, x.shape[1], chunk):
        piece = slice(start, start + chunk)
        steps = split_dim(dt[:, piece], 2, (groups, -1))  # (batch, l, groups, heads per group)
        inputs = split_dim(x[:, piece], 2, (groups, -1)) * steps[..., None]
        keys, queries = b[:, piece], c[:, piece]
        total = torch.cumsum(steps * split_dim(a, 0, (groups, -1)), dim=1)
        gap = total[:, :, None] - total[:, None]  # (batch, l, s, groups, heads per group)
        causal = torch.ones(gap.shape[1:3], dtype=torch.bool, device=x.device).tril()
        decay = gap.masked_fill(~causal[:, :, None, None], -math.inf).exp()
        overlap = torch.einsum("blgn,bsgn->blsg", queries, keys)
        y = torch.einsum("blsgr,bsgrp->blgrp", overlap[..., None] * decay, inputs)
        y = y + total.exp()[..., None] * torch.einsum("blgn,bgrpn->blgrp", queries, state)
        to_end = (total[:, -1:] - total).exp()[..., None] * inputs
        state = total[:, -1].exp()[..., None, None] * state
        state = state + torch.einsum("blgrp,blgn->bgrpn", to_end, keys)
        pieces.append(y.flatten(2, 3))
    return torch.cat(pieces, dim=1), state.flatten(1, 2)


class MambaMixer(nn.Module):
    """Mamba-2 mixer with a seeded state (``NemotronHMamba2Mixer``, ``_denoiser_block_mamba``)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.head_dim = config.mamba_num_heads, config.mamba_head_dim
        self.groups, self.state_size = config.n_groups, config.ssm_state_size
        self.inner, self.conv_dim = config.d_inner, config.conv_dim
        self.in_proj = nn.Linear(config.hidden_size, config.projection_width, bias=False)
        self.conv1d = nn.Conv1d(
            self.conv_dim, self.conv_dim, config.conv_kernel, groups=self.conv_dim
        )
        self.dt_bias = nn.Parameter(torch.zeros(self.heads))
        self.A_log = nn.Parameter(torch.zeros(self.heads))
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = RMSNorm(self.inner, config.norm_eps, self.groups)
        self.out_proj = nn.Linear(self.inner, config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, lengths: Tensor, conv_state: Tensor, ssm_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mix ``x`` (batch, length, hidden) and returns it with the two new states."""
        sizes = [self.inner, self.conv_dim, self.heads]
        z, xbc, dt = torch.split(project(x, self.in_proj), sizes, dim=-1)
        convolved, conv_state_new = self._convolve(xbc, lengths, conv_state)
        state_width = self.groups * self.state_size
        sizes = [self.inner, state_width, state_width]
        inputs, b, c = torch.split(convolved.float(), sizes, dim=-1)
        inputs = split_dim(inputs, -1, (self.heads, self.head_dim))
        b, c = (split_dim(part, -1, (self.groups, self.state_size)) for part in (b, c))
        # No clamp: time_step_limit is (0, inf). (transformers' own class clamps at time_step_min.)
        steps = softplus(dt.float() + self.dt_bias.float())
        valid = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        # A step of zero neither decays the state nor adds to it: padding leaves no trace.
        steps = steps * valid[..., None]
        y, ssm_state_new = selective_scan(
            inputs, steps, -self.A_log.float().exp(), b, c, ssm_state.float()
        )
        y = (y + self.D.float()[:, None] * inputs).flatten(-2).to(x.dtype)
        # `MambaRMSNormGated`, norm_before_gate is false: gate first, then normalise each group.
        gated = self.norm(y.float() * silu(z.float())).to(x.dtype)
        return project(gated, self.out_proj), conv_state_new, ssm_state_new

    def _convolve(self, xbc: Tensor, lengths: Tensor, conv_state: Tensor) -> tuple[Tensor, Tensor]:
        """Return the convolution's result as ``xbc`` (batch, length, conv_dim), and the new state.

        ``causal_conv1d_fn`` with ``initial_states``; the state is raw, from before convolution and
        SiLU (``new_conv`` of ``_denoiser_block_mamba``).
        """
        history = torch.cat([conv_state.to(xbc.dtype), xbc], dim=1)
        kernel = self.conv1d.weight.float().squeeze(1)  # (conv_dim, 4); column 3: current token
        convolved = cast(Tensor, self.conv1d.bias).float()
        for tap, weights in enumerate(kernel.unbind(1)):
            convolved = convolved + history[:, tap : tap + xbc.shape[1]].float() * weights
        convolved = silu(convolved).to(xbc.dtype)
        kept = conv_state.shape[1]
        newest = lengths.long()[:, None] + torch.arange(kept, device=xbc.device)
        index = newest[..., None].expand(-1, -1, self.conv_dim)
        return convolved, history.gather(1, index)


class Attention(nn.Module):
    """Grouped-query attention without positions, bias or QK norm (``NemotronHAttention``).

    ``_denoiser_block_attention`` in the denoiser. ``rope_theta`` of config.json is not used there.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.query_width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.kv_width, bias=False)
        self.o_proj = nn.Linear(config.query_width, config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, visible: Tensor, k_cache: Tensor, v_cache: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attend from ``x`` (batch, length, hidden) to the cache followed by ``x`` itself.

        Args:
            x: The normed input.
            visible: (batch, length, capacity + length), bool: which keys a token sees.
            k_cache: (batch, kv_heads, capacity, head_dim).
            v_cache: As ``k_cache``.

        Returns:
            The output as ``x``, and the new keys and values (batch, kv_heads, length, head_dim).
        """
        q, k, v = (
            split_dim(project(x, layer), -1, (-1, self.head_dim)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        keys = torch.cat([k_cache.to(x.dtype), k], dim=2).float()
        values = torch.cat([v_cache.to(x.dtype), v], dim=2).float()
        queries = split_dim(q.float(), 1, (self.kv_heads, -1))  # query heads of a group: neighbours
        scores = queries @ keys[:, :, None].transpose(-1, -2) / math.sqrt(self.head_dim)
        scores = scores.masked_fill(~visible[:, None, None], -math.inf)
        mixed = scores.softmax(-1) @ values[:, :, None]
        mixed = mixed.flatten(1, 2).transpose(1, 2).flatten(2).to(x.dtype)
        return project(mixed, self.o_proj), k, v


class Router(nn.Module):
    """Chooses the experts of each token (``NemotronHTopkRouter``).

    In float32, as in the base model. The release computes it in float64 (revision a203471), which
    chooses the same unless two experts are within float32's rounding of each other at the last
    place; their input was rounded to bfloat16 before. One expert group: no group selection.
    """

    e_score_correction_bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.num_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.num_experts))
        self.chosen, self.scale = config.num_experts_per_tok, config.routed_scaling_factor
        self.normalised = config.norm_topk_prob

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the experts' indices (tokens, chosen) and float32 weights for ``x``."""
        scores = linear(x.float(), self.weight.float()).sigmoid()
        corrected = scores + self.e_score_correction_bias.float()
        # A stable sort, so that the lower index wins a tie everywhere.
        indices = corrected.sort(dim=-1, descending=True, stable=True).indices[:, : self.chosen]
        weights = scores.gather(1, indices)  # the correction selects, but does not weigh
        if self.normalised:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return indices, weights * self.scale


class Expert(nn.Module):
    """down(relu(up(x))^2), the expert of every MoE layer (``NemotronHMLP``, relu2)."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (..., hidden) in its own dtype."""
        return project(relu(project(x, self.up_proj)).square(), self.down_proj)


class SparseExperts(nn.Module):
    """Routed experts plus one shared expert on the same input (``NemotronHMOE``).

    The routed sum is float32, the router weights' dtype, and rounded once.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.gate = Router(config)
        self.experts = nn.ModuleList(
            Expert(hidden, config.moe_intermediate_size) for _ in range(config.num_experts)
        )
        self.shared_experts = Expert(hidden, config.shared_intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        """Mix ``x`` (batch, length, hidden) token by token."""
        tokens = x.flatten(0, 1)
        indices, weights = self.gate(tokens)
        routed = torch.zeros_like(tokens, dtype=torch.float32)
        for number, expert in enumerate(self.experts):
            rows, places = (indices == number).nonzero(as_tuple=True)
            if rows.numel():
                share = weights[rows, places, None]
                routed = routed.index_add(0, rows, expert(tokens[rows]).float() * share)
        return routed.to(x.dtype).view_as(x) + cast(Tensor, self.shared_experts(x))


class Layer(nn.Module):
    """One layer: one norm and one mixer, named by its letter M, * or E (``NemotronHBlock``)."""

    def __init__(self, config: ModelConfig, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        mixers = {"M": MambaMixer, "*": Attention, "E": SparseExperts}
        self.mixer = mixers[kind](config)
