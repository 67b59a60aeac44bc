"""Times one denoiser step of the full-size model, with random weights, on one GPU.

    python -m benchmarks.denoiser_step                    # an H200: 63 GB of weights
    python -m benchmarks.denoiser_step --rows 1 --context 32768
    TRITON_INTERPRET=1 python -m benchmarks.denoiser_step --tiny    # no GPU: one step, not timed

Our kernels for the three ops, PyTorch for everything else, the whole step in one CUDA graph: what
an engine would run, where TensorRT cannot be had. From block ids, the context's keys, values and
states to the next ids. Every layer's tokens are routed as many experts apart as was measured on the
released model, since random weights would route at random. The bound is the bytes that a step must
read, each once, over the bandwidth of a large copy. Beside it stands the roofline of `twotower
plan` for this GPU, which counts operations, launches and the call's overhead on the host too. Every
line is saved as it is measured.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional

from benchmarks import kernels as bench
from benchmarks.kernel_cases import routed
from tests.support.kernel_launches import mamba_block_step, refine_block, sparse_experts
from twotower_contract.config import ModelConfig
from twotower_contract.skus import Sku
from twotower_engines.errors import PlanError
from twotower_engines.kernels.spec import Sizes
from twotower_engines.planning import roofline
from twotower_engines.planning.local_gpu import local_sku
from twotower_engines.planning.model_size import ModelSize
from twotower_engines.planning.routing import distinct_experts
from twotower_engines.planning.sku_lookup import find_sku

PATTERN = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
"""Layers of the released model: Mamba, experts, attention."""


@dataclass(frozen=True)
class Model:
    """Sizes of a denoiser tower beside those of its kernels."""

    sizes: Sizes
    pattern: str
    query_heads: int
    kv_heads: int
    head_dim: int
    shared_inner: int
    scaling: float = 2.5
    time_features: int = 256


FULL = Model(Sizes(), PATTERN, 32, 2, 128, 3712)
TINY = Model(
    Sizes(
        vocab_size=300,
        hidden=32,
        experts=8,
        experts_per_token=2,
        inner=24,
        heads=4,
        head_dim=8,
        state=16,
        groups=2,
    ),
    "ME*ME",
    4,
    2,
    8,
    48,
)


class Denoiser:
    """Random weights and the step over them; tensors stay where they were made, for the graph."""

    def __init__(self, model: Model, device: str) -> None:
        self.model, self.device = model, device
        self.bytes_by_kind: dict[str, int] = {"expert bank": 0, "other": 0}
        s, h = model.sizes, model.sizes.hidden
        self.embedding = self._draw(s.vocab_size, h)
        self.head = self._draw(s.vocab_size, h)
        self.final_norm = torch.ones(h, device=device, dtype=torch.bfloat16)
        self.time = [self._draw(h, model.time_features), self._draw(h, h), self._draw(3 * h, h)]
        self.layers = [(kind, self._layer(kind)) for kind in model.pattern]

    def _draw(self, *shape: int, kind: str = "other") -> Tensor:
        made = torch.empty(shape, device=self.device, dtype=torch.bfloat16)
        made.normal_(0.0, shape[-1] ** -0.5)
        self.bytes_by_kind[kind] += made.numel() * made.element_size()
        return made

    def _layer(self, kind: str) -> dict[str, Tensor]:
        m, s, h = self.model, self.model.sizes, self.model.sizes.hidden
        made = {
            "norm": torch.ones(h, device=self.device, dtype=torch.bfloat16),
            "table": self._draw(3, h),
        }
        if kind == "M":
            d_inner = s.heads * s.head_dim
            conv_dim = d_inner + 2 * s.groups * s.state
            made |= {
                "in_proj": self._draw(d_inner + conv_dim + s.heads, h),
                "conv_weight": self._draw(conv_dim, 4),
                "conv_bias": self._draw(conv_dim),
                "dt_bias": self._draw(s.heads),
                "A_log": self._draw(s.heads).abs_(),
                "D": self._draw(s.heads),
                "gated_norm": self._draw(d_inner),
                "out_proj": self._draw(h, d_inner),
            }
        elif kind == "E":
            made |= {
                "gate": self._draw(s.experts, h).float(),
                "up": self._draw(s.experts, s.inner, h, kind="expert bank"),
                "down": self._draw(s.experts, h, s.inner, kind="expert bank"),
                "shared_up": self._draw(m.shared_inner, h),
                "shared_down": self._draw(h, m.shared_inner),
            }
        else:
            width = m.query_heads * m.head_dim
            made |= {
                "qkv": self._draw(width + 2 * m.kv_heads * m.head_dim, h),
                "o_proj": self._draw(h, width),
            }
        return made

    def context(self, rows: int, tokens: int) -> list[tuple[Tensor, ...]]:
        """Return the states that the context tower would have left, random, per layer."""
        m, s = self.model, self.model.sizes
        conv_dim = s.heads * s.head_dim + 2 * s.groups * s.state
        shapes = {
            "M": [(rows, 3, conv_dim), (rows, s.heads, s.head_dim, s.state)],
            "*": [(rows, m.kv_heads, tokens, m.head_dim)] * 2,
            "E": [],
        }
        made = []
        for kind in m.pattern:
            tensors = [torch.randn(shape, device=self.device) for shape in shapes[kind]]
            kept = 1 if kind == "M" else 2  # the scan's state is float32
            made.append(tuple(t.bfloat16() if i < kept else t for i, t in enumerate(tensors)))
        return made

    def modulation(self, ids: Tensor) -> Tensor:
        """Shift, scale and gate before each layer's table is added; [B, 3, h]."""
        masked = (ids == self.model.sizes.mask_id).float().mean(dim=1)
        half = self.model.time_features // 2
        steps = torch.arange(half, device=self.device)
        angle = (masked.bfloat16() * 1000).float()[:, None]
        angle = angle * torch.exp(steps * (-math.log(10000.0) / half))
        x = torch.cat([angle.cos(), angle.sin()], dim=1).bfloat16()
        x = functional.silu(x @ self.time[0].T) @ self.time[1].T
        return (functional.silu(x) @ self.time[2].T).view(len(ids), 3, -1)

    def step(self, block: dict[str, Tensor], context: list[tuple[Tensor, ...]]) -> Any:
        """New ids, confidence, commits and what is still masked; see `kernels.refine`."""
        ids = block["ids"]
        hidden = functional.embedding(ids, self.embedding)
        time = self.modulation(ids)
        for index, (kind, weights) in enumerate(self.layers):
            shift, scale, gate = (weights["table"] + time)[:, :, None].unbind(1)
            if kind == "E":
                x = self._norm(hidden, weights["norm"]) * (1 + scale) + shift
                mixed = self._experts(x, weights, block["routing"][index])
            else:
                x = self._norm(hidden * (1 + scale) + shift, weights["norm"])
                mixer = self._mamba if kind == "M" else self._attention
                mixed = mixer(x, weights, context[index], block["lengths"])
            hidden = hidden + gate * mixed
        logits = self._norm(hidden, self.final_norm) @ self.head.T
        rows = ("lengths", "threshold", "steps_left", "temperature", "policy", "seed")
        return refine_block(logits, ids, *(block[r] for r in rows), self.model.sizes.mask_id)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(x, (x.shape[-1],), weight, self.model.sizes.epsilon)

    def _mamba(
        self, x: Tensor, w: dict[str, Tensor], states: tuple[Tensor, ...], lengths: Tensor
    ) -> Tensor:
        s = self.model.sizes
        names = ("conv_weight", "conv_bias", "dt_bias", "A_log", "D", "gated_norm")
        given = (x @ w["in_proj"].T, *states, lengths, *(w[name] for name in names))
        y, _, _ = mamba_block_step(*given, s.groups, s.epsilon, states=False)
        return y @ w["out_proj"].T

    def _attention(
        self, x: Tensor, w: dict[str, Tensor], cache: tuple[Tensor, ...], _: Tensor
    ) -> Tensor:
        """Every position sees the whole context and the whole block."""
        m = self.model
        split = (m.query_heads, m.kv_heads, m.kv_heads)
        parts = (x @ w["qkv"].T).split([n * m.head_dim for n in split], dim=2)
        q, k, v = (p.unflatten(2, (-1, m.head_dim)).transpose(1, 2) for p in parts)
        k, v = torch.cat([cache[0], k], dim=2), torch.cat([cache[1], v], dim=2)
        out = functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return out.transpose(1, 2).flatten(2) @ w["o_proj"].T

    def _experts(self, x: Tensor, w: dict[str, Tensor], indices: Tensor) -> Tensor:
        """The router's arithmetic, and then the measured routing in place of its choice."""
        tokens = x.flatten(0, 1)
        scores = torch.sigmoid(tokens.float() @ w["gate"].T)
        own = scores.topk(self.model.sizes.experts_per_token, dim=1).indices
        indices = torch.where(indices >= 0, indices, own.int())
        share = scores.gather(1, indices.long())
        share = share / share.sum(dim=1, keepdim=True) * self.model.scaling
        y = sparse_experts(tokens.contiguous(), indices, share, w["up"], w["down"])
        y = y + torch.relu(tokens @ w["shared_up"].T).square() @ w["shared_down"].T
        return y.view_as(x)


def block_inputs(model: Model, rows: int, device: str) -> dict[str, Any]:
    """A block with every position masked, and a routing per layer."""
    s = model.sizes
    row = torch.ones(rows, device=device)
    used = distinct_experts("denoiser block", rows, s.block, s.experts, s.experts_per_token)
    routing = [
        routed(rows * s.block, used, s, seed=index).to(device) if kind == "E" else None
        for index, kind in enumerate(model.pattern)
    ]
    return {
        "ids": torch.full((rows, s.block), s.mask_id, dtype=torch.int32, device=device),
        "lengths": (row * s.block).int(),
        "threshold": row * 0.8,
        "steps_left": (row * 16).int(),
        "temperature": row * 0,
        "policy": (row * 0).int(),
        "seed": (row * 0).int(),
        "routing": routing,
        "used": used,
    }


def step_bytes(denoiser: Denoiser, context: list[tuple[Tensor, ...]], used: float) -> float:
    """Return the bytes that a step must read: routed experts, other weights, states."""
    share = used / denoiser.model.sizes.experts
    weights = denoiser.bytes_by_kind
    embedding = denoiser.embedding.numel() * denoiser.embedding.element_size()
    states = sum(t.numel() * t.element_size() for layer in context for t in layer)
    return weights["expert bank"] * share + weights["other"] - embedding + states


def roofline_of(model: Model, sku: Sku, rows: int, tokens: int) -> roofline.CallCost:
    """What `twotower plan` says of the same step, by engines with our kernels."""
    s = model.sizes
    config = ModelConfig(
        vocab_size=s.vocab_size,
        hidden_size=s.hidden,
        pattern=model.pattern,
        num_attention_heads=model.query_heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_dim,
        mamba_num_heads=s.heads,
        mamba_head_dim=s.head_dim,
        n_groups=s.groups,
        ssm_state_size=s.state,
        num_experts=s.experts,
        num_experts_per_tok=s.experts_per_token,
        moe_intermediate_size=s.inner,
        shared_intermediate_size=model.shared_inner,
        time_frequency_dim=model.time_features,
        mask_token_id=s.mask_id,
    )
    size = ModelSize(config, ("context", "denoiser"), "random weights")
    machine = roofline.Machine(sku, "tensorrt", "bf16")
    return roofline.denoiser_step(size, machine, rows, tokens, s.block)


def known_gpu() -> Sku | None:
    """The machine's GPU in the table of `twotower plan`, if it is there."""
    try:
        return local_sku()
    except PlanError as error:
        print(f"no roofline: {error}", file=sys.stderr)
        return None


def step_line(
    denoiser: Denoiser, rows: int, tokens: int, bandwidth: float, sku: Sku | None
) -> dict[str, Any]:
    """One size of call with its bound and the plan's roofline; timed from a CUDA graph on a GPU."""
    block = block_inputs(denoiser.model, rows, denoiser.device)
    context = denoiser.context(rows, tokens)
    moved = step_bytes(denoiser, context, block["used"])
    bound = 1e6 * moved / bandwidth
    time = None
    if denoiser.device == "cuda":
        time = bench.microseconds(lambda: denoiser.step(block, context), [()], graph=True)
    plan = roofline_of(denoiser.model, sku, rows, tokens).as_json() if sku else None
    return {
        "rows": rows,
        "context": tokens,
        "experts": block["used"],
        "gigabytes": moved / 1e9,
        "bound_us": bound,
        "step_us": time,
        "of_bound": None if time is None else time / bound,
        "roofline_us": 1e6 * plan["total_seconds"] if plan else None,
        "roofline": plan,
    }


def table_line(line: dict[str, Any]) -> str:
    """One line for people; what was not measured is a dash."""

    def number(value: float | None, width: int) -> str:
        return f"{'-':>{width}}" if value is None else f"{value:{width}.2f}"

    def milliseconds(key: str, width: int) -> str:
        return number(None if line[key] is None else line[key] / 1e3, width)

    return (
        f"{line['rows']:4}  {line['context']:7}  {line['experts']:7.0f}  {line['gigabytes']:5.1f}  "
        f"{milliseconds('bound_us', 8)}  {milliseconds('step_us', 7)}  "
        f"{number(line['of_bound'], 7)}  {milliseconds('roofline_us', 11)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--context", type=int, default=8192, help="tokens before the block")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, one step, not timed")
    parser.add_argument("--output", type=Path, default=bench.RESULTS, help="folder of the results")
    options = parser.parse_args()

    torch.manual_seed(0)
    if options.tiny:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        denoiser = Denoiser(replace(TINY, sizes=replace(TINY.sizes, block=8)), device)
        block = block_inputs(denoiser.model, 2, device)
        new_ids, confidence, _, still = denoiser.step(block, denoiser.context(2, 12))
        print(json.dumps({"new_ids": new_ids.tolist(), "still_masked": still.tolist()}))
        assert confidence.isfinite().all()
        return
    on_gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if on_gpu else "no GPU"
    bandwidth = bench.copy_bandwidth() if on_gpu else bench.H200_COPY
    denoiser = Denoiser(FULL, "cuda" if on_gpu else "meta")
    sku = known_gpu() if on_gpu else find_sku("h200")
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"denoiser-step-{device.lower().replace(' ', '-')}-{today}.json"
    lines: list[dict[str, Any]] = []
    document = {
        "device": device,
        "measured": on_gpu,
        "copy_bytes_per_second": bandwidth,
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "steps": lines,
    }
    absent = "" if on_gpu else " of an H200; without a GPU nothing is measured"
    print(f"{device}, copy {bandwidth / 1e12:.2f} TB/s{absent}")
    print("rows  context  experts     GB  bound ms  step ms  x bound  roofline ms")
    for rows in options.rows:
        lines.append(step_line(denoiser, rows, options.context, bandwidth, sku))
        bench.save(path, json.dumps(document, indent=1) + "\n")
        print(table_line(lines[-1]), flush=True)


if __name__ == "__main__":
    main()
