"""Each op as a chain of nodes with one kernel launch each, as TensorRT's plugins must be.

`OPS` is the table: the tensors of each op and the nodes that compute it. A node knows the shapes of
its outputs and how its kernel is launched, as arithmetic on the dimensions of its inputs. The
arithmetic works on integers and on TensorRT's symbolic dimensions: see `node`, whose words these
are. `plugin_graph` puts the chains into a graph.
"""

from __future__ import annotations

from twotower_engines.kernels import mamba, refine, vocabulary
from twotower_engines.kernels.expert_nodes import EXPERT_OPS
from twotower_engines.kernels.linear_nodes import LINEAR_OPS
from twotower_engines.kernels.node import (
    Call,
    Dim,
    Launching,
    Node,
    Op,
    Output,
    integer_cdiv,
    spec_of,
)
from twotower_engines.kernels.router_nodes import ROUTER
from twotower_engines.kernels.spec import Sizes

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
    spec = spec_of("refine_vocabulary", refine.specs(sizes), call)
    return Launching(spec, (_splits(call), S, B), {"S": S, "TILES": _tiles(call)})


def _decision_outputs(call: Call) -> tuple[Output, ...]:
    B, S = call.dims["ids"]
    block = (B, S)
    return Output("i32", block), Output("fp32", block), Output("i32", block), Output("i32", (B,))


def _decision(call: Call) -> Launching:
    B, S = call.dims["ids"]
    sizes = _refine_sizes(call, call.size("logits", 2), call.dtypes["logits"])
    spec = spec_of("refine_decision", refine.specs(sizes), call)
    return Launching(spec, (B,), {"S": S, "P": call.dims["partials"][3]})


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
    spec = spec_of(name, mamba.specs(sizes), call)
    parts = integer_cdiv(sizes.head_dim, spec.launch.constants["BLOCK_P"])
    chunks = 1 if call.attributes["states"] else call.cdiv(L, mamba.CHUNK)
    return Launching(spec, (sizes.heads * parts, B, chunks), {"L": L})


def _norm_outputs(call: Call) -> tuple[Output, ...]:
    return (Output(call.dtypes["scanned"], tuple(call.dims["scanned"])),)


def _norm(call: Call) -> Launching:
    B, L, _ = call.dims["scanned"]
    spec = spec_of("mamba_norm", mamba.specs(_mamba_sizes(call)), call)
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
    "Router": ROUTER,
    **EXPERT_OPS,
    **LINEAR_OPS,
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
