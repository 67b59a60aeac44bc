"""Each op as a chain of nodes with one kernel launch each, as TensorRT's plugins must be.

A node knows the shapes of its outputs and how its kernel is launched, as arithmetic on the
dimensions of its inputs. The arithmetic works on integers, for tests, and on TensorRT's symbolic
dimensions, in `twotower_engines.kernels.plugins`; nothing here imports TensorRT.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from twotower_engines.errors import BuildError
from twotower_engines.kernels import experts, mamba, refine, vocabulary
from twotower_engines.kernels.spec import KernelSpec, Sizes

__all__ = ["CHAINS", "NODES", "Call", "Launching", "Link", "Node", "Output"]

Dim = Any
"""A dimension: an integer or a symbolic expression with + - * // and a size unknown until later."""

POINTERS = {"bf16": "*bf16", "fp32": "*fp32", "i32": "*i32"}


def integer_cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


@dataclass(frozen=True)
class Call:
    """One node's inputs, while it is put into a network.

    Attributes:
        dims: dimensions of each input, by name.
        largest: the same as integers, the largest of the profile; empty while TensorRT only asks
            for shapes.
        dtypes: "bf16", "fp32" or "i32" of each input.
        attributes: by name.
        cdiv: division rounded up, on dimensions.
        minimum: the smaller of two dimensions.
        usual: as `largest`, of the calls that the profile is tuned for. Tiles are chosen by it: a
            kernel is right for any size, and as fast as it can be for this one.
    """

    dims: Mapping[str, Sequence[Dim]]
    largest: Mapping[str, Sequence[int]]
    dtypes: Mapping[str, str]
    attributes: Mapping[str, Any]
    cdiv: Callable[[Dim, Any], Dim] = integer_cdiv
    minimum: Callable[[Dim, Any], Dim] = min
    usual: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def size(self, name: str, axis: int) -> int:
        """An input's largest size along an axis.

        Raises:
            BuildError: TensorRT does not know it.
        """
        size = int(self.largest[name][axis])
        if size < 0:
            raise BuildError(f"the plugin's input {name} has no bound along axis {axis}")
        return size

    def tokens(self, name: str) -> int:
        """The usual size along an input's first axis; a block's where TensorRT does not know it."""
        known = int(self.usual[name][0]) if name in self.usual else -1
        return known if known > 0 else Sizes().block


@dataclass(frozen=True)
class Output:
    """An output's type and dimensions."""

    dtype: str
    dims: tuple[Dim, ...]


@dataclass(frozen=True)
class Launching:
    """A kernel, its grid and its integer arguments by name."""

    spec: KernelSpec
    grid: tuple[Dim, ...]
    integers: Mapping[str, Dim]


@dataclass(frozen=True)
class Node:
    """One plugin.

    Attributes:
        inputs: names, in the node's order. Those that the kernel has no parameter for are passed
            to it all the same, and ignored: they tell sizes, or are for the node's function.
        attributes: types by name.
        outputs: of a call, in order; named as in the kernel.
        launching: of a call whose largest sizes are known.
    """

    name: str
    inputs: tuple[str, ...]
    attributes: Mapping[str, type]
    outputs: Callable[[Call], tuple[Output, ...]]
    launching: Callable[[Call], Launching]


def _spec(name: str, specs: Sequence[KernelSpec], call: Call) -> KernelSpec:
    """The specification of that name, with the types that the inputs really have."""
    (spec,) = [spec for spec in specs if spec.name == name]
    given = {name: POINTERS[call.dtypes[name]] for name in spec.types if name in call.dtypes}
    return replace(spec, types={**spec.types, **given})


# RefineBlock

REFINE_INPUTS = tuple(
    "logits ids lengths threshold steps_left temperature policy seed".split()  # noqa: SIM905
)


def _refine_sizes(call: Call, vocab_size: int, dtype: str) -> Sizes:
    block = call.size("ids", 1)
    return Sizes(
        vocab_size=vocab_size, mask_id=call.attributes["mask_id"], block=block, dtype=dtype
    )


def _tiles(call: Call) -> Dim:
    return vocabulary.tiles(call.dims["logits"][0], call.minimum)


def _splits(call: Call) -> Dim:
    return call.cdiv(call.dims["logits"][2], _tiles(call) * vocabulary.TILE)


def _vocabulary_outputs(call: Call) -> tuple[Output, ...]:
    B, S, _ = call.dims["logits"]
    P = _splits(call)
    return Output("fp32", (B, S, vocabulary.FIELDS, P)), Output("i32", (B, S, P))


def _vocabulary(call: Call) -> Launching:
    B, S, _ = call.dims["logits"]
    sizes = _refine_sizes(call, call.size("logits", 2), call.dtypes["logits"])
    spec = _spec("refine_vocabulary", refine.specs(sizes), call)
    return Launching(spec, (_splits(call), S, B), {"S": S, "TILES": _tiles(call)})


def _decision_outputs(call: Call) -> tuple[Output, ...]:
    B, S = call.dims["ids"]
    block = (B, S)
    return Output("i32", block), Output("fp32", block), Output("i32", block), Output("i32", (B,))


def _decision(call: Call) -> Launching:
    B, S = call.dims["ids"]
    sizes = _refine_sizes(call, call.size("logits", 2), call.dtypes["logits"])
    spec = _spec("refine_decision", refine.specs(sizes), call)
    return Launching(spec, (B,), {"S": S, "P": call.dims["partials"][3]})


# SparseExperts


def _expert_sizes(call: Call, tokens: int, per_token: int, weight: str, transposed: bool) -> Sizes:
    outer, inner = call.size(weight, 1), call.size(weight, 2)
    hidden, width = (outer, inner) if transposed else (inner, outer)
    return Sizes(
        hidden=hidden,
        inner=width,
        experts=call.size(weight, 0),
        experts_per_token=per_token,
        rows=tokens,
        block=1,
        dtype=call.dtypes[weight],
    )


def _route_outputs(call: Call) -> tuple[Output, ...]:
    n, K = call.dims["indices"]
    return Output("i32", (call.attributes["num_experts"],)), Output("i32", (n * K,))


def _route(call: Call) -> Launching:
    n, K = call.dims["indices"]
    spec = _spec("route_tokens", experts.specs(Sizes()), call)
    return Launching(spec, (call.attributes["num_experts"],), {"PAIRS": n * K})


def _matmul(call: Call, name: str, sizes: Sizes, features: int) -> Launching:
    spec = _spec(name, experts.specs(sizes), call)
    pairs, tile = call.dims["pairs"][0], spec.launch.constants
    bound = call.minimum(pairs, pairs // tile["BLOCK_T"] + sizes.experts)
    return Launching(spec, (integer_cdiv(features, tile["BLOCK_F"]), bound), {"PAIRS": pairs})


def _up_outputs(call: Call) -> tuple[Output, ...]:
    return (Output(call.dtypes["x"], (call.dims["pairs"][0], call.dims["up"][1])),)


def _up(call: Call) -> Launching:
    per_token = call.size("indices", 1)
    sizes = _expert_sizes(call, call.tokens("x"), per_token, "up", transposed=False)
    return _matmul(call, "experts_up", sizes, sizes.inner)


def _down_outputs(call: Call) -> tuple[Output, ...]:
    return (Output("fp32", (call.dims["pairs"][0], call.dims["down"][1])),)


def _down(call: Call) -> Launching:
    per_token = call.size("indices", 1)
    sizes = _expert_sizes(call, call.tokens("indices"), per_token, "down", transposed=True)
    return _matmul(call, "experts_down", sizes, sizes.hidden)


def _sum_outputs(call: Call) -> tuple[Output, ...]:
    return (Output(call.dtypes["x"], tuple(call.dims["x"])),)


def _sum(call: Call) -> Launching:
    per_token = call.size("indices", 1)
    sizes = _expert_sizes(call, call.tokens("x"), per_token, "up", transposed=False)
    spec = _spec("experts_sum", experts.specs(sizes), call)
    tiles = integer_cdiv(sizes.hidden, spec.launch.constants["BLOCK_F"])
    return Launching(spec, (call.dims["x"][0], tiles), {})


# MambaBlockStep

MAMBA_INPUTS = tuple(
    "projected conv_state ssm_state lengths weight bias dt_bias A_log D norm_weight".split()  # noqa: SIM905
)


def _mamba_sizes(call: Call) -> Sizes:
    """Tiles do not depend on the block's length: the scan is made for any."""
    heads, head_dim, state = (call.size("ssm_state", axis) for axis in (1, 2, 3))
    return Sizes(
        heads=heads,
        head_dim=head_dim,
        state=state,
        groups=call.attributes["n_groups"],
        dtype=call.dtypes["projected"],
        epsilon=call.attributes.get("epsilon", 0.0),
    )


def _where_wanted(call: Call, name: str) -> Output:
    """A new state, or one number that nobody reads."""
    dims = tuple(call.dims[name]) if call.attributes["states"] else (1,)
    return Output(call.dtypes[name], dims)


def _scan_outputs(call: Call) -> tuple[Output, ...]:
    B, L, _ = call.dims["projected"]
    width = call.dims["ssm_state"][1] * call.dims["ssm_state"][2]
    scanned = Output(call.dtypes["projected"], (B, L, width))
    return scanned, _where_wanted(call, "conv_state"), _where_wanted(call, "ssm_state")


def _scan(call: Call) -> Launching:
    B, L, _ = call.dims["projected"]
    sizes = _mamba_sizes(call)
    name = "mamba_scan_states" if call.attributes["states"] else "mamba_scan"
    spec = _spec(name, mamba.specs(sizes), call)
    parts = integer_cdiv(sizes.head_dim, spec.launch.constants["BLOCK_P"])
    chunks = 1 if call.attributes["states"] else call.cdiv(L, mamba.CHUNK)
    return Launching(spec, (sizes.heads * parts, B, chunks), {"L": L})


def _norm_outputs(call: Call) -> tuple[Output, ...]:
    return (Output(call.dtypes["scanned"], tuple(call.dims["scanned"])),)


def _norm(call: Call) -> Launching:
    B, L, _ = call.dims["scanned"]
    spec = _spec("mamba_norm", mamba.specs(_mamba_sizes(call)), call)
    return Launching(spec, (call.attributes["n_groups"], L, B), {"L": L})


NODES = (
    Node(
        "RefineVocabulary",
        ("logits", "ids", "lengths", "temperature", "policy", "seed"),
        {"mask_id": int},
        _vocabulary_outputs,
        _vocabulary,
    ),
    Node(
        "RefineDecision",
        (*REFINE_INPUTS, "partials", "partial_ids"),
        {"mask_id": int},
        _decision_outputs,
        _decision,
    ),
    Node("ExpertsRoute", ("indices",), {"num_experts": int}, _route_outputs, _route),
    Node("ExpertsUp", ("x", "up", "counts", "pairs", "indices"), {}, _up_outputs, _up),
    Node("ExpertsDown", ("inner", "down", "counts", "pairs", "indices"), {}, _down_outputs, _down),
    Node(
        "ExpertsSum",
        ("x", "indices", "weights", "up", "down", "partial"),
        {},
        _sum_outputs,
        _sum,
    ),
    Node("MambaScan", MAMBA_INPUTS, {"n_groups": int, "states": int}, _scan_outputs, _scan),
    Node(
        "MambaNorm",
        ("projected", "scanned", "lengths", "weight", "ssm_state"),
        {"n_groups": int, "epsilon": float},
        _norm_outputs,
        _norm,
    ),
)
"""Every plugin, in the order in which a step meets them."""


@dataclass(frozen=True)
class Link:
    """One node of a chain: which tensors of the op, or of an earlier link, it takes and makes.

    Attributes:
        function: what an engine without the plugin computes in its place. "op": the op itself, on
            the link's first inputs; "same": its second input; "nothing": a constant, since what
            follows does not look at it.
    """

    node: str
    takes: tuple[str, ...]
    makes: tuple[str, ...]
    function: str


REFINE_OUTPUTS = ("new_ids", "confidence", "committed", "still_masked")

CHAINS = {
    "RefineBlock": (
        Link(
            "RefineVocabulary",
            ("logits", "ids", "lengths", "temperature", "policy", "seed"),
            ("partials", "partial_ids"),
            "nothing",
        ),
        Link("RefineDecision", (*REFINE_INPUTS, "partials", "partial_ids"), REFINE_OUTPUTS, "op"),
    ),
    "SparseExperts": (
        Link("ExpertsRoute", ("indices",), ("counts", "pairs"), "nothing"),
        Link("ExpertsUp", ("x", "up", "counts", "pairs", "indices"), ("inner",), "nothing"),
        Link(
            "ExpertsDown", ("inner", "down", "counts", "pairs", "indices"), ("partial",), "nothing"
        ),
        Link("ExpertsSum", ("x", "indices", "weights", "up", "down", "partial"), ("y",), "op"),
    ),
    "MambaBlockStep": (
        Link("MambaScan", MAMBA_INPUTS, ("scanned", "conv_state_new", "ssm_state_new"), "op"),
        Link(
            "MambaNorm",
            ("projected", "scanned", "lengths", "norm_weight", "ssm_state"),
            ("y",),
            "same",
        ),
    ),
}
"""The chain of each op. A link's tensors are named as the op's inputs and outputs, or as made by
an earlier link."""

OP_INPUTS = {
    "RefineBlock": REFINE_INPUTS,
    "SparseExperts": ("x", "indices", "weights", "up", "down"),
    "MambaBlockStep": MAMBA_INPUTS,
}
OP_OUTPUTS = {
    "RefineBlock": REFINE_OUTPUTS,
    "SparseExperts": ("y",),
    "MambaBlockStep": ("y", "conv_state_new", "ssm_state_new"),
}
