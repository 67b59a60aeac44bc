"""Each op as a chain of nodes with one kernel launch each, as TensorRT's plugins must be.

`OPS` is the table: the tensors of each op and the nodes that compute it. A node knows the shapes of
its outputs and how its kernel is launched, as arithmetic on the dimensions of its inputs. The
arithmetic works on integers and on TensorRT's symbolic dimensions: see `node`, whose words these
are. `plugin_graph` puts the chains into a graph.
"""

from __future__ import annotations

import functools

from twotower_engines.kernels import mamba, mamba_chunk, mamba_spans, refine, vocabulary
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
from twotower_engines.kernels.spec import KernelSpec, Sizes

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
MAMBA_OUTPUTS = ("y", "conv_state_new", "ssm_state_new")
SPANS = ("convolution", "span_states", "span_decays")


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


def _scanned(call: Call) -> Output:
    B, L, _ = call.dims["projected"]
    width = call.dims["ssm_state"][1] * call.dims["ssm_state"][2]
    return Output(call.dtypes["projected"], (B, L, width))


def _scan(call: Call) -> Launching:
    B, L, _ = call.dims["projected"]
    sizes = _mamba_sizes(call)
    spec = spec_of("mamba_scan", mamba.specs(sizes), call)
    return Launching(spec, (_programs(spec, sizes), B, call.cdiv(L, mamba_chunk.CHUNK)), {"L": L})


def _programs(spec: KernelSpec, sizes: Sizes) -> int:
    """Return the programs that share the heads of a row."""
    return sizes.heads * integer_cdiv(sizes.head_dim, spec.launch.constants["BLOCK_P"])


def _span_sizes(call: Call) -> tuple[Dim, Dim]:
    B, L, _ = call.dims["projected"]
    return mamba_spans.span_sizes(B, L, call.cdiv, call.minimum)


def _spans_outputs(call: Call) -> tuple[Output, ...]:
    B, L, _ = call.dims["projected"]
    slots = mamba_spans.span_slots(B, _span_sizes(call)[0])
    _, H, P, N = call.dims["ssm_state"]
    return (
        Output(call.dtypes["projected"], (B, L, call.dims["conv_state"][2])),
        Output("fp32", (slots, H, P, N)),
        Output("fp32", (slots, H)),
    )


def _over_spans(name: str, call: Call) -> Launching:
    """Return a launch with a program for each head, or part of one, of each span."""
    B, L, _ = call.dims["projected"]
    sizes = _mamba_sizes(call)
    spec = spec_of(name, mamba.specs(sizes), call)
    spans, span = _span_sizes(call)
    return Launching(spec, (_programs(spec, sizes), B, spans), {"L": L, "span": span})


def _states_outputs(call: Call) -> tuple[Output, ...]:
    states = ("conv_state", "ssm_state")
    return _scanned(call), *(Output(call.dtypes[s], tuple(call.dims[s])) for s in states)


def _norm_outputs(call: Call) -> tuple[Output, ...]:
    return (Output(call.dtypes["scanned"], tuple(call.dims["scanned"])),)


def _norm(call: Call) -> Launching:
    B, L, _ = call.dims["scanned"]
    spec = spec_of("mamba_norm", mamba.specs(_mamba_sizes(call)), call)
    return Launching(spec, (call.attributes["n_groups"], L, B), {"L": L})


NORM = Node(
    "MambaNorm",
    ("projected", "scanned", "lengths", "norm_weight", "ssm_state"),
    ("y",),
    {"n_groups": int, "epsilon": float},
    _norm_outputs,
    _norm,
    "same",
)

STATES = "States"
"""End of the name of an op's chain for graphs that want the new states."""

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
        MAMBA_OUTPUTS,
        (
            Node(
                "MambaScan",
                MAMBA_INPUTS,
                ("scanned",),
                {"n_groups": int},
                lambda call: (_scanned(call),),
                _scan,
                "op",
            ),
            NORM,
        ),
    ),
    f"MambaBlockStep{STATES}": Op(
        MAMBA_INPUTS,
        MAMBA_OUTPUTS,
        (
            Node(
                "MambaSpans",
                MAMBA_INPUTS,
                SPANS,
                {"n_groups": int},
                _spans_outputs,
                functools.partial(_over_spans, "mamba_spans"),
                "nothing",
            ),
            Node(
                "MambaScanStates",
                (*MAMBA_INPUTS, *SPANS),
                ("scanned", *MAMBA_OUTPUTS[1:]),
                {"n_groups": int},
                _states_outputs,
                lambda call: _over_spans(f"mamba_scan_states.{call.tactic}", call),
                "op",
                mamba_spans.TACTICS,
            ),
            NORM,
        ),
    ),
}
"""The ops by name, each with its chain in the order in which a step meets it. A name with
`STATES` at its end is no op of the graphs."""

NODES = {node.name: node for op in OPS.values() for node in op.chain}
"""The nodes of all chains by name; chains share some."""
