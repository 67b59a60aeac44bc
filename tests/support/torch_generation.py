"""Greedy mask diffusion with the PyTorch towers, many prompts at a time."""

from __future__ import annotations

from pathlib import Path

import torch

from twotower_contract.config import read_config
from twotower_export.reference.mapped import NamedTensors, load_tower
from twotower_export.reference.towers import Towers, advance_states, empty_states

MASK_ID, END_ID = 3, 2


def load_towers(checkpoint: Path) -> Towers:
    """Returns both towers of a checkpoint in float32."""
    config, tensors = read_config(checkpoint / "config.json"), NamedTensors(checkpoint)
    return Towers(config, *(load_tower(config, name, tensors) for name in ("context", "denoiser")))


@torch.no_grad()
def generate(towers: Towers, prompts, max_new_tokens=96, threshold=0.9, steps=16, ablate=None):
    """Returns the new ids of each prompt up to the end token, and tokens per denoiser call.

    ``ablate`` changes what the denoiser is given, not the context tower: "seeds" zeroes the Mamba
    states, "attention" hides the context's keys and values.
    """
    dtype = towers.context.context_lm_head.weight.dtype
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    width = int(lengths.max())
    ids = torch.tensor([list(prompt) + [0] * (width - len(prompt)) for prompt in prompts])
    states = empty_states(towers.config, len(prompts), width + max_new_tokens, dtype)
    _, emitted = towers.context(ids, lengths, torch.zeros_like(lengths), states)
    states = advance_states(states, emitted, lengths, torch.zeros_like(lengths))
    answers = [[] for _ in prompts]
    calls = 0
    active = torch.ones(len(prompts), dtype=torch.bool)
    size = torch.full_like(lengths, 16)
    for _ in range(max_new_tokens // 16):
        block = torch.full((len(prompts), 16), MASK_ID)
        seen, given = lengths, states
        if ablate == "seeds":
            given = {n: t * 0 if "_state" in n else t for n, t in states.items()}
        elif ablate == "attention":
            seen = torch.zeros_like(lengths)
        for step in range(steps):
            masked = block == MASK_ID
            left = masked.sum(-1)
            calls += int(((left > 0) & active).sum())
            if not left.any():
                break
            logits = towers.denoiser(block, size, seen, torch.ones_like(size), given)
            logits[..., MASK_ID] = -torch.inf
            confidence, predicted = logits.softmax(-1).max(-1)
            confidence = confidence.masked_fill(~masked, -1)
            many = (confidence > threshold).sum(-1)
            share = -(-left // (steps - step))
            count = torch.maximum(many.clamp(min=1), share).minimum(left)
            rank = confidence.flip(-1).argsort(dim=-1, descending=True, stable=True)
            rank = rank.argsort(dim=-1).flip(-1)
            block = torch.where((rank < count[:, None]) & masked, predicted, block)
        _, emitted = towers.context(block, size, lengths, states)
        states = advance_states(states, emitted, size, lengths)
        lengths = lengths + size
        for row in active.nonzero().flatten().tolist():
            answers[row] += block[row].tolist()
        active &= ~(block == END_ID).any(-1)
        if not active.any():
            break
    # What fills the block after an end token is no part of an answer, and is not counted.
    ended = [_until_end(answer) for answer in answers]
    return ended, sum(map(len, ended)) / calls


def _until_end(ids):
    return ids[: ids.index(END_ID) + 1] if END_ID in ids else ids
