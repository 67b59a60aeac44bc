"""The roofline of a plan: bytes and operations of each call, and the least time that these take.

A denoiser step or a context extension is taken apart into parts; each part takes the longer of its
bytes over the achieved bandwidth and its operations over the achieved rate. The parts follow each
other, so their times add up, and each kernel and each call has a small cost of its own. The number
of routed experts that a batch reads comes from the measured routing (`routing.py`), the number of
steps of a block from the measured acceptance (`acceptance.py`); kernels, and what they move beside
weights and states, from compiled engines (`compiled.py`), but for the operators of ONNX Runtime,
which are counted by hand. Calls are captured as CUDA graphs.

Where bytes bind, this is a floor for the time and a ceiling for tokens per second. Where operations
do, it is an estimate: 60% of the dense rate is assumed, and 73 to 83% of it was measured on an RTX
PRO 6000.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import comb
from typing import Any, Literal

from twotower_contract.layout import Tower
from twotower_contract.sizes import conv_bytes, kv_bytes_per_token, parts_of_tower, ssm_bytes
from twotower_contract.skus import Sku
from twotower_contract.traffic import ENDS
from twotower_engines.planning.acceptance import Calls
from twotower_engines.planning.compiled import COPYING, Way, compiled_tower, table_source, way_of
from twotower_engines.planning.model_size import ModelSize
from twotower_engines.planning.plan import BLOCK, MemoryPlan
from twotower_engines.planning.precisions import weight_sizes
from twotower_engines.planning.routing import Routing, distinct_experts

ROWS = (1, 2, 4, 8, 16, 32, 64)
FLOAT32 = 4
TABLE = table_source()
MATRIX_EFFICIENCY = 0.6
KERNEL_SECONDS = {"tensorrt": 2e-6, "tensorrt-rtx": 2e-6, "onnxruntime": 1.5e-6}
"""Seconds from the end of a kernel to the start of the next."""
CALL_SECONDS = 300e-6
CPU_KERNELS: Mapping[str, int] = {"M": 90, "*": 50, "E": 40, "ends": 100}
"""Operators that ONNX Runtime runs, per layer of each kind, and before and after all layers."""

BASIS: Mapping[str, tuple[str, ...]] = {
    "compiled": (
        f"bytes that kernels move beside weights and states ({TABLE}): for `tensorrt` of the graph "
        "cut at our plugins, for the others of function bodies; and how many kernels `tensorrt` "
        "and `tensorrt-rtx` run",
        "for compute capability 8.0 and 8.6 attention reads copies of the caches, made anew in "
        "every call: caches are counted three times there",
        "attention reads the keys and values of a slot's whole capacity: what a request has not "
        "reached is masked, and counted as if it were read",
    ),
    "measured by others": (
        "the tokens that a denoiser call commits (tasks `open` to `arithmetic`), and the experts "
        "that a batch is routed to (arithmetic prompts, rows independent; `uniform` is the other "
        "end, every token choosing at random)",
        "for comparison only: 73 to 83% of the dense bf16 rate in matrix products on an RTX PRO "
        "6000, and the times of NVIDIA's code below",
    ),
    "assumed": (
        "memory is read at the achieved share of the specified bandwidth (its source is below), so "
        "a time that bytes bind is a floor; matrix products reach 60% of the dense bf16 rate, "
        "whatever the width of the weights: a time that FLOPs bind is an estimate",
        f"each kernel of an engine costs {KERNEL_SECONDS['tensorrt'] * 1e6:g} us besides, each "
        f"call {CALL_SECONDS * 1e6:g} us on the host; calls are captured graphs",
        "`onnxruntime` is not compiled here: its operators are counted by hand, "
        f"{CPU_KERNELS['M']} for a Mamba layer, {CPU_KERNELS['*']} for attention, "
        f"{CPU_KERNELS['E']} for experts and {CPU_KERNELS[ENDS]} besides, at "
        f"{KERNEL_SECONDS['onnxruntime'] * 1e6:g} us each",
        "calls are counted as large as they are asked for: the runtime pads rows to a power of two "
        "and a row's tokens to 16, 32, 64 or a chunk, which costs time that is not counted here",
        "new Mamba states are read and written once more to reach their slot; ids and logits that "
        "cross to the host are not counted",
        "`tensorrt` and `onnxruntime` read the experts that a batch is routed to, once; "
        "`tensorrt-rtx` runs function bodies, which read and compute all experts",
        "rows finish their blocks independently, and those that do share one context extension; "
        "prefill is not part of tokens per second",
    ),
}
"""Ground of each figure of the times."""

RoutingKind = Literal["measured", "uniform"]


@dataclass(frozen=True, slots=True)
class Machine:
    """A SKU with the flavour of its engines and the precision of the weights."""

    sku: Sku
    flavour: str
    precision: str

    @property
    def item(self) -> int:
        """Bytes of an activation."""
        return FLOAT32 if self.precision == "float32" else 2

    @property
    def way(self) -> Way:
        """Whether our kernels run, which read the routed experts only, or function bodies."""
        return way_of(self.flavour == "tensorrt", self.precision)

    @property
    def reads_all_experts(self) -> bool:
        """Whether the experts run as the dense function body; the CPU has nodes of its own."""
        return self.way != "kernels" and self.flavour != "onnxruntime"


@dataclass(frozen=True, slots=True)
class CallCost:
    """One call of one tower.

    Attributes:
        rows: Requests of the batch.
        tokens: Tokens of each row.
        distinct: Experts that a layer reads, on average.
        bytes: Part to its bytes.
        flops: Part to its operations.
        seconds: Part to its time, `launches` and `state copies` included.
    """

    rows: int
    tokens: int
    distinct: float
    bytes: Mapping[str, float]
    flops: Mapping[str, float]
    seconds: Mapping[str, float]

    @property
    def total_bytes(self) -> float:
        """Bytes moved."""
        return sum(self.bytes.values())

    @property
    def total_seconds(self) -> float:
        """Least time of the call."""
        return sum(self.seconds.values())

    def as_json(self) -> dict[str, Any]:
        """Return all numbers, for programs."""
        return {
            "rows": self.rows,
            "tokens_per_row": self.tokens,
            "distinct_experts": round(self.distinct, 2),
            "bytes": {part: round(size) for part, size in self.bytes.items()},
            "total_bytes": round(self.total_bytes),
            "flops": {part: round(count) for part, count in self.flops.items()},
            "seconds": dict(self.seconds),
            "total_seconds": self.total_seconds,
        }


@dataclass(frozen=True, slots=True)
class Throughput:
    """Throughput of a batch of requests in the steady state.

    Attributes:
        rows: Requests in flight.
        tokens_per_second: Tokens per second of all requests.
        turn_seconds: Time of one denoiser step and its share of context extensions.
        block_seconds: Mean time from one block of a request to its next.
        slow_block_seconds: The 95th percentile of that time.
    """

    rows: int
    tokens_per_second: float
    turn_seconds: float
    block_seconds: float
    slow_block_seconds: float

    def as_json(self) -> dict[str, Any]:
        """Return all numbers, for programs."""
        per_request = self.tokens_per_second / self.rows
        return {**asdict(self), "tokens_per_second_per_request": per_request}


def denoiser_step(
    model: ModelSize,
    machine: Machine,
    rows: int,
    context: int,
    tokens: int = BLOCK,
    routing: RoutingKind = "measured",
) -> CallCost:
    """Return the cost of one denoiser step.

    Args:
        rows: Blocks that are refined together.
        context: Tokens of context that each row has room for.
        routing: Source of the number of distinct experts.
    """
    parts = _Parts(model, machine, "denoiser", rows, tokens, context, "denoiser block", routing)
    return parts.cost(heads=rows * tokens)


def context_call(
    model: ModelSize,
    machine: Machine,
    rows: int,
    context: int,
    tokens: int = BLOCK,
    routing: RoutingKind = "measured",
    *,
    to_second_gpu: bool = False,
) -> CallCost:
    """Return the cost of one call of the context tower: extension, prefill chunk or single token.

    Args:
        context: Tokens of context that each row has room for.
        to_second_gpu: The denoiser is on another GPU and gets a copy of the new states.
    """
    table: Routing = "context token" if tokens == 1 else "context block"
    parts = _Parts(model, machine, "context", rows, tokens, context, table, routing)
    item = machine.item
    mamba = rows * (ssm_bytes(model.config) + conv_bytes(model.config, item))
    new = mamba + rows * tokens * kv_bytes_per_token(model.config, item)
    # new Mamba states are read and written once more to reach their slots
    copies = 2 * mamba / parts.bandwidth
    if to_second_gpu and machine.sku.peer:
        copies += new / machine.sku.peer
    return parts.cost(heads=rows, written=new, copies=copies)


def throughput(plan: MemoryPlan, rows: int, calls: Calls) -> Throughput:
    """Return tokens per second of so many requests in flight, all of them denoising.

    A turn is one denoiser step for all rows. In the steady state each row ends its block with
    probability 1 / calls.mean in a turn, and those that do share one context extension.
    """
    machine, context = machine_of(plan), plan.context
    step = denoiser_step(plan.model, machine, rows, context, calls.block).total_seconds
    two = len(plan.gpus) == 2
    ends = 1.0 / calls.mean
    shared = 0.0
    for count in range(1, rows + 1):
        call = context_call(plan.model, machine, count, context, calls.block, to_second_gpu=two)
        probability = comb(rows, count) * ends**count * (1 - ends) ** (rows - count)
        shared += probability * call.total_seconds
    turn = step + shared
    return Throughput(
        rows=rows,
        tokens_per_second=rows * calls.tokens_per_call / turn,
        turn_seconds=turn,
        block_seconds=calls.mean * turn,
        slow_block_seconds=calls.quantile(0.95) * turn,
    )


def ar_throughput(plan: MemoryPlan, rows: int) -> float:
    """Return tokens per second of the context tower alone, one token of each row per call."""
    call = context_call(plan.model, machine_of(plan), rows, plan.context, 1)
    return rows / call.total_seconds


def machine_of(plan: MemoryPlan) -> Machine:
    """Return the machine that runs a plan's calls."""
    return Machine(plan.sku, plan.flavour, plan.precision)


class _Parts:
    """Bytes and operations of one call, part by part."""

    def __init__(
        self,
        model: ModelSize,
        machine: Machine,
        tower: Tower,
        rows: int,
        tokens: int,
        context: int,
        table: Routing,
        routing: RoutingKind,
    ) -> None:
        self.model, self.machine, self.rows, self.tokens = model, machine, rows, tokens
        self.context, self.tower = context, tower
        self.compiled = compiled_tower(model.config, tower, machine.way, machine.item)
        self.count = rows * tokens
        self.parameters = parts_of_tower(model.config, tower)
        self.weights = weight_sizes(model, tower, machine.precision)
        self.bandwidth = machine.sku.bandwidth * machine.sku.achieved
        c = model.config
        self.distinct = float(c.num_experts)
        if not machine.reads_all_experts and c.num_experts:
            experts, chosen = c.num_experts, c.num_experts_per_tok
            self.distinct = distinct_experts(table, rows, tokens, experts, chosen, routing)

    def cost(self, *, heads: int, written: float = 0.0, copies: float = 0.0) -> CallCost:
        """Put the parts together.

        Args:
            heads: Positions that the head is applied to.
            written: Bytes of new states.
            copies: Seconds that new states take to reach their slots.
        """
        sizes, flops = self._bytes(written), self._flops(heads)
        sku = self.machine.sku
        rate = sku.flops * MATRIX_EFFICIENCY
        seconds = {
            part: max(size / self.bandwidth, flops.get(part, 0.0) / rate)
            for part, size in sizes.items()
        }
        seconds["launches"] = self._launches() + CALL_SECONDS
        if copies:
            seconds["state copies"] = copies
        return CallCost(self.rows, self.tokens, self.distinct, sizes, flops, seconds)

    def _launches(self) -> float:
        """Return the seconds in which kernels wait to begin."""
        pattern = self.model.config.pattern
        count = self.compiled.call_kernels(pattern)
        if self.machine.flavour == "onnxruntime":
            count = CPU_KERNELS[ENDS] + sum(CPU_KERNELS[kind] for kind in pattern)
        return count * KERNEL_SECONDS[self.machine.flavour]

    def _bytes(self, written: float) -> dict[str, float]:
        model, c, item, n = self.model, self.model.config, self.machine.item, self.count
        w = self.weights
        mamba = self.rows * (ssm_bytes(model.config) + conv_bytes(model.config, item))
        keys = self.rows * self.context * kv_bytes_per_token(model.config, item)
        if self.machine.sku.compute_capability in COPYING:
            keys *= 3  # read and written, and the copy is what attention reads
        moved = self.compiled.moved_bytes(c.pattern, self.rows, self.tokens, self.context)
        return {
            "routed experts": w["routed experts"] * self._share_of_experts(),
            "shared experts": w["shared experts"],
            "router": w["router"],
            "mamba": w["mamba"],
            "attention": w["attention"],
            "states": mamba + keys + written,
            "head": w["head"],
            "activations": moved + w["norms"],
            "embeddings": n * c.hidden_size * item,
            "time conditioning": w["time conditioning"],
        }

    def _share_of_experts(self) -> float:
        count = self.model.config.num_experts
        return self.distinct / count if count else 0.0

    def _flops(self, heads: int) -> dict[str, float]:
        model, c, n, p = self.model, self.model.config, self.count, self.parameters
        each = c.num_experts if self.machine.reads_all_experts else c.num_experts_per_tok
        scores = 4.0 * n * (self.context + self.tokens) * c.num_attention_heads * c.head_dim
        scan = 6.0 * n * c.mamba_num_heads * c.mamba_head_dim * c.ssm_state_size
        return {
            "routed experts": 2.0 * n * model.layers("E") * each * model.expert_parameters,
            "shared experts": 2.0 * n * p["shared experts"],
            "router": 2.0 * n * p["router"],
            "mamba": 2.0 * n * p["mamba"] + model.layers("M") * scan,
            "attention": 2.0 * n * p["attention"] + model.layers("*") * scores,
            "head": 2.0 * heads * p["head"],
            "time conditioning": 2.0 * self.rows * p["time conditioning"],
        }
