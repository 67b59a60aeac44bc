"""Two loaded engine sets of one model, asked the same: their logits and decisions side by side.

Both are driven through `runtime.Runtime`, as the scheduler drives them, so it does not matter where
their states live. Polygraphy compares; it passes when one side lacks an output, so the names are
compared first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from .runtime import DenoiseRow, ExtendRow, PredictRow, Runtime

__all__ = ["TOLERANCES", "Difference", "compare_runtimes"]

Array = npt.NDArray[Any]

TOLERANCES: Final[Mapping[str, float]] = {"float32": 1e-4, "bf16": 5e-2}
"""Precision of the engines -> how far a logit may be off, as a share of the largest one. bf16 keeps
eight bits: 0.4 % at each rounding, over dozens of layers."""

SAME_IDS: Final[Mapping[str, float]] = {"float32": 1.0, "bf16": 0.5}
"""Precision -> the share of predicted tokens that must be the same: where the best two logits are
close, rounding decides."""

PROMPTS: Final = (37, 5, 2)
BLOCK: Final = 16


@dataclass(frozen=True, slots=True)
class Difference:
    """One output of both.

    Attributes:
        tensor: Which.
        max_abs: Largest absolute difference; of ids, the share that differs.
        max_rel: The same as a share of the largest magnitude.
        passed: Whether that is within the tolerance.
    """

    tensor: str
    max_abs: float
    max_rel: float
    passed: bool

    def __str__(self) -> str:
        return (
            f"{self.tensor} is off by {self.max_abs:.2e} at most, {self.max_rel:.1e} of its "
            "largest value"
        )


def compare_runtimes(
    runtime: Runtime, reference: Runtime, precision: str, seed: int = 0
) -> list[Difference]:
    """Run both on random prompts of different lengths, and compare every output that they give.

    Args:
        runtime: Under test, with no request in flight.
        reference: Of the same model, for example on the CPU.
        precision: Of the engines under test.
        seed: Of the prompts.

    Raises:
        ValueError: One side lacks an output of the other.
    """
    rows = min(len(PROMPTS), runtime.limits.slots, reference.limits.slots)
    longest = min(runtime.limits.context, reference.limits.context) - BLOCK
    generator = np.random.default_rng(seed)
    prompts = [
        generator.integers(0, runtime.vocab_size, max(2, min(size, longest)), dtype=np.int32)
        for size in PROMPTS[:rows]
    ]
    ours, theirs = _outputs(runtime, prompts), _outputs(reference, prompts)
    if ours.keys() != theirs.keys():
        raise ValueError(f"outputs {sorted(ours.keys() ^ theirs.keys())} are on one side only")
    verdicts = _verdicts(ours, theirs, TOLERANCES[precision])
    return [
        _ids_difference(name, ours[name], theirs[name], SAME_IDS[precision])
        if name.endswith("ids")
        else _difference(name, ours[name], theirs[name], verdicts[name])
        for name in ours
    ]


def _outputs(runtime: Runtime, prompts: list[npt.NDArray[np.int32]]) -> dict[str, Array]:
    """Prefill, one token more with logits, the denoiser's prediction, and one refined block."""
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
        blocks = [DenoiseRow(slot, masked, 0.5, steps_left=1) for slot in range(len(prompts))]
        outputs["denoiser.new_ids"] = np.stack([one.ids for one in runtime.denoise(blocks)])
    for slot in range(len(prompts)):
        runtime.reset(slot)
    return outputs


def _verdicts(
    ours: Mapping[str, Array], theirs: Mapping[str, Array], tolerance: float
) -> dict[str, bool]:
    from polygraphy.comparator import Comparator, IterationResult, RunResults, SimpleCompareFunc
    from polygraphy.logger import G_LOGGER

    results = RunResults()
    for name, outputs in (("engines", ours), ("reference", theirs)):
        results.append(
            (name, [IterationResult(outputs=dict(outputs), runtime=0, runner_name=name)])
        )
    limits = {name: tolerance * float(np.abs(value).max()) for name, value in theirs.items()}
    function = SimpleCompareFunc(atol=limits, rtol=tolerance)
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL), np.errstate(all="ignore"):
        (accuracy,) = Comparator.compare_accuracy(results, compare_func=function)
    ((_, (iteration,)),) = accuracy.items()
    return {name: bool(iteration[name]) for name in ours}


def _difference(name: str, ours: Array, theirs: Array, passed: bool) -> Difference:
    off = float(np.abs(ours.astype(np.float64) - theirs).max())
    return Difference(name, off, off / max(float(np.abs(theirs).max()), 1e-12), passed)


def _ids_difference(name: str, ours: Array, theirs: Array, least: float) -> Difference:
    other = float((ours != theirs).mean())
    return Difference(name, other, other, 1 - other >= least)
