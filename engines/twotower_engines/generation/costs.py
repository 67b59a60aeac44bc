"""The time that calls of the engines take, as far as the scheduler's choices need it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from twotower_contract.engine_set import EngineSet, Limits
from twotower_contract.skus import known_skus
from twotower_engines.planning.model_size import ModelSize
from twotower_engines.planning.roofline import Machine, context_call, denoiser_step
from twotower_engines.runtime.resident.calls import token_bucket


class Costs(Protocol):
    """Seconds of a call over so many rows, each of so many tokens."""

    def extend(self, rows: int, tokens: int) -> float:
        """Return the time of a call of the context tower."""

    def denoise(self, rows: int, tokens: int) -> float:
        """Return the time of a call of the denoiser tower."""


@dataclass(frozen=True, slots=True)
class LinearCosts:
    """Costs in proportion to the tokens, where nothing is known of the engines.

    Attributes:
        call: Seconds of a call of no tokens.
        token: Seconds of a token.
    """

    call: float = 1e-3
    token: float = 1e-4

    def extend(self, rows: int, tokens: int) -> float:
        """Return the time of a call of the context tower."""
        return self.call + self.token * rows * tokens

    def denoise(self, rows: int, tokens: int) -> float:
        """Return the time of a call of the denoiser tower."""
        return self.extend(rows, tokens)


class RooflineCosts:
    """The planner's costs; each is computed once.

    A GPU's calls are padded to the sizes that they were prepared for, and cost as much.

    Args:
        model: Sizes of the model.
        machine: What it runs on.
        limits: Limits of the engines.
        two_gpus: Whether the denoiser is on a GPU of its own.
    """

    def __init__(self, model: ModelSize, machine: Machine, limits: Limits, two_gpus: bool) -> None:
        is_padded = machine.flavour != "onnxruntime"

        def extend(rows: int, tokens: int) -> float:
            size = token_bucket("extend", tokens, limits) if is_padded else tokens
            call = context_call(model, machine, rows, limits.context, size, to_second_gpu=two_gpus)
            return call.total_seconds

        def denoise(rows: int, tokens: int) -> float:
            size = token_bucket("denoise", tokens, limits) if is_padded else tokens
            return denoiser_step(model, machine, rows, limits.context, size).total_seconds

        self.extend = functools.cache(extend)
        self.denoise = functools.cache(denoise)


def costs_of_engines(engines: EngineSet) -> Costs:
    """Return the planner's costs of an engine set; linear ones for a GPU that it does not know."""
    build, manifest = engines.build, engines.manifest
    sku = known_skus().get(build.sku)
    if sku is None or build.precision not in sku.precisions:
        return LinearCosts()
    model = ModelSize(manifest.model, manifest.towers, str(engines.folder))
    machine = Machine(sku, build.flavour, build.precision)
    return RooflineCosts(model, machine, build.limits, build.memory.get("gpus") == 2)


def between(cost: Callable[[int, int], float], rows: float, tokens: int) -> float:
    """Return the cost of a number of rows that need not be whole: an expectation."""
    low = max(1, math.floor(rows))
    share = rows - low
    at = cost(low, tokens)
    return at if share <= 0 else at + share * (cost(low + 1, tokens) - at)
