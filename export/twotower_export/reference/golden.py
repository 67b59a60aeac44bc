"""The golden self-test: a fixed prompt, the tokens that must follow, and how many denoiser calls.

Any deployment can run it at start. It catches what users of the reference code met: an answer that
is word salad, one token per denoiser call, and no error anywhere.

The expected answer is computed with the PyTorch towers in float32 and stored in the bundle: by the
export itself where they are small, otherwise beforehand by

    twotower golden CHECKPOINT

which takes hours for a large model, and leaves the answer in the checkpoint's `golden.json`, where
every export finds it. Both stream the towers layer by layer.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from twotower_contract.errors import ConfigError
from twotower_contract.golden import GOLDEN_FILE, read_golden
from twotower_contract.layout import TOWERS, Tower, expected_tensors
from twotower_contract.tokenizer import open_tokenizer
from twotower_export.checkpoint import Checkpoint
from twotower_export.inventory import take_inventory
from twotower_export.progress import Progress, silent
from twotower_export.reference.refinement import Rule, refine

if TYPE_CHECKING:
    from twotower_export.reference.sequence import StreamedTowers

FLOAT32_BOUND: Final = 4_000_000_000
"""Bytes of weights in float32 up to which an export computes the answer."""

PROMPT: Final = (
    "Mia the hen lived by the river. Mia had a blue bell and loved it more than anything."
)
"""Plain enough for any language model, and in the manner of the corpus of the tiny checkpoint."""

MAX_NEW_TOKENS: Final = 48
BLOCK_SIZE: Final = 16
STEPS: Final = 16
THRESHOLD: Final = 0.9


def golden_for(
    checkpoint: Checkpoint, towers: Sequence[Tower] = TOWERS
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Return the golden block of a manifest, or the reason why there is none.

    Args:
        checkpoint: The checkpoint that is exported.
        towers: The towers that are exported; without the denoiser, the answer is autoregressive.

    Returns:
        The request with its answer and None; or None and {reason, request}, with which whoever can
        run the model records the answer.

    Raises:
        TwoTowerError: The checkpoint's `golden.json` is unreadable or another checkpoint's.
    """
    mode = "mask_diffusion" if "denoiser" in towers else "ar"
    recorded = read_golden(checkpoint.path, checkpoint.fingerprint)
    if recorded is not None and recorded["mode"] == mode:
        return recorded, None
    size = 4 * sum(map(math.prod, expected_tensors(checkpoint.config, checkpoint.towers).values()))
    if size > FLOAT32_BOUND:
        reason = (
            f"the towers take {size / 1e9:.0f} GB in float32, too much to answer during an export; "
            "compute it with `twotower golden CHECKPOINT`, which streams them through a few "
            "GB of memory, and export again"
        )
    elif importlib.util.find_spec("torch") is None:
        reason = (
            f"PyTorch is not installed and the checkpoint brings no {GOLDEN_FILE}; "
            "pip install 'twotower[reference]', and export again"
        )
    else:
        try:
            return compute_golden(checkpoint, mode), None
        except FloatingPointError as problem:
            reason = f"{problem}: compare the checkpoint with the one that was released"
    return None, {"reason": reason, "request": _request(checkpoint, mode)}


def compute_golden(
    checkpoint: Checkpoint, mode: str = "mask_diffusion", progress: Progress = silent
) -> dict[str, Any]:
    """Generate the golden answer with the PyTorch towers in float32, one layer at a time.

    Args:
        checkpoint: Of any size.
        mode: `mask_diffusion`, or `ar` where there is no denoiser.
        progress: Called for each layer of each call.

    Returns:
        The request with its answer.

    Raises:
        FloatingPointError: The logits hold NaN or infinity.
    """
    import torch

    from twotower_export.reference.sequence import StreamedTowers

    request = _request(checkpoint, mode)
    prompt = request["prompt_ids"]
    most = _calls(mode)[1]

    def tell(tower: Tower, layer: int, layers: int) -> None:
        read = f"{towers.bytes_read / 1e9:.1f} GB read"
        what = f"call {towers.calls} of at most {most}, {read}; {tower} layer"
        progress(what, layer, layers)

    towers = StreamedTowers(checkpoint, len(prompt) + MAX_NEW_TOKENS, tell)
    if mode == "ar":
        ids, calls = _autoregressive(towers, prompt), 0
    else:
        ids, calls = _mask_diffusion(towers, prompt)
    return request | {
        "output_ids": ids,
        "denoiser_calls": calls,
        "tokens_per_call": round(len(ids) / calls, 4) if calls else None,
        "computed_with": f"torch {torch.__version__.partition('+')[0]}, float32",
    }


def expected_work(checkpoint: Checkpoint, mode: str) -> str:
    """One line on what streaming will read: how many calls, and bytes for each."""
    tensors = {name: (one.dtype, one.shape) for name, one in checkpoint.tensors.items()}
    inventory = take_inventory(checkpoint.config, tensors)
    tower: Tower = "context" if mode == "ar" else "denoiser"
    tokens = 1 if mode == "ar" else BLOCK_SIZE
    each = inventory.bytes_per_step(tower, tokens) / 1e9
    least, most = _calls(mode)
    calls = f"{most} calls" if least == most else f"{least} to {most} calls"
    return (
        f"streaming {checkpoint.path} layer by layer: {calls} that read about {each:.1f} GB of "
        f"weights each, {least * each:.0f} to {most * each:.0f} GB in all"
    )


def _calls(mode: str) -> tuple[int, int]:
    """Return the least and the most calls of both towers that an answer takes."""
    if mode == "ar":
        return MAX_NEW_TOKENS, MAX_NEW_TOKENS
    blocks = MAX_NEW_TOKENS // BLOCK_SIZE  # each is preceded by one call of the context tower
    return 2 * blocks, (STEPS + 1) * blocks


def _request(checkpoint: Checkpoint, mode: str) -> dict[str, Any]:
    """Return the request; greedy, so that there is one right answer."""
    return {
        "prompt_ids": _prompt_ids(checkpoint),
        "mode": mode,
        "max_new_tokens": MAX_NEW_TOKENS,
        "block_size": BLOCK_SIZE,
        "steps": STEPS,
        "threshold": THRESHOLD,
    }


def _prompt_ids(checkpoint: Checkpoint) -> list[int]:
    """Return the prompt's ids; without a tokenizer, ids all over the vocabulary."""
    vocabulary = checkpoint.config.vocab_size
    ids = _encoded(checkpoint.path)
    if ids and max(ids) < vocabulary:
        return ids
    return [7919 * (place + 1) % vocabulary for place in range(16)]


def _encoded(folder: Path) -> list[int]:
    """Return the prompt's ids; none where the tokenizer is missing or cannot be read.

    Any prompt serves a self-test, so a tokenizer that is broken is left for those to refuse who
    need text.
    """
    try:
        import tokenizers

        return list(open_tokenizer(tokenizers, folder).encode(PROMPT).ids)
    except (ConfigError, ImportError):
        return []


def _mask_diffusion(towers: StreamedTowers, prompt: Sequence[int]) -> tuple[list[int], int]:
    """Return new ids and denoiser calls, by the rules of `generate_mask_diffusion`.

    (NVIDIA's `modeling_nemotron_twotower.py`; the context is not extended by the last block.)
    """
    mask_id = towers.config.mask_token_id
    pending = list(prompt)
    ids: list[int] = []
    calls = 0
    while len(ids) < MAX_NEW_TOKENS:
        towers.extend(pending)
        block = np.full(BLOCK_SIZE, mask_id, np.int32)
        for step in range(STEPS):
            if not (block == mask_id).any():
                break
            rule = Rule(threshold=THRESHOLD, steps_left=STEPS - step)
            block = refine(towers.denoise(block), block, rule, mask_id=mask_id).ids
            calls += 1
        pending = block.tolist()
        ids += pending
    return ids, calls


def _autoregressive(towers: StreamedTowers, prompt: Sequence[int]) -> list[int]:
    """Return greedy ids by the rules of `generate_ar` (`modeling_nemotron_twotower.py`)."""
    ids = [int(towers.extend(prompt).argmax())]
    while len(ids) < MAX_NEW_TOKENS:
        ids.append(int(towers.extend(ids[-1:]).argmax()))
    return ids
