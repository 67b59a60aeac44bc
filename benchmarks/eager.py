"""The ops as PyTorch code that one would write without kernels: the baseline of `kernels.py`.

Nothing is read back to the host, so every function can be compiled and captured in a graph. The
refinement step is NVIDIA's rule at temperature 0 (policy `threshold`); sampling and the other
policies have no baseline here.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["dense_experts", "mamba_block_step", "refine_block", "router"]


def refine_block(
    logits: Tensor,
    ids: Tensor,
    lengths: Tensor,
    threshold: Tensor,
    steps_left: Tensor,
    mask_id: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One step: logits [B, S, V], ids [B, S], the rest [B]; see `kernel_launches`."""
    position = torch.arange(ids.shape[1], device=ids.device)
    masked = (ids == mask_id) & (position < lengths[:, None])
    x = logits.float().index_fill(2, torch.tensor([mask_id], device=ids.device), -torch.inf)
    log_p = x - torch.logsumexp(x, dim=2, keepdim=True)
    best, prediction = log_p.max(dim=2)
    confidence = torch.where(masked, best.exp(), torch.inf)
    failed = (masked & best.isnan()).any(dim=1)
    usable = masked & ~failed[:, None]

    n = usable.sum(dim=1)
    wanted = (usable & (confidence > threshold[:, None])).sum(dim=1)
    quota = (n + steps_left - 1) // steps_left.clamp(min=1)
    count = torch.minimum(n, torch.maximum(wanted.clamp(min=1), quota))
    count = torch.where(steps_left <= 1, n, count)
    key = torch.where(usable, confidence, -torch.inf).flip(1)  # of equal ones the last goes first
    order = key.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, position.expand_as(order)).flip(1)
    committed = usable & (rank < count[:, None])
    new_ids = torch.where(committed, prediction.to(ids.dtype), ids)
    return new_ids, confidence, committed.int(), torch.where(failed, -1, n - count).int()


def router(
    x: Tensor,
    matrix: Tensor,
    correction: Tensor,
    lengths: Tensor,
    per_token: int,
    normalized: bool,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Indices and weights [B * L, per_token]; see `kernel_launches` for the arguments."""
    scores = torch.sigmoid(torch.nn.functional.linear(x.float().flatten(0, 1), matrix))
    chosen = (scores + correction.float()).topk(per_token).indices
    weights = scores.gather(1, chosen)
    if normalized:
        weights = weights / (weights.sum(dim=1, keepdim=True) + 1e-20)
    is_token = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
    return torch.where(is_token.view(-1, 1), chosen, -1).int(), weights * scaling


def dense_experts(x: Tensor, indices: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Every expert on every token; see `kernel_launches` for the arguments.

    What a graph of stock operators does, and what does not need to know the routing on the host.
    """
    share = torch.zeros(x.shape[0], up.shape[0], device=x.device)
    used = indices >= 0
    share.scatter_add_(1, indices.clamp(min=0).long(), weights * used)
    inner = torch.relu(torch.matmul(x, up.transpose(1, 2))).square()  # [E, n, I]
    each = torch.matmul(inner, down.transpose(1, 2))  # [E, n, h]
    return torch.einsum("enh,ne->nh", each.float(), share).to(x.dtype)


def mamba_block_step(
    projected: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    lengths: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    n_groups: int,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Convolution, scan as one masked product per block, gated norm; see `kernels.mamba`."""
    B, L, _ = projected.shape
    H, P, N = ssm_state.shape[1:]
    d_inner, dtype = H * P, projected.dtype
    z, xbc, dt = projected.split([d_inner, conv_state.shape[2], H], dim=2)
    history = torch.cat([conv_state, xbc], dim=1)
    conv = functional.conv1d(
        history.transpose(1, 2).float(),
        conv_weight.float()[:, None],
        conv_bias.float(),
        groups=conv_weight.shape[0],
    )
    conv = functional.silu(conv).to(dtype).float().transpose(1, 2)
    x, b, c = conv.split([d_inner, n_groups * N, n_groups * N], dim=2)
    x = x.view(B, L, H, P).transpose(1, 2)  # [B, H, L, P]
    heads = H // n_groups
    b = b.view(B, L, n_groups, N).transpose(1, 2).repeat_interleave(heads, dim=1)
    c = c.view(B, L, n_groups, N).transpose(1, 2).repeat_interleave(heads, dim=1)

    time = torch.arange(L, device=projected.device)
    step = functional.softplus(dt.float() + dt_bias.float()) * (time < lengths[:, None])[:, :, None]
    step = step.transpose(1, 2)  # [B, H, L]
    total = (step * -A_log.float().exp()[:, None]).cumsum(dim=2)
    since = total[..., :, None] - total[..., None, :]
    decay = since.masked_fill(time[:, None] < time, -torch.inf).exp()
    moved = x * step[..., None]
    y = (c @ b.transpose(2, 3) * decay) @ moved
    y = y + (c @ ssm_state.transpose(2, 3)) * total.exp()[..., None] + D.float()[:, None, None] * x
    end = total[..., -1:]
    state = ssm_state * end.exp()[..., None]
    state = state + (moved * (end - total).exp()[..., None]).transpose(2, 3) @ b

    gated = y.to(dtype).float().transpose(1, 2).reshape(B, L, d_inner) * functional.silu(z.float())
    groups = gated.view(B, L, n_groups, -1)
    normed = groups * torch.rsqrt(groups.square().mean(dim=-1, keepdim=True) + epsilon)
    y = (normed.view(B, L, d_inner) * norm_weight.float()).to(dtype)
    kept = lengths[:, None] + torch.arange(3, device=lengths.device)
    columns = history.gather(1, kept.long()[:, :, None].expand(-1, -1, history.shape[2]))
    return y, columns, state
