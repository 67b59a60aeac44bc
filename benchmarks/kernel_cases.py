"""What `kernels.py` times: the ops at the released model's sizes, on random data."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import eager
from tests.support import kernel_launches
from twotower_engines.kernels.spec import Sizes
from twotower_engines.planning.routing import distinct_experts

__all__ = ["CASES", "Case", "expert_cases", "routed"]

SIZES = Sizes()
BATCHES = (1, 4, 16, 64)
FEW_ROWS = 4
"""Rows from which on the small ops are bound by bytes; with fewer, by their two launches."""


@dataclass
class Case:
    """One line of the table.

    Attributes:
        op: which op.
        shape: what was run, in words.
        bytes: the least that must be moved.
        inputs: makes one set of inputs.
        kernel: our implementation.
        baseline: PyTorch's, with the same results; None where there is none.
        tolerance: largest relative error of the compared result.
        compared: which result is compared with PyTorch's.
        most_of_bound: the time to reach, as a multiple of the bound; None where none is set.
        least_speedup: over eager PyTorch.
    """

    op: str
    shape: str
    bytes: float
    inputs: Callable[[], tuple[Any, ...]]
    kernel: Callable[..., Any]
    baseline: Callable[..., Any] | None
    tolerance: float
    compared: int = 0
    most_of_bound: float | None = None
    least_speedup: float | None = None


def refine_cases(device: str) -> list[Case]:
    """A block's logits, all positions masked: the first and dearest step of a block."""
    S, V = SIZES.block, SIZES.vocab_size

    def make(B: int, dtype: torch.dtype, heat: float) -> Callable[[], tuple[Any, ...]]:
        def inputs() -> tuple[Any, ...]:
            rows = torch.ones(B, device=device)
            return (
                torch.randn(B, S, V, device=device).mul_(4).to(dtype),
                torch.full((B, S), SIZES.mask_id, dtype=torch.int32, device=device),
                (rows * S).int(),
                rows * 0.8,
                (rows * 8).int(),
                rows * heat,
                rows.int() * 0,
                torch.arange(B, dtype=torch.int32, device=device),
                SIZES.mask_id,
            )

        return inputs

    def baseline(*args: Any) -> Any:
        logits, ids, lengths, threshold, steps_left, _, _, _, mask_id = args
        return eager.refine_block(logits, ids, lengths, threshold, steps_left, mask_id)

    cases = []
    for B, (dtype, width) in itertools.product(BATCHES, ((torch.bfloat16, 2), (torch.float32, 4))):
        name = f"B={B} S={S} V={V} {'bf16' if width == 2 else 'fp32'}"
        size = B * S * V * width
        kernel = kernel_launches.refine_block
        # Confidences are compared: of equal logits, bf16 has many, PyTorch may predict any.
        cases.append(
            Case(
                "RefineBlock",
                name,
                size,
                make(B, dtype, 0.0),
                kernel,
                baseline,
                tolerance=1e-5,
                compared=1,
                most_of_bound=1.5 if B >= FEW_ROWS else None,
                least_speedup=10,
            )
        )
        if width == 2:
            sampled = make(B, dtype, 1.0)
            cases.append(
                Case(
                    "RefineBlock",
                    f"{name} sampled",
                    size,
                    sampled,
                    kernel,
                    None,
                    tolerance=0.0,
                    most_of_bound=1.5 if B >= FEW_ROWS else None,
                )
            )
    return cases


def expert_cases(device: str) -> list[Case]:
    """Blocks of 16 tokens, routed so that as many experts are used as was measured."""
    K, E, h, inner = SIZES.experts_per_token, SIZES.experts, SIZES.hidden, SIZES.inner
    shared: list[tuple[Tensor, ...]] = []  # one pair of weights for all cases

    def banks() -> tuple[Tensor, ...]:
        if not shared:
            shapes = ((E, inner, h), (E, h, inner))
            made = (torch.empty(s, dtype=torch.bfloat16, device=device) for s in shapes)
            shared.append(tuple(bank.normal_(0, bank.shape[2] ** -0.5) for bank in made))
        return shared[0]

    def make(tokens: int, used: float) -> Callable[[], tuple[Any, ...]]:
        def inputs() -> tuple[Any, ...]:
            x = torch.randn(tokens, h, device=device).bfloat16()
            weights = torch.rand(tokens, K, device=device)
            return (x, routed(tokens, used, SIZES).to(device), weights, *banks())

        return inputs

    cases = []
    for rows in (*BATCHES, 256):
        tokens = rows * SIZES.block
        used = distinct_experts("denoiser block", rows, SIZES.block, E, K)
        size = used * 2 * h * inner * 2 + tokens * h * 4
        cases.append(
            Case(
                "SparseExperts",
                f"{tokens} tokens, {used:.0f} experts",
                size,
                make(tokens, used),
                kernel_launches.sparse_experts,
                eager.dense_experts,
                tolerance=2e-2,
                most_of_bound=1.4 if rows == 1 else None,
                least_speedup=2.5 if rows == 1 else 1.0,
            )
        )
    return cases


BITS = {"fp8": 8.0, "int4": 4.25, "nvfp4": 4.5}
"""Bits of a weight with its share of the scales."""


def router_cases(device: str) -> list[Case]:
    """Scores of a block's tokens, and the choice of their experts."""
    E, h, K = SIZES.experts, SIZES.hidden, SIZES.experts_per_token

    def make(B: int) -> Callable[[], tuple[Any, ...]]:
        def inputs() -> tuple[Any, ...]:
            return (
                torch.randn(B, SIZES.block, h, device=device).bfloat16(),
                torch.randn(E, h, device=device) * h**-0.5,
                torch.randn(E, device=device).bfloat16(),
                torch.full((B,), SIZES.block, dtype=torch.int32, device=device),
                K,
                True,
                SIZES.scaling,
            )

        return inputs

    return [
        Case(
            "Router",
            f"{B * SIZES.block} tokens",
            E * h * 4 + B * SIZES.block * (h * 2 + K * 8),
            make(B),
            kernel_launches.router,
            eager.router,
            tolerance=1e-4,  # more only where an expert is another
            compared=1,
        )
        for B in BATCHES
    ]


def code_cases(device: str) -> list[Case]:
    """The same with weights of 8 and 4 bits; `gpu_checks` compares their numbers."""
    K, E, h, inner = SIZES.experts_per_token, SIZES.experts, SIZES.hidden, SIZES.inner

    def bank(form: str, features: int, depth: int) -> kernel_launches.Bank:
        def codes(*shape: int) -> Tensor:
            return torch.randint(0, 0x70, shape, dtype=torch.uint8, device=device)

        if form == "fp8":
            scale = torch.rand(E, device=device).bfloat16()
            return kernel_launches.Bank(codes(E, depth, features), form, scale)
        both = codes(E, features, depth // 2)
        if form == "int4":
            scale = torch.rand(E, features, depth // 64, device=device).bfloat16()
            return kernel_launches.Bank(both, form, scale)
        scales = codes(E, features, depth // 16), torch.rand(E, device=device)
        return kernel_launches.Bank(both, form, *scales)

    def make(form: str, tokens: int, used: float) -> Callable[[], tuple[Any, ...]]:
        shared: list[kernel_launches.Bank] = []

        def inputs() -> tuple[Any, ...]:
            if not shared:
                shared.extend((bank(form, inner, h), bank(form, h, inner)))
            x = torch.randn(tokens, h, device=device).bfloat16()
            weights = torch.rand(tokens, K, device=device)
            return (x, routed(tokens, used, SIZES).to(device), weights, *shared)

        return inputs

    cases = []
    for (form, bits), rows in itertools.product(BITS.items(), (1, 16)):
        tokens = rows * SIZES.block
        used = distinct_experts("denoiser block", rows, SIZES.block, E, K)
        cases.append(
            Case(
                f"SparseExperts{form.upper()}",
                f"{tokens} tokens, {used:.0f} experts",
                used * 2 * h * inner * bits / 8 + tokens * h * 4,
                make(form, tokens, used),
                kernel_launches.sparse_experts,
                None,
                tolerance=0.0,
            )
        )
    return cases


def routed(tokens: int, used: float, sizes: Sizes, seed: int = 0) -> Tensor:
    """Indices [tokens, K] whose number of distinct experts is about `used`.

    Experts are popular by a power law, whose exponent is sought.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = -torch.log(-torch.log(torch.rand(tokens, sizes.experts, generator=generator)))
    popularity = -torch.log(torch.arange(1, sizes.experts + 1).float())
    popularity = popularity[torch.randperm(sizes.experts, generator=generator)]
    low, high = 0.0, 8.0
    for _ in range(30):
        middle = (low + high) / 2
        chosen = (noise + middle * popularity).topk(sizes.experts_per_token).indices
        low, high = (middle, high) if chosen.unique().numel() > used else (low, middle)
    return chosen.int()


def mamba_cases(device: str) -> list[Case]:
    """Denoise steps, and context calls, which return new states."""
    H, P, N, G = SIZES.heads, SIZES.head_dim, SIZES.state, SIZES.groups
    d_inner, conv_dim = H * P, H * P + 2 * G * N

    def make(B: int, L: int) -> Callable[[], tuple[Any, ...]]:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, device=device).bfloat16()

        def inputs() -> tuple[Any, ...]:
            return (
                normal(B, L, d_inner + conv_dim + H),
                normal(B, 3, conv_dim),
                torch.randn(B, H, P, N, device=device),
                torch.full((B,), L, dtype=torch.int32, device=device),
                normal(conv_dim, 4),
                normal(conv_dim),
                normal(H),
                torch.linspace(0.0, 2.7, H, device=device).bfloat16(),
                normal(H),
                normal(d_inner),
                G,
                SIZES.epsilon,
            )

        return inputs

    cases = []
    for B, (L, states) in itertools.product(
        BATCHES, ((16, False), (16, True), (256, True), (1024, True))
    ):
        if B * L > 4096:
            continue
        tokens = B * L * (d_inner + conv_dim + H + d_inner) * 2
        state = B * (H * P * N * 4 + 3 * conv_dim * 2) * (2 if states else 1)

        def kernel(*args: Any, states: bool = states) -> Any:
            return kernel_launches.mamba_block_step(*args, states=states)

        name = f"B={B} L={L}{' with new states' if states else ''}"
        cases.append(
            Case(
                "MambaBlockStep",
                name,
                tokens + state,
                make(B, L),
                kernel,
                eager.mamba_block_step,
                tolerance=2e-2,
                most_of_bound=2.0 if B >= FEW_ROWS else None,
                least_speedup=5.0,
            )
        )
    return cases


CASES = {
    "refine": refine_cases,
    "experts": expert_cases,
    "router": router_cases,
    "codes": code_cases,
    "mamba": mamba_cases,
}
