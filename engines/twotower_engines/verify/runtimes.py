"""Compare two loaded engine sets of one model: the outputs of their runtimes, side by side.

Both are driven through `runtime.interface.Runtime`, as the scheduler drives them, so it does not
matter where their states live: a state in the wrong place shows in the call after it.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from twotower_engines.runtime.interface import DenoiseRow, ExtendRow, PredictRow, Runtime
from twotower_engines.verify.differences import Array, Difference, compare_arrays

PROMPTS: Final = (37, 5, 2)
BLOCK: Final = 16


def compare_runtimes(runtime: Runtime, reference: Runtime, precision: str) -> list[Difference]:
    """Run both on random prompts of different lengths, and compare all that they hand out.

    Args:
        runtime: Under test, with no request in flight.

    Raises:
        ValueError: One side lacks an output of the other.
    """
    rows = min(len(PROMPTS), runtime.limits.slots, reference.limits.slots)
    longest = min(runtime.limits.context, reference.limits.context) - BLOCK
    generator = np.random.default_rng(0)
    prompts = [
        generator.integers(0, runtime.vocab_size, max(2, min(size, longest)), dtype=np.int32)
        for size in PROMPTS[:rows]
    ]
    return compare_arrays(_outputs(runtime, prompts), _outputs(reference, prompts), precision)


def _outputs(runtime: Runtime, prompts: list[npt.NDArray[np.int32]]) -> dict[str, Array]:
    """Prefill, one token more with logits, the denoiser's prediction, and a block refined twice."""
    for slot in range(len(prompts)):
        runtime.reset(slot)
    most = runtime.limits.max_tokens_per_call
    for slot, prompt in enumerate(prompts):
        for start in range(0, len(prompt) - 1, most):
            runtime.extend([ExtendRow(slot, prompt[:-1][start : start + most])])
    logits = runtime.extend(
        [
            ExtendRow(slot, prompt[-1:], logits=True, keep_previous=runtime.has_denoiser)
            for slot, prompt in enumerate(prompts)
        ]
    )
    outputs: dict[str, Array] = {
        "context.logits": np.stack([row for row in logits if row is not None])
    }
    if runtime.has_denoiser:
        last = [PredictRow(slot, int(prompt[-1])) for slot, prompt in enumerate(prompts)]
        outputs["denoiser.logits"] = runtime.predict(last).copy()
        size = min(BLOCK, runtime.limits.block_size_max)
        masked = np.full(size, runtime.mask_token_id, np.int32)
        for name, steps in (("first step", 2), ("last step", 1)):
            blocks = [DenoiseRow(slot, masked, 0.5, steps) for slot in range(len(prompts))]
            refined = runtime.denoise(blocks)
            outputs[f"denoiser.new_ids of the {name}"] = np.stack([one.ids for one in refined])
            counts = np.array([one.still_masked for one in refined], np.int32)
            outputs[f"denoiser.still_masked of the {name}"] = counts
    for slot in range(len(prompts)):
        runtime.reset(slot)
    return outputs
