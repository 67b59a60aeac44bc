"""Each op as a chain of nodes with one kernel launch each, as TensorRT's plugins must be.

`OPS` is the table: the tensors of each op and the nodes that compute it. A node knows the shapes of
its outputs and how its kernel is launched, as arithmetic on the dimensions of its inputs. The
arithmetic works on integers, for tests, and on TensorRT's symbolic dimensions, in `plugins`;
nothing here imports TensorRT. `plugin_graph` puts the chains into a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from twotower_engines.errors import BuildError
from twotower_engines.kernels import experts, mamba, refine, vocabulary
from twotower_engines.kernels.spec import KernelSpec, Sizes

NAMESPACE = "twotower"
"""ONNX domain of the ops and nodes, and TensorRT's namespace of the plugins."""

Dim = Any
"""A dimension: an integer, or a symbolic expression with + - * // whose size is known later."""

POINTERS = {"bf16": "*bf16", "fp32": "*fp32", "i32": "*i32"}


def integer_cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


@dataclass(frozen=True)
class Call:
    """One node's inputs, while it is put into a network.

    Attributes:
        dims: Input name to its dimensions.
        largest: Input name to its largest dimensions in the profile, as integers; empty while
            TensorRT only asks for shapes.
        dtypes: Input name to "bf16", "fp32" or "i32".
        attributes: Attribute name to its value.
        cdiv: Division of dimensions, rounded up.
        minimum: The smaller of two dimensions.
        usual: As `largest`, for the calls that the profile is tuned for. Tiles are chosen by it: a
            kernel is right for any size, and fastest for this one.
    """

    dims: Mapping[str, Sequence[Dim]]
    largest: Mapping[str, Sequence[int]]
    dtypes: Mapping[str, str]
    attributes: Mapping[str, Any]
    cdiv: Callable[[Dim, Any], Dim] = integer_cdiv
    minimum: Callable[[Dim, Any], Dim] = min
    usual: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def size(self, name: str, axis: int) -> int:
        """Return an input's largest size along an axis.

        Raises:
            BuildError: TensorRT does not know it.
        """
        size = int(self.largest[name][axis])
        if size < 0:
            raise BuildError(f"the plugin's input {name} has no bound along axis {axis}")
        return size

    def tokens(self, name: str) -> int:
        """Return the usual size along an input's first axis; a block's where it is unknown."""
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
    """One plugin: one kernel launch of an op's chain.

    Attributes:
        name: Name of the plugin.
        takes: Tensors of the op, or of earlier nodes, in the order of the node's inputs. A tensor
            that the kernel has no parameter for is passed all the same, and ignored: it tells
            sizes, or is for the node's function.
        makes: Tensors that the node computes, in order.
        attributes: Attribute name to its type.
        outputs: Returns the types and dimensions of what a call makes.
        launching: Returns the launch of a call whose largest sizes are known.
        function: Body for an engine without the plugin. "op": the op itself, on
            the node's first inputs; "same": the second input; "nothing": a constant, because the
            nodes that follow do not look at it.
    """

    name: str
    takes: tuple[str, ...]
    makes: tuple[str, ...]
    attributes: Mapping[str, type]
    outputs: Callable[[Call], tuple[Output, ...]]
    launching: Callable[[Call], Launching]
    function: str


@dataclass(frozen=True)
class Op:
    """An op of the exported graphs: its tensors in order, and the nodes that compute it."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    chain: tuple[Node, ...]


def _spec(name: str, specs: Sequence[KernelSpec], call: Call) -> KernelSpec:
    """Return the specification of that name, with the types that the inputs really have."""
    (spec,) = [spec for spec in specs if spec.name == name]
    given = {name: POINTERS[call.dtypes[name]] for name in spec.types if name in call.dtypes}
    return replace(spec, types={**spec.types, **given})


# RefineBlock

REFINE_INPUTS = tuple(
    "logits ids lengths threshold steps_left temperature policy seed".split()  # noqa: SIM905
)
REFINE_OUTPUTS = ("new_ids", "confidence", "committed", "still_masked")


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
    """Return the sizes of a model; tiles do not depend on the length of the block."""
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
    """Return the shape of a new state, or of one number that nobody reads."""
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


OPS = {
    "RefineBlock": Op(
        REFINE_INPUTS,
        REFINE_OUTPUTS,
        (
            Node(
                "RefineVocabulary",
                ("logits", "ids", "lengths", "temperature", "policy", "seed"),
                ("partials", "partial_ids"),
                {"mask_id": int},
                _vocabulary_outputs,
                _vocabulary,
                "nothing",
            ),
            Node(
                "RefineDecision",
                (*REFINE_INPUTS, "partials", "partial_ids"),
                REFINE_OUTPUTS,
                {"mask_id": int},
                _decision_outputs,
                _decision,
                "op",
            ),
        ),
    ),
    "SparseExperts": Op(
        ("x", "indices", "weights", "up", "down"),
        ("y",),
        (
            Node(
                "ExpertsRoute",
                ("indices",),
                ("counts", "pairs"),
                {"num_experts": int},
                _route_outputs,
                _route,
                "nothing",
            ),
            Node(
                "ExpertsUp",
                ("x", "up", "counts", "pairs", "indices"),
                ("inner",),
                {},
                _up_outputs,
                _up,
                "nothing",
            ),
            Node(
                "ExpertsDown",
                ("inner", "down", "counts", "pairs", "indices"),
                ("partial",),
                {},
                _down_outputs,
                _down,
                "nothing",
            ),
            Node(
                "ExpertsSum",
                ("x", "indices", "weights", "up", "down", "partial"),
                ("y",),
                {},
                _sum_outputs,
                _sum,
                "op",
            ),
        ),
    ),
    "MambaBlockStep": Op(
        MAMBA_INPUTS,
        ("y", "conv_state_new", "ssm_state_new"),
        (
            Node(
                "MambaScan",
                MAMBA_INPUTS,
                ("scanned", "conv_state_new", "ssm_state_new"),
                {"n_groups": int, "states": int},
                _scan_outputs,
                _scan,
                "op",
            ),
            Node(
                "MambaNorm",
                ("projected", "scanned", "lengths", "norm_weight", "ssm_state"),
                ("y",),
                {"n_groups": int, "epsilon": float},
                _norm_outputs,
                _norm,
                "same",
            ),
        ),
    ),
}
"""The ops by name, each with its chain in the order in which a step meets it."""
