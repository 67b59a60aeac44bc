"""The report of a plan, for people and programs.

`PlanReport` gathers memory, the largest limits that fit, the size in each precision, the roofline
and the expected tokens per second of one SKU. `as_json` is for programs; `plan_text.py` writes
tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from twotower_contract.skus import Sku
from twotower_engines.planning import plan as memory_plan
from twotower_engines.planning import roofline
from twotower_engines.planning.acceptance import Acceptance, load_acceptance
from twotower_engines.planning.fit import largest_context, largest_slots, nearest_fits, refusal
from twotower_engines.planning.model_size import ModelSize
from twotower_engines.planning.plan import MemoryPlan, PlanRequest, plan_memory
from twotower_engines.planning.precisions import PRECISIONS, flavour_for, is_built, weight_sizes
from twotower_engines.planning.roofline import (
    ROWS,
    CallCost,
    Throughput,
    ar_throughput,
    context_call,
    denoiser_step,
)

DISK_BYTES_PER_S = 1e9
"""Speed of the disk for the time of loading; the order of a network volume."""

CONTEXTS = (4096, 8192, 16384, 32768, 65536, 131072, 262144)


@dataclass(frozen=True)
class PlanReport:
    """One SKU's plan.

    Attributes:
        plan: The memory plan of the request; with `auto`, in the widest precision that fits.
        refused: None where it can be built; else the reason, and what would fit.
        threshold: Confidence threshold for the estimate of tokens per second.
    """

    plan: MemoryPlan
    refused: str | None
    threshold: float
    acceptance: Acceptance

    @property
    def sku(self) -> Sku:
        """The SKU."""
        return self.plan.sku

    @property
    def is_faster(self) -> bool:
        """Whether its engines run our kernels, which the SKU's default flavour does not."""
        return self.plan.flavour == "tensorrt" != self.sku.flavour

    @property
    def has_denoiser(self) -> bool:
        """Whether there is a tower to denoise with."""
        return "denoiser" in self.plan.model.towers

    @cached_property
    def nearest(self) -> tuple[str, ...]:
        """Requests that would fit instead; none where the plan can be built."""
        return () if self.refused is None else tuple(map(str, nearest_fits(self.plan)))

    @property
    def _settled(self) -> PlanRequest:
        """The request with the plan's choice of GPUs and precision."""
        plan = self.plan
        return replace(plan.asked, gpus=len(plan.gpus), precision=plan.precision)

    @cached_property
    def slots_by_context(self) -> dict[int, int]:
        """Slots that fit beside each context that the model takes."""
        model = self.plan.model
        return {
            context: largest_slots(model, replace(self._settled, context=context))
            for context in CONTEXTS
            if context <= model.config.max_position_embeddings
        }

    @cached_property
    def most_slots(self) -> int:
        """Slots that fit beside the context that was asked for."""
        return largest_slots(self.plan.model, self._settled)

    @cached_property
    def most_context(self) -> int:
        """Tokens of context that fit beside the slots that were asked for."""
        return largest_context(self.plan.model, self._settled)

    def denoiser(self, rows: int, routing: roofline.RoutingKind = "measured") -> CallCost:
        """Return the cost of a denoiser step."""
        machine = roofline.machine_of(self.plan)
        return denoiser_step(self.plan.model, machine, rows, self.plan.context, routing=routing)

    def extension(self, rows: int, tokens: int = 16) -> CallCost:
        """Return the cost of a context call."""
        return context_call(
            self.plan.model,
            roofline.machine_of(self.plan),
            rows,
            self.plan.context,
            tokens,
            to_second_gpu=len(self.plan.gpus) == 2,
        )

    def throughput(self, task: str, rows: int, threshold: float | None = None) -> Throughput:
        """Return the throughput of a batch of requests of a task."""
        calls = self.acceptance.calls(task, self.threshold if threshold is None else threshold)
        return roofline.throughput(self.plan, rows, calls)

    def autoregressive(self, rows: int) -> float:
        """Return tokens per second of the context tower alone."""
        return ar_throughput(self.plan, rows)

    def precision_table(self) -> list[dict[str, Any]]:
        """Return for each precision the weights' bytes and on how many GPUs the limits fit."""
        plan = self.plan
        rows = []
        for name in reversed(PRECISIONS):
            if name == "float32" and plan.precision != "float32":
                continue
            if plan.model.precision is not None and name not in (plan.precision, "float32"):
                continue
            sizes = [sum(weight_sizes(plan.model, t, name).values()) for t in plan.model.towers]
            runs = name in plan.sku.precisions or name == plan.precision
            fitting = (
                count
                for count in memory_plan.gpu_counts(plan.model, plan.sku)
                if plan_memory(plan.model, replace(plan.asked, gpus=count, precision=name)).fits
            )
            rows.append(
                {
                    "precision": name,
                    "summary": PRECISIONS[name].summary,
                    "weight_bytes": sum(sizes),
                    "computed_by_sku": runs,
                    "built": is_built(
                        plan.asked.flavour or flavour_for(plan.sku, name), name, plan.asked.kernels
                    ),
                    "gpus": next(fitting, None) if runs else None,
                }
            )
        return rows[::-1]

    def as_json(self) -> dict[str, Any]:
        """Return all numbers, sizes in bytes and times in seconds."""
        most = self.most_slots
        result: dict[str, Any] = {
            "sku": self.sku.as_json(),
            "fits": self.plan.fits,
            "buildable": self.refused is None,
            "refusal": self.refused,
            "nearest": list(self.nearest),
            "memory": self.plan.as_json(),
            "largest": {
                "slots": most,
                "context": self.most_context,
                "slots_by_context": {str(key): n for key, n in self.slots_by_context.items()},
            },
            "precisions": self.precision_table(),
            "roofline": {
                "basis": {name: list(texts) for name, texts in roofline.BASIS.items()},
                "context_extension": [self.extension(rows).as_json() for rows in ROWS],
                "prefill": self.prefill(),
            },
            "loading": self.loading(),
        }
        autoregressive = {str(rows): self.autoregressive(rows) for rows in ROWS}
        result["tokens_per_second"] = {"autoregressive": autoregressive}
        if self.has_denoiser:
            for routing in ("measured", "uniform"):
                result["roofline"][f"denoiser_step_{routing}_routing"] = [
                    self.denoiser(rows, routing).as_json() for rows in ROWS
                ]
            result["tokens_per_second"]["mask_diffusion"] = self._diffusion()
        return result

    def loading(self) -> dict[str, float]:
        """Return the bytes of weights that a start reads, and the seconds that a disk takes."""
        size = sum(gpu.weight_bytes for gpu in self.plan.gpus)
        return {
            "bytes": size,
            "disk_bytes_per_s": DISK_BYTES_PER_S,
            "seconds": size / DISK_BYTES_PER_S,
        }

    def prefill(self) -> dict[str, Any]:
        """Return chunk, seconds per chunk and tokens per second of one request's prefill."""
        chunk = min(self.plan.max_tokens_per_call, self.plan.context)
        call = self.extension(1, chunk)
        rate = chunk / call.total_seconds
        return {"chunk": chunk, "seconds": call.total_seconds, "tokens_per_second": rate}

    def _diffusion(self) -> dict[str, Any]:
        tasks = {}
        for task in self.acceptance.tasks:
            calls = self.acceptance.calls(task, self.threshold)
            tasks[task] = {
                "tokens_per_call": calls.tokens_per_call,
                "calls_per_block": {"mean": calls.mean, "p95": calls.quantile(0.95)},
                "rows": [self.throughput(task, rows).as_json() for rows in ROWS],
            }
        return {"threshold": self.threshold, "source": self.acceptance.source, "tasks": tasks}


def plan_report(model: ModelSize, request: PlanRequest, threshold: float) -> PlanReport:
    """Plan a model on a SKU and say whether it can be built.

    Raises:
        PlanError: The request is impossible, or the threshold is outside of the measured range.
    """
    acceptance = load_acceptance()
    acceptance.burst_rate(acceptance.tasks[0], threshold)  # refuses a threshold without data
    plan = plan_memory(model, request)
    return PlanReport(plan, None if plan.buildable else refusal(plan), threshold, acceptance)


def with_faster_flavours(
    reports: Sequence[PlanReport], others: Sequence[PlanReport]
) -> list[PlanReport]:
    """Return plans of several SKUs, each followed by those of other flavours that run our kernels.

    Such engines are built on the GPU itself, and so are no default where others can be built
    anywhere; but they read the routed experts only.
    """
    return [
        shown
        for report in reports
        for shown in (
            report,
            *(
                one
                for one in others
                if one.sku == report.sku
                and one.is_faster
                and one.plan.flavour != report.plan.flavour
            ),
        )
    ]
