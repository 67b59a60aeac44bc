"""Searches for what fits where a plan does not, and for the largest plan that does.

The searches vary the requests of `plan.py`: more or fewer slots, another context, a second GPU,
another SKU, a narrower precision. Everything else of a request stays as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from twotower_contract.engine_set import MAX_SLOTS
from twotower_contract.quantized import FORMATS
from twotower_contract.skus import Sku, known_skus
from twotower_engines.errors import PlanError
from twotower_engines.planning.model_size import ModelSize
from twotower_engines.planning.plan import (
    MemoryPlan,
    PlanRequest,
    gpu_counts,
    plan_memory,
    resolve_precision,
)
from twotower_engines.planning.precisions import BUILT, flavour_for, is_built


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A change of a request with which it fits.

    Attributes:
        options: Options to add to the command, or to change in it.
        remark: Note on the change; may be empty.
        plan: Plan of the changed request.
    """

    options: str
    remark: str
    plan: MemoryPlan

    def __str__(self) -> str:
        return f"{self.options} ({self.remark})" if self.remark else self.options


def require_fit(plan: MemoryPlan) -> MemoryPlan:
    """Return a plan that fits.

    Raises:
        PlanError: It does not fit; the message says what is short and what would fit.
    """
    if not plan.fits:
        raise PlanError(refusal(plan))
    return plan


def refusal(plan: MemoryPlan) -> str:
    """Say why a plan does not fit, or cannot be built, and name the nearest plans that can."""
    if plan.fits and plan.precision in BUILT[plan.flavour]:
        return (
            f"weights in {plan.precision} need our kernels on a GPU, which are not installed: "
            "pip install 'twotower[kernels]'"
        )
    if plan.fits:
        return (
            f"{plan.flavour} has no kernels for weights in {plan.precision}, only for "
            f"{', '.join(BUILT[plan.flavour])}: leave --flavour out, or choose --precision auto"
        )
    index, gpu = min(enumerate(plan.gpus), key=lambda pair: pair[1].free)
    where = f"GPU {index} of {plan.sku.name}" if len(plan.gpus) > 1 else plan.sku.name
    text = (
        f"{plan.slots} slots x {plan.context} tokens in {plan.precision} do not fit on "
        f"{len(plan.gpus)} x {plan.sku.name}: {where} would hold {gib(gpu.total)} "
        f"({gib(gpu.weight_bytes)} of it weights) and has {gib(gpu.capacity)}"
    )
    nearest = nearest_fits(plan)
    if not nearest:
        return f"{text}; no SKU in the table holds this model"
    return f"{text}. What fits: {'; '.join(map(str, nearest))}"


def nearest_fits(plan: MemoryPlan) -> list[Suggestion]:
    """Return the nearest plans that fit, nearest first.

    Each suggestion changes only what it names; flavour, largest block and the rest stay.
    """
    count = len(plan.gpus)
    here = replace(plan.asked, gpus=count, precision=plan.precision)
    found = []
    if plan.flavour == "tensorrt" and not plan.asked.kernels:
        found += _fitting(
            plan, here, "pip install 'twotower[kernels]'", "same limits", kernels=True
        )
    slots = largest_slots(plan.model, here)
    if 0 < slots < plan.slots:
        found += _fitting(plan, here, f"--slots {slots}", "same context", slots=slots)
    context = largest_context(plan.model, here)
    if 0 < context < plan.context:
        found += _fitting(plan, here, f"--context {context}", "same slots", context=context)
    if count == 1 and 2 in gpu_counts(plan.model, plan.sku):
        found += _fitting(plan, here, "--gpus 2", "one tower on each", gpus=2)
    found += _other_skus(plan)
    found += islice(_narrower(plan), 1)
    return found


def largest_slots(model: ModelSize, request: PlanRequest) -> int:
    """Return how many slots fit beside a request's context; 0 where not even one does.

    The request's own slots do not matter.
    """
    return _largest(
        range(1, MAX_SLOTS + 1),
        lambda slots: plan_memory(model, replace(request, slots=slots)).fits,
    )


def largest_context(model: ModelSize, request: PlanRequest) -> int:
    """Return how many tokens of context fit, a multiple of 256; 0 where not even 256 do.

    The request's own context does not matter.
    """
    limit = model.config.max_position_embeddings
    return _largest(
        range(256, limit + 1, 256),
        lambda context: plan_memory(model, replace(request, context=context)).fits,
    )


def _fitting(
    plan: MemoryPlan, request: PlanRequest, options: str, remark: str, **changes: Any
) -> list[Suggestion]:
    """Return a changed request as a suggestion, if it fits."""
    made = plan_memory(plan.model, replace(request, **changes))
    return [Suggestion(options, remark, made)] if made.fits else []


def _largest(values: range, fits: Callable[[int], bool]) -> int:
    """Return the largest value that fits, by bisection; 0 where the smallest does not."""
    low, high = 0, len(values)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if fits(values[middle]) else (low, middle)
    return values[low - 1] if low else 0


def _narrower(plan: MemoryPlan) -> Iterator[Suggestion]:
    """Name narrower precisions in which it fits on this SKU, then those with fewer slots."""
    choices = [
        (f"--precision {name} --gpus {gpus}", replace(plan.asked, precision=name, gpus=gpus))
        for name in plan.sku.precisions
        if name in FORMATS and name != plan.precision and plan.model.precision is None
        if is_built(plan.asked.flavour or flavour_for(plan.sku, name), name, plan.asked.kernels)
        for gpus in gpu_counts(plan.model, plan.sku)
    ]
    remark = "quantize first"
    for options, request in choices:
        yield from _fitting(plan, request, options, remark)
    for options, request in choices:
        slots = largest_slots(plan.model, request)
        if slots:
            options += f" --slots {slots}"
            yield from _fitting(plan, request, options, remark, slots=slots)


def _other_skus(plan: MemoryPlan) -> Iterator[Suggestion]:
    """Name the smallest SKU that holds the plan on one GPU, and the smallest on two."""
    by_memory = sorted(known_skus().values(), key=lambda sku: sku.memory)
    others = [sku for sku in by_memory if sku.name not in (plan.sku.name, "cpu")]
    for count in (1, 2):
        fitting = (one for sku in others for one in _on_another(plan, sku, count))
        yield from islice(fitting, 1)


def _on_another(plan: MemoryPlan, sku: Sku, count: int) -> list[Suggestion]:
    """Return the plan on another SKU, if it fits there in a precision that can be built."""
    if count not in gpu_counts(plan.model, sku):
        return []
    options = f"--sku {sku.name} --gpus {count}"
    changes: dict[str, Any] = {"sku": sku, "gpus": count}
    if plan.asked.flavour is not None and plan.asked.flavour not in sku.flavours:
        options += " --flavour auto"
        changes["flavour"] = None
    if not _is_built(plan, sku):
        options += " --precision auto"
        changes["precision"] = "auto"
    fitting = _fitting(plan, plan.asked, options, "", **changes)
    return [one for one in fitting if one.plan.buildable and not one.plan.needs_quantizing]


def _is_built(plan: MemoryPlan, sku: Sku) -> bool:
    """Whether the precision that was asked for exists on another SKU and can be built."""
    try:
        precision = resolve_precision(plan.model, sku, plan.asked.precision)
        flavour = plan.asked.flavour if plan.asked.flavour in sku.flavours else None
        return is_built(flavour or flavour_for(sku, precision), precision, plan.asked.kernels)
    except PlanError:
        return False


def gib(size: int) -> str:
    """Write bytes in GiB, or in MiB or KiB where they are few."""
    for power, unit in ((30, "GiB"), (20, "MiB")):
        if size >= 1 << power:
            return f"{size / (1 << power):.1f} {unit}"
    return f"{size / 1024:.1f} KiB"
