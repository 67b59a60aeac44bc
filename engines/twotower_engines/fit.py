"""What would fit where a plan does not, and how far a plan can be stretched.

Searches over the plans of `plan.py`: more or fewer slots, another context, a second GPU, another
SKU, a narrower precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

from .errors import PlanError
from .model_size import ModelSize
from .plan import MAX_SLOTS, MemoryPlan, gpu_counts, plan_memory
from .precisions import BUILT
from .skus import Sku, known_skus

__all__ = ["gib", "largest_context", "largest_slots", "nearest_fits", "refusal", "require_fit"]


def require_fit(plan: MemoryPlan) -> MemoryPlan:
    """Return a plan that fits.

    Raises:
        PlanError: It does not; the message says what is short and what would fit.
    """
    if not plan.fits:
        raise PlanError(refusal(plan))
    return plan


def refusal(plan: MemoryPlan) -> str:
    """Say why a plan does not fit, and name the nearest plans that do."""
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
    return f"{text}. What fits: {'; '.join(nearest)}"


def nearest_fits(plan: MemoryPlan) -> list[str]:
    """Return the nearest plans that fit, nearest first, each as a phrase for people."""
    model, sku, count = plan.model, plan.sku, len(plan.gpus)
    found = []
    slots = largest_slots(model, sku, count, plan.context, plan.precision)
    if 0 < slots < plan.slots:
        found.append(f"--slots {slots} (same context)")
    context = largest_context(model, sku, count, plan.slots, plan.precision)
    if 0 < context < plan.context:
        found.append(f"--context {context} (same slots)")
    if count == 1 and 2 in gpu_counts(model, sku) and _like(plan, sku, 2, plan.precision).fits:
        found.append("--gpus 2, one tower on each")
    found += _other_skus(plan)
    found += islice(_narrower(plan), 1)
    return found


def largest_slots(
    model: ModelSize, sku: Sku, gpus: int, context: int, precision: str = "bf16"
) -> int:
    """Return how many slots fit beside a context of so many tokens; 0 where not even one does."""
    return _largest(
        range(1, MAX_SLOTS + 1),
        lambda slots: plan_memory(model, sku, gpus, slots, context, precision).fits,
    )


def largest_context(
    model: ModelSize, sku: Sku, gpus: int, slots: int, precision: str = "bf16"
) -> int:
    """Return how many tokens of context fit, a multiple of 256; 0 where not even 256 do."""
    limit = model.config.max_position_embeddings
    return _largest(
        range(256, limit + 1, 256),
        lambda context: plan_memory(model, sku, gpus, slots, context, precision).fits,
    )


def _like(plan: MemoryPlan, sku: Sku, gpus: int, precision: str) -> MemoryPlan:
    """Plan the same limits elsewhere or otherwise."""
    return plan_memory(plan.model, sku, gpus, plan.slots, plan.context, precision)


def _largest(values: range, fits: Callable[[int], bool]) -> int:
    """Return the largest value that fits, by bisection; 0 where the smallest does not."""
    low, high = 0, len(values)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if fits(values[middle]) else (low, middle)
    return values[low - 1] if low else 0


def _narrower(plan: MemoryPlan) -> Iterator[str]:
    """Name narrower precisions in which it fits on this SKU, then those with fewer slots."""
    choices = [
        (name, gpus)
        for name in plan.sku.precisions
        if name not in BUILT
        for gpus in gpu_counts(plan.model, plan.sku)
    ]
    for name, gpus in choices:
        if _like(plan, plan.sku, gpus, name).fits:
            yield f"--precision {name} --gpus {gpus} (not built yet)"
    for name, gpus in choices:
        slots = largest_slots(plan.model, plan.sku, gpus, plan.context, name)
        if slots:
            yield f"--precision {name} --gpus {gpus} --slots {slots} (not built yet)"


def _other_skus(plan: MemoryPlan) -> Iterator[str]:
    """Name the smallest SKU that holds the plan on one GPU, and the smallest on two."""
    by_memory = sorted(known_skus().values(), key=lambda one: one.memory)
    for count in (1, 2):
        for sku in by_memory:
            is_other = sku.name not in (plan.sku.name, "cpu")
            if not is_other or count not in gpu_counts(plan.model, sku):
                continue
            if "bf16" not in sku.precisions:
                continue
            if _like(plan, sku, count, "bf16").fits:
                yield f"--sku {sku.name} --gpus {count}"
                break


def gib(size: int) -> str:
    """Write bytes in GiB, or in MiB or KiB where they are few."""
    for power, unit in ((30, "GiB"), (20, "MiB")):
        if size >= 1 << power:
            return f"{size / (1 << power):.1f} {unit}"
    return f"{size / 1024:.1f} KiB"
