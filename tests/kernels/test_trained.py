"""The trained checkpoint with all four ops as kernels: the golden answer, token for token.

The towers are the PyTorch ones with the kernels, interpreted, in place of what they compute for the
ops; everything between the ops stays.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import twotower_export
from tests.support.kernel_launches import mamba_block_step, refine_block, router, sparse_experts
from tests.support.torch_generation import load_towers
from twotower_export.reference.mixers import MambaMixer, SparseExperts, project
from twotower_export.reference.towers import Towers, advance_states, empty_states

CHECKPOINT = Path(twotower_export.__file__).parent / "data" / "tiny"


CALLS = {"scan": 0, "scan with new states": 0, "experts": 0}
"""How often each op ran as a kernel."""


def mamba_kernel(
    self: MambaMixer, x: Tensor, lengths: Tensor, conv_state: Tensor, ssm_state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    states = not getattr(self, "is_denoisers", False)  # a denoise step wants no new ones
    CALLS["scan with new states" if states else "scan"] += 1
    y, conv_new, ssm_new = mamba_block_step(
        project(x, self.in_proj).contiguous(),
        conv_state.contiguous(),
        ssm_state.contiguous(),
        lengths.int(),
        self.conv1d.weight.squeeze(1).contiguous(),
        self.conv1d.bias,
        self.dt_bias,
        self.A_log,
        self.D,
        self.norm.weight,
        self.groups,
        self.norm.epsilon,
        states=states,
    )
    return project(y, self.out_proj), conv_new, ssm_new


def experts_kernel(self: SparseExperts, x: Tensor) -> Tensor:
    CALLS["experts"] += 1
    tokens = x.flatten(0, 1).contiguous()
    gate = self.gate
    indices, weights = router(
        x.contiguous(),
        gate.weight,
        gate.e_score_correction_bias,
        torch.full((x.shape[0],), x.shape[1], dtype=torch.int32),
        gate.chosen,
        gate.normalised,
        gate.scale,
    )
    up, down = (
        torch.stack([getattr(expert, name).weight for expert in self.experts])
        for name in ("up_proj", "down_proj")
    )
    shared = self.shared_experts(tokens)
    return sparse_experts(tokens, indices, weights, up, down, shared=shared).view_as(x)


@torch.no_grad()
def golden_answer(towers: Towers, golden: dict) -> tuple[list[int], int]:
    """Answer the golden request greedily, block by block; new ids and denoiser calls."""
    prompt, size, steps = golden["prompt_ids"], golden["block_size"], golden["steps"]
    new: list[int] = []
    calls = 0
    states = empty_states(towers.config, 1, len(prompt) + golden["max_new_tokens"], torch.float32)
    length, called = torch.tensor([0]), torch.tensor([prompt])
    while True:
        count = torch.tensor([called.shape[1]])
        _, emitted = towers.context(called, count, length, states)
        states = advance_states(states, emitted, count, length)
        length = length + count
        if len(new) >= golden["max_new_tokens"]:
            return new, calls
        block = torch.full((1, size), towers.config.mask_token_id, dtype=torch.int32)
        for step in range(steps):
            logits = towers.denoiser(block, torch.tensor([size]), length, torch.tensor([1]), states)
            calls += 1
            block, _, _, left = refine_block(
                logits.contiguous(),
                block,
                torch.tensor([size], dtype=torch.int32),
                torch.tensor([golden["threshold"]]),
                torch.tensor([steps - step], dtype=torch.int32),
                torch.zeros(1),
                torch.zeros(1, dtype=torch.int32),
                torch.zeros(1, dtype=torch.int32),
                towers.config.mask_token_id,
            )
            if left.item() == 0:
                break
        new += block[0].tolist()
        called = block


@pytest.mark.slow
def test_the_golden_answer_with_kernels_for_all_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    golden = json.loads((CHECKPOINT / "golden.json").read_text(encoding="utf-8"))["golden"]
    towers = load_towers(CHECKPOINT)
    monkeypatch.setattr(MambaMixer, "forward", mamba_kernel)
    monkeypatch.setattr(SparseExperts, "forward", experts_kernel)
    for module in towers.denoiser.modules():
        if isinstance(module, MambaMixer):
            module.is_denoisers = True
    ids, calls = golden_answer(towers, golden)
    assert ids == golden["output_ids"]
    assert calls == golden["denoiser_calls"]
    mamba, experts = (towers.config.pattern.count(kind) for kind in "ME")
    context_calls = 1 + golden["max_new_tokens"] // golden["block_size"]
    expected = {
        "scan": mamba * calls,
        "scan with new states": mamba * context_calls,
        "experts": experts * (calls + context_calls),
    }
    assert expected == CALLS
