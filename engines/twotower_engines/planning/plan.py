"""The memory plan of one model, SKU and set of limits.

`plan_memory` adds up, per GPU, the memory that the runtime allocates: weights, states, the buffers
of its calls, and the engines' workspace. A plan says whether it fits; `fit.py` finds what would fit
instead. It is all arithmetic and needs no GPU. (After a build, `build.py` checks the memory that
TensorRT reports against the plan.)

`BASIS` says which figures are compiled, which computed and which assumed; every report prints it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from twotower_contract.engine_set import MAX_BLOCK, MAX_SLOTS
from twotower_contract.layout import Tower
from twotower_contract.quantized import FORMATS
from twotower_contract.sizes import conv_bytes, kv_bytes_per_token, ssm_bytes
from twotower_contract.skus import GIB, Sku
from twotower_engines.errors import PlanError
from twotower_engines.planning.compiled import compiled_tower, table_source, way_of
from twotower_engines.planning.model_size import ModelSize
from twotower_engines.planning.precisions import PRECISIONS, flavour_for, is_built, weight_sizes

CHUNKS = (1024, 256, 128, 64, 32)
"""Tokens of one row in one context call, largest first: a long prompt is prefilled in chunks.

A long chunk reads each routed expert once for more tokens. Function bodies compute all experts for
each, and so begin with the second.
"""
BLOCK = 16
BLOCK_SIZE_MAX = 64
"""Default for the largest block of the engines; most requests have blocks of 16."""
PREFILL_MS = 30.0
"""Default for the time that prompts may take from running rows in a turn of the scheduler."""
OVERHEAD = {"onnxruntime": 512 << 20, "tensorrt": GIB, "tensorrt-rtx": GIB}
MARGIN = 0.02
WORKSPACE_SLACK = 1.1
FLOAT32 = 4

BASIS: Mapping[str, tuple[str, ...]] = {
    "compiled": (
        f"workspace: the scratch memory that the compiler asked for ({table_source()}), and a "
        "tenth; `tensorrt` with the extra [kernels] runs our kernels (routed experts only), else "
        "function bodies run (all experts, quadratic scan). TensorRT shares the compiler, but "
        "times its choices: `build` checks what it reports",
    ),
    "arithmetic": (
        "weights, states and buffers: the bytes that the runtime allocates. Calls of a tower take "
        "turns in memory for the largest: where new states land, and its logits",
        "with two GPUs each holds all context states; beside the denoiser, the Mamba states a "
        "second time for mock_ar",
    ),
    "assumed": (
        "per GPU 1 GiB for the CUDA context, libraries and captured graphs (0.5 GiB on the CPU), "
        "and 2% of the memory stays free",
        "loading takes as long as the disk takes to give the weights",
    ),
}
"""Ground of each figure of a plan."""


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """Memory of one GPU, in bytes.

    Attributes:
        towers: Towers that run on it.
        weights: Tower, then part, to bytes.
        states: Context states of all slots, and of kept prefixes, by kind.
        buffers: Inputs and outputs of the calls, by kind.
        workspace: Intermediates of each tower's engine.
        overhead: CUDA context and libraries.
        capacity: Usable memory: all of it less the reserved part and the margin.
    """

    towers: tuple[str, ...]
    weights: Mapping[str, Mapping[str, int]]
    states: Mapping[str, int]
    buffers: Mapping[str, int]
    workspace: Mapping[str, int]
    overhead: int
    capacity: int

    @property
    def weight_bytes(self) -> int:
        """All weights."""
        return sum(sum(parts.values()) for parts in self.weights.values())

    @property
    def total(self) -> int:
        """Everything together."""
        parts = (self.states, self.buffers, self.workspace)
        return self.weight_bytes + self.overhead + sum(sum(part.values()) for part in parts)

    @property
    def free(self) -> int:
        """Memory that is left; negative where the plan does not fit."""
        return self.capacity - self.total

    def as_json(self) -> dict[str, Any]:
        """Return all of it in bytes."""
        return {**asdict(self), "total": self.total, "free": self.free}


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """The request for a plan.

    Attributes:
        sku: The GPU, or the CPU.
        gpus: 1: both towers on one; 2: one tower on each. None: the fewest that fit.
        slots: Requests in flight.
        context: Tokens of a request, prompt and answer together.
        precision: A name of `PRECISIONS`; `auto`: the widest that fits and can be built for the
            SKU, the weights as released where none fits.
        flavour: Flavour of the engines; None for the SKU's default.
        max_tokens_per_call: Tokens of one row in one context call; None: the largest of `CHUNKS`
            with which the plan fits.
        block_size_max: Largest block of the denoiser.
        kernels: Whether `tensorrt` has our kernels (the extra [kernels]) or runs function bodies,
            which other flavours always do.
        prefix_bytes: Memory for the states of prompts' beginnings.
    """

    sku: Sku
    gpus: int | None = None
    slots: int = 16
    context: int = 8192
    precision: str = "auto"
    flavour: str | None = None
    max_tokens_per_call: int | None = None
    block_size_max: int = BLOCK_SIZE_MAX
    kernels: bool = True
    prefix_bytes: int = 0


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """A plan: the request as it was asked, what was chosen, and what each GPU would hold.

    Attributes:
        max_tokens_per_call: Tokens of one row in one context call: as requested, or else the
            largest chunk with which the plan fits. Engines are to be built with it.
    """

    model: ModelSize
    asked: PlanRequest
    precision: str
    max_tokens_per_call: int
    gpus: tuple[GpuMemory, ...]

    @property
    def sku(self) -> Sku:
        """The SKU of the request."""
        return self.asked.sku

    @property
    def flavour(self) -> str:
        """Flavour of the engines; unless asked for, the SKU's first that has the precision."""
        return self.asked.flavour or flavour_for(self.sku, self.precision)

    @property
    def slots(self) -> int:
        """Requests in flight."""
        return self.asked.slots

    @property
    def context(self) -> int:
        """Tokens of a request, prompt and answer together."""
        return self.asked.context

    @property
    def block_size_max(self) -> int:
        """Largest block of the denoiser."""
        return self.asked.block_size_max

    @property
    def fits(self) -> bool:
        """Whether every GPU has room."""
        return all(gpu.free >= 0 for gpu in self.gpus)

    @property
    def buildable(self) -> bool:
        """Whether it fits, and `twotower build` can make this precision for this flavour."""
        return self.fits and self.is_built

    @property
    def is_built(self) -> bool:
        """Whether `twotower build` can make this precision for this flavour."""
        return is_built(self.flavour, self.precision, self.asked.kernels)

    @property
    def needs_quantizing(self) -> bool:
        """Whether the weights are not in this precision yet."""
        return self.model.precision is None and self.precision in FORMATS

    @property
    def placement(self) -> str:
        """The GPU of each tower, in words."""
        where = "this machine" if self.sku.compute_capability is None else "one GPU"
        if len(self.gpus) == 2:
            return "context tower on GPU 0, denoiser tower on GPU 1"
        both = len(self.gpus[0].towers) == 2
        return f"both towers on {where}" if both else f"context tower on {where}"

    def as_json(self) -> dict[str, Any]:
        """Return the plan in bytes, as build.json keeps it."""
        return {
            "sku": self.sku.name,
            "flavour": self.flavour,
            "slots": self.slots,
            "context": self.context,
            "precision": self.precision,
            "max_tokens_per_call": self.max_tokens_per_call,
            "block_size_max": self.block_size_max,
            "kernels": self.flavour == "tensorrt" and self.asked.kernels,
            "placement": self.placement,
            "gpus": [gpu.as_json() for gpu in self.gpus],
            "fits": self.fits,
            "buildable": self.buildable,
            "needs_quantizing": self.needs_quantizing,
            "basis": {name: list(texts) for name, texts in BASIS.items()},
        }


def plan_memory(model: ModelSize, request: PlanRequest) -> MemoryPlan:
    """Plan the memory of a model.

    Raises:
        PlanError: The request is impossible: no such precision on this SKU, two GPUs where there is
            one, a context beyond the model's, fewer than one slot.
    """
    _check_request(model, request)
    sku = request.sku
    wide = resolve_precision(model, sku, request.precision)
    several = request.precision == "auto" and len(sku.precisions) > 1 and wide == sku.precisions[0]
    counts = (request.gpus,) if request.gpus else gpu_counts(model, sku)

    def settled(precision: str) -> PlanRequest:
        flavour = request.flavour or flavour_for(sku, precision)
        return replace(request, precision=precision, flavour=flavour)

    def chunks(precision: str) -> Sequence[int]:
        asked = request.max_tokens_per_call
        first = 0 if _has_kernels(settled(precision)) else 1
        return (asked,) if asked else CHUNKS[first:]

    def planned(gpus: int, precision: str, chunk: int) -> MemoryPlan:
        made = replace(settled(precision), gpus=gpus, max_tokens_per_call=chunk)
        return MemoryPlan(model, request, precision, chunk, _shares(model, made))

    def can_be_built(precision: str) -> bool:
        flavour = request.flavour or flavour_for(sku, precision)
        return is_built(flavour, precision, request.kernels)

    plans = (
        planned(count, precision, chunk)
        for precision in (filter(can_be_built, sku.precisions) if several else (wide,))
        for count in counts
        for chunk in chunks(precision)
    )
    fitting = next((plan for plan in plans if plan.fits), None)
    return fitting or planned(counts[-1], wide, chunks(wide)[-1])


def _has_kernels(request: PlanRequest) -> bool:
    """Whether our kernels run in place of the ops' function bodies."""
    return (request.flavour or request.sku.flavour) == "tensorrt" and request.kernels


def resolve_precision(model: ModelSize, sku: Sku, precision: str) -> str:
    """Return the precision that a name stands for; `auto` stands for the widest.

    Raises:
        PlanError: The precision does not exist, or the SKU does not compute in it.
    """
    if precision != "auto" and precision not in PRECISIONS:
        raise PlanError(f"--precision is {precision!r}, none of auto, {', '.join(PRECISIONS)}")
    if model.precision is not None and sku.precisions != ("float32",):
        if precision not in ("auto", model.precision):
            raise PlanError(
                f"--precision is {precision}, but the weights of {model.source} are stored in "
                f"{model.precision}; leave the option out, or name the checkpoint that they were "
                "made of"
            )
        precision = model.precision
    as_released = precision in ("auto", "bf16", "float32")
    if as_released and (model.config.dtype == "float32" or sku.precisions == ("float32",)):
        # an fp32 checkpoint stays fp32, and ONNX Runtime's CPU provider has no bf16 products
        return "float32"
    if precision == "auto":
        return sku.precisions[0]
    if precision not in sku.precisions:
        raise PlanError(
            f"{sku.title} does not compute in {precision}, only in {', '.join(sku.precisions)}; "
            "choose one of these or --precision auto"
        )
    return precision


def gpu_counts(model: ModelSize, sku: Sku) -> tuple[int, ...]:
    """Return the numbers of GPUs that a model may be placed on: one, or one for each tower."""
    return tuple(range(1, min(sku.max_gpus, len(model.towers)) + 1))


def _check_request(model: ModelSize, request: PlanRequest) -> None:
    sku, gpus = request.sku, request.gpus
    if gpus is not None and gpus not in (1, 2):
        raise PlanError(f"--gpus is {gpus}: a model runs on 1 GPU or on 2, one tower on each")
    if gpus == 2 and len(model.towers) < 2:
        raise PlanError(f"--gpus is 2, but {model.source} has only the context tower; use --gpus 1")
    if gpus == 2 and sku.max_gpus < 2:
        raise PlanError(
            f"--gpus is 2, but a machine with {sku.title} has one, and a tower on each of two "
            "machines is not supported; use --gpus 1"
        )
    if not 1 <= request.slots <= MAX_SLOTS:
        raise PlanError(f"--slots is {request.slots}; 1 to {MAX_SLOTS} can be planned")
    if not 1 <= request.block_size_max <= MAX_BLOCK:
        raise PlanError(f"--block-size-max is {request.block_size_max}; 1 to {MAX_BLOCK} can be")
    limit = model.config.max_position_embeddings
    if not 1 <= request.context <= limit:
        raise PlanError(f"--context is {request.context}; this model takes 1 to {limit} tokens")
    if request.flavour is not None and request.flavour not in sku.flavours:
        raise PlanError(
            f"--flavour is {request.flavour!r}; {sku.name} is served by {' or '.join(sku.flavours)}"
        )


def _shares(model: ModelSize, request: PlanRequest) -> tuple[GpuMemory, ...]:
    """Return what each GPU would hold; the request leaves nothing open."""
    groups = [(tower,) for tower in model.towers] if request.gpus == 2 else [model.towers]
    sizes = _Sizes(model, request)
    sku = request.sku
    return tuple(
        GpuMemory(
            towers=towers,
            weights={tower: sizes.weights(tower) for tower in towers},
            states=sizes.states(towers),
            buffers={name: size for tower in towers for name, size in sizes.buffers(tower)},
            workspace={tower: sizes.workspace(tower) for tower in towers},
            overhead=OVERHEAD[sizes.flavour],
            capacity=int((sku.memory - sku.reserved) * (1 - MARGIN)),
        )
        for towers in groups
    )


@dataclass(frozen=True, slots=True)
class _Sizes:
    """The arithmetic: bytes of everything, for a request that leaves nothing open."""

    model: ModelSize
    request: PlanRequest

    @property
    def flavour(self) -> str:
        return self.request.flavour or self.request.sku.flavour

    @property
    def chunk(self) -> int:
        assert self.request.max_tokens_per_call is not None, "the request leaves nothing open"
        return self.request.max_tokens_per_call

    @property
    def room(self) -> int:
        """Tokens that a cache has room for: the context, and one call."""
        return self.request.context + max(self.chunk, self.request.block_size_max)

    @property
    def item(self) -> int:
        """Bytes of an activation, a key or a value: weights may be narrower, these are not."""
        return FLOAT32 if self.request.precision == "float32" else 2

    def weights(self, tower: Tower) -> dict[str, int]:
        sizes = weight_sizes(self.model, tower, self.request.precision)
        return {part: size for part, size in sizes.items() if size}

    def states(self, towers: Sequence[str]) -> dict[str, int]:
        mamba = ssm_bytes(self.model.config) + conv_bytes(self.model.config, self.item)
        states = {
            "keys and values": self.request.slots
            * self.room
            * kv_bytes_per_token(self.model.config, self.item),
            "ssm": self.request.slots * ssm_bytes(self.model.config),
            "conv": self.request.slots * conv_bytes(self.model.config, self.item),
        }
        if "denoiser" in towers:
            states["mock_ar copy"] = self.request.slots * mamba
        if "context" in towers and self.request.prefix_bytes:
            states["prefixes"] = self.request.prefix_bytes
        return states

    def buffers(self, tower: str) -> Iterator[tuple[str, int]]:
        """Yield the buffers for the calls of a tower: one set, for the largest call."""
        slots = self.request.slots
        vocabulary = slots * self.model.config.vocab_size
        queries = slots * self.model.config.num_attention_heads * self.model.config.head_dim
        if tower == "denoiser":
            # function bodies give logits to who reads them: of a token, for `mock_ar`
            tokens = self.request.block_size_max if _has_kernels(self.request) else 1
            yield "denoiser logits", tokens * vocabulary * self.item
            yield "denoiser queries", self.request.block_size_max * queries * self.item
            return
        mamba = ssm_bytes(self.model.config) + conv_bytes(self.model.config, self.item)
        yield "new states", slots * mamba
        yield "context queries", self.chunk * queries * self.item
        yield "context logits", vocabulary * FLOAT32

    def workspace(self, tower: str) -> int:
        """Return the scratch memory of a tower's engine, as compiled for its largest call."""
        length = self.chunk if tower == "context" else self.request.block_size_max
        way = way_of(_has_kernels(self.request), self.request.precision)
        compiled = compiled_tower(self.model.config, tower, way, self.item)
        size = compiled.scratch_bytes(self.request.slots, length, self.room)
        return int(WORKSPACE_SLACK * size)
