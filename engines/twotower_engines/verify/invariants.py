"""Checks that flag an implausible answer when no reference is known.

Each of these holds for correct engines of any trained model and a prompt of plain text, and each
catches a failure that raises no error:

- two prompts have two answers, or the context is not seen;
- an answer is not one token over and over;
- it holds no mask token;
- several tokens are committed per denoiser call, at least once (users of the reference code met
  exactly one per call, with text that was word salad);
- the context tower finds the denoiser's answer likely. Both were trained on the same text. Salad is
  less likely to it than tokens drawn blindly; a right answer is as likely as text.

They are necessary, not sufficient: engines that compute something slightly wrong pass. Only a
golden answer shows those.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from twotower_engines.errors import GenerationError
from twotower_engines.generation.generator import Result, result_of
from twotower_engines.generation.request import Request, RequestLimits
from twotower_engines.generation.scheduler import Scheduler
from twotower_engines.runtime.interface import ExtendRow, Runtime

LIKELY = 0.5
"""A token of an answer costs at most so much of what a blind guess costs, ln(vocabulary) nats."""

BLOCKS_TO_COUNT = 2
"""Blocks that an answer must have for one token per call to mean something."""


def run_request(runtime: Runtime, request: Request) -> Result:
    """Answer one request through a scheduler of its own.

    Raises:
        GenerationError: It failed on the way.
    """
    scheduler = Scheduler(runtime, slots=1)
    scheduler.submit(request)
    start = time.perf_counter()
    events = []
    while not scheduler.idle:
        for event in scheduler.turn():
            if event.error is not None:
                raise GenerationError(event.error)
            events.append(event)
    return result_of(request, events, time.perf_counter() - start)


def shortened(request: Request, limits: RequestLimits) -> Request | None:
    """Return as much of a request as engines hold; None where that is less than two blocks."""
    block = min(request.block_size, limits.block_size_max)
    if limits.context < 2 * block:
        return None
    tokens = min(request.max_new_tokens, limits.context // (2 * block) * block)
    return replace(
        request,
        mode=request.mode if request.mode in limits.modes else "ar",
        prompt_ids=request.prompt_ids[: limits.context - tokens],
        max_new_tokens=tokens,
        block_size=block,
    )


def objections(runtime: Runtime, request: Request, result: Result) -> list[str]:
    """Return what is wrong with a greedy answer of idle engines, a sentence each.

    Raises:
        GenerationError: Another question failed on the way.
    """
    ids = result.output_ids[len(request.prompt_ids) :]
    found = []
    if len(set(ids)) == 1 < len(ids):
        found.append(f"the answer is token {ids[0]}, {len(ids)} times")
    other = replace(request, prompt_ids=_another(request.prompt_ids, runtime.vocab_size))
    if run_request(runtime, other).output_ids[len(other.prompt_ids) :] == ids:
        found.append("another prompt has the same answer: the context is not seen")
    if request.mode != "mask_diffusion":
        return found
    if runtime.mask_token_id in ids:
        found.append("the answer holds the mask token")
    if result.denoiser_calls >= len(ids) >= BLOCKS_TO_COUNT * request.block_size:
        found.append(
            f"exactly one token per denoiser call ({result.denoiser_calls} calls for {len(ids)} "
            "tokens), as engines give whose denoiser does not see its context"
        )
    guess = math.log(runtime.vocab_size)
    cost = -float(_log_probabilities(runtime, request.prompt_ids, ids).mean())
    if not cost <= LIKELY * guess:
        found.append(
            f"word salad: the context tower finds the answer unlikely ({cost:.1f} nats per token, "
            f"and a blind guess costs {guess:.1f})"
        )
    return found


def _another(prompt: Sequence[int], vocab_size: int) -> tuple[int, ...]:
    """Return the same tokens in reverse; others, where that is the same."""
    reverse = tuple(reversed(prompt))
    if reverse != tuple(prompt):
        return reverse
    return tuple((token + 1) % vocab_size for token in prompt)


def _log_probabilities(
    runtime: Runtime, prompt: Sequence[int], ids: Sequence[int]
) -> npt.NDArray[np.float64]:
    """Return log p of each token, given the prompt and those before it, by the context tower."""
    runtime.reset(0)
    size = runtime.limits.max_tokens_per_call
    parts = [prompt[start : start + size] for start in range(0, len(prompt), size)]
    parts += [[token] for token in ids[:-1]]
    before = len(parts) - len(ids)
    found = []
    for number, part in enumerate(parts):
        wanted = number >= before
        (logits,) = runtime.extend([ExtendRow(0, np.array(part, np.int32), logits=wanted)])
        if wanted:
            assert logits is not None, "the row asked for logits"
            scores = logits.astype(np.float64) - logits.max()
            found.append(scores[ids[number - before]] - np.log(np.exp(scores).sum()))
    runtime.reset(0)
    return np.array(found)
