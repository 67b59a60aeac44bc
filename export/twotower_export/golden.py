"""The golden self-test: a fixed prompt, the tokens that must follow, and how many denoiser calls.

Any deployment can run it at start. It catches what users of the reference code met: an answer that
is word salad, one token per denoiser call, and no error anywhere.

The expected answer is computed with the PyTorch towers in float32, where they fit, and stored in
the bundle. A checkpoint may bring it along as `golden.json`, for where PyTorch is missing or the
towers do not fit:

    python -m twotower_export.golden CHECKPOINT
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from twotower_export.checkpoint import Checkpoint, open_checkpoint
from twotower_export.config import ModelConfig, read_json
from twotower_export.errors import ExportError
from twotower_export.layout import TOWERS, Tower, expected_tensors
from twotower_export.refinement import Rule, refine

if TYPE_CHECKING:
    import numpy.typing as npt

GOLDEN_FILE: Final = "golden.json"
FORMAT: Final = "twotower-golden"
FORMAT_VERSION: Final = 1

FLOAT32_BOUND: Final = 4_000_000_000
"""Bytes of weights in float32 up to which the towers are loaded to compute the answer."""

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
    """The golden block of a bundle's manifest, or what is known without an answer.

    Args:
        checkpoint: what is exported.
        towers: which of its towers are; without the denoiser, the answer is autoregressive.

    Returns:
        The request with its answer and None; or None and {reason, request}, with which whoever can
        run the model records the answer.

    Raises:
        ExportError: the checkpoint's `golden.json` is unreadable or another checkpoint's.
    """
    mode = "mask_diffusion" if "denoiser" in towers else "ar"
    recorded = read_golden(checkpoint)
    if recorded is not None and recorded["mode"] == mode:
        return recorded, None
    size = 4 * sum(map(math.prod, expected_tensors(checkpoint.config, checkpoint.towers).values()))
    if size > FLOAT32_BOUND:
        reason = (
            f"the towers take {size / 1e9:.0f} GB in float32, and the answer is computed up to "
            f"{FLOAT32_BOUND / 1e9:.0f} GB only; record it where the engines run, with "
            f"`twotower selftest ENGINES --record CHECKPOINT/{GOLDEN_FILE}`, and export again"
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


def read_golden(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The answer that a checkpoint brings along, or None.

    Raises:
        ExportError: the file is unreadable or another checkpoint's.
    """
    path = checkpoint.path / GOLDEN_FILE
    if not path.is_file():
        return None
    content = read_json(path)
    if content.get("format") != FORMAT or content.get("format_version") != FORMAT_VERSION:
        raise ExportError(f"{path}: is no {FORMAT} of version {FORMAT_VERSION}; delete it")
    if content.get("fingerprint") != checkpoint.fingerprint:
        raise ExportError(
            f"{path}: is of a checkpoint with fingerprint {str(content.get('fingerprint'))[:12]}, "
            f"not {checkpoint.fingerprint[:12]}; delete it, or record it again"
        )
    golden = content.get("golden")
    if not isinstance(golden, dict) or not golden.get("output_ids"):
        raise ExportError(f"{path}: holds no answer; delete it, or record it again")
    return golden


def write_golden(checkpoint: Checkpoint, golden: Mapping[str, Any]) -> Path:
    """Write `golden.json` into a checkpoint's folder; returns its path."""
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "fingerprint": checkpoint.fingerprint,
        "golden": dict(golden),
    }
    path = checkpoint.path / GOLDEN_FILE
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content) + "\n", encoding="utf-8")
    partial.replace(path)
    return path


def compute_golden(checkpoint: Checkpoint, mode: str = "mask_diffusion") -> dict[str, Any]:
    """Generate the golden answer with the PyTorch towers in float32.

    Args:
        checkpoint: small enough for memory.
        mode: `mask_diffusion`, or `ar` where there is no denoiser.

    Raises:
        FloatingPointError: the logits hold NaN or infinity.
    """
    import torch

    request = _request(checkpoint, mode)
    prompt = request["prompt_ids"]
    towers = _LoadedTowers(checkpoint, len(prompt) + MAX_NEW_TOKENS, mode)
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


def _request(checkpoint: Checkpoint, mode: str) -> dict[str, Any]:
    """What is asked; greedy, so that there is one right answer."""
    return {
        "prompt_ids": _prompt_ids(checkpoint),
        "mode": mode,
        "max_new_tokens": MAX_NEW_TOKENS,
        "block_size": BLOCK_SIZE,
        "steps": STEPS,
        "threshold": THRESHOLD,
    }


def _prompt_ids(checkpoint: Checkpoint) -> list[int]:
    """The prompt in the checkpoint's tokens; without a tokenizer, ids all over the vocabulary."""
    vocabulary = checkpoint.config.vocab_size
    ids = _encoded(checkpoint.path / "tokenizer.json")
    if ids and max(ids) < vocabulary:
        return ids
    return [7919 * (place + 1) % vocabulary for place in range(16)]


def _encoded(tokenizer: Path) -> list[int]:
    """The prompt's ids; none where the tokenizer is missing or cannot be read.

    Any prompt serves a self-test, so a tokenizer that is broken is left for those to refuse who
    need text.
    """
    if not tokenizer.is_file() or importlib.util.find_spec("tokenizers") is None:
        return []
    from tokenizers import Tokenizer

    try:
        return list(Tokenizer.from_file(str(tokenizer)).encode(PROMPT).ids)
    except Exception:  # the library raises bare Exception
        return []


class _LoadedTowers:
    """The PyTorch towers and the states of one sequence.

    Args:
        checkpoint: whose.
        capacity: tokens that the sequence can reach.
        mode: `ar` needs no denoiser.
    """

    def __init__(self, checkpoint: Checkpoint, capacity: int, mode: str) -> None:
        import torch

        from twotower_export.towers import empty_states
        from twotower_export.verification.towers import NamedTensors, load_tower

        self.config: ModelConfig = checkpoint.config
        tensors = NamedTensors(checkpoint.path)
        self._context = load_tower(self.config, "context", tensors)
        self._denoiser = None
        if mode != "ar":
            self._denoiser = load_tower(self.config, "denoiser", tensors)
        self._states = empty_states(self.config, 1, capacity, torch.float32)
        self._length = 0

    def extend(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Append tokens to the context; returns the logits of the last, (vocab,)."""
        import torch

        from twotower_export.towers import advance_states

        lengths, before = torch.tensor([len(ids)]), torch.tensor([self._length])
        with torch.no_grad():
            logits, new = self._context(torch.tensor([list(ids)]), lengths, before, self._states)
        self._states = advance_states(self._states, new, lengths, before)
        self._length += len(ids)
        return _finite(logits[0].numpy(), "context")

    def denoise(self, block: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """Logits of a block against the context, (block, vocab)."""
        import torch

        assert self._denoiser is not None
        rows = [torch.tensor([value]) for value in (len(block), self._length, 1)]
        with torch.no_grad():
            logits = self._denoiser(torch.from_numpy(block[None]), *rows, self._states)
        return _finite(logits[0].numpy(), "denoiser")


def _finite(logits: npt.NDArray[np.float32], tower: str) -> npt.NDArray[np.float32]:
    if not np.isfinite(logits).all():
        raise FloatingPointError(f"the {tower} tower's logits hold NaN or infinity")
    return logits


def _mask_diffusion(towers: _LoadedTowers, prompt: Sequence[int]) -> tuple[list[int], int]:
    """New ids and denoiser calls, by the rules of NVIDIA's `generate_mask_diffusion`."""
    mask_id = towers.config.mask_token_id
    towers.extend(prompt)
    ids: list[int] = []
    calls = 0
    while len(ids) < MAX_NEW_TOKENS:
        block = np.full(BLOCK_SIZE, mask_id, np.int32)
        for step in range(STEPS):
            if not (block == mask_id).any():
                break
            rule = Rule(threshold=THRESHOLD, steps_left=STEPS - step)
            block = refine(towers.denoise(block), block, rule, mask_id=mask_id).ids
            calls += 1
        ids += map(int, block)
        towers.extend(block.tolist())
    return ids, calls


def _autoregressive(towers: _LoadedTowers, prompt: Sequence[int]) -> list[int]:
    """New ids, greedily, by the rules of NVIDIA's `generate_ar`."""
    ids = [int(towers.extend(prompt).argmax())]
    while len(ids) < MAX_NEW_TOKENS:
        ids.append(int(towers.extend(ids[-1:]).argmax()))
    return ids


def main(arguments: Sequence[str]) -> int:
    """Write a checkpoint's `golden.json`; returns the exit status."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m twotower_export.golden CHECKPOINT", file=sys.stderr)
        return 2
    try:
        checkpoint = open_checkpoint(arguments[0])
        mode = "mask_diffusion" if "denoiser" in checkpoint.towers else "ar"
        print(write_golden(checkpoint, compute_golden(checkpoint, mode)))
    except ExportError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except FloatingPointError as error:
        print(f"error: {arguments[0]}: {error}; there is no golden answer", file=sys.stderr)
        return ExportError.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
