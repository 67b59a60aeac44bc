"""Each node's inputs at the released model's sizes, or at small ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twotower_contract.quantized import input_forms
from twotower_engines.kernels.mamba_spans import span_sizes, span_slots
from twotower_engines.kernels.node import Call, Node
from twotower_engines.kernels.spec import Sizes

INTEGERS = (
    *("indices", "pairs", "few", "many", "lengths", "ids", "policy", "seed", "steps_left"),
    "partial_ids",
)
FLOATS = (
    "span_states",
    "span_decays",
    "weights",
    "partial",
    "ssm_state",
    "threshold",
    "temperature",
    "partials",
    "matrix",
    "router_logits",
)
LARGEST_BLOCK = 64


def tensor_shapes(sizes: Sizes, rows: int, block: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of every op's chain."""
    s, E, K = sizes, sizes.experts, sizes.experts_per_token
    d_inner = s.heads * s.head_dim
    conv_dim = d_inner + 2 * s.groups * s.state
    projected = d_inner + conv_dim + s.heads
    tokens = rows * block
    pairs = (tokens * K,)
    turned = s.experts_format == "fp8"
    slots = span_slots(rows, span_sizes(rows, block)[0])
    packed = 8 if s.experts_format in ("int4", "nvfp4") else 1  # codes in a word
    return {
        "projected": (rows, block, projected),
        "scanned": (rows, block, d_inner),
        "convolution": (rows, block, conv_dim),
        "span_states": (slots, s.heads, s.head_dim, s.state),
        "span_decays": (slots, s.heads),
        "conv_state": (rows, 3, conv_dim),
        "ssm_state": (rows, s.heads, s.head_dim, s.state),
        "weight": (conv_dim, 4),
        "bias": (conv_dim,),
        "norm_weight": (d_inner,),
        **dict.fromkeys(("dt_bias", "A_log", "D"), (s.heads,)),
        **dict.fromkeys(("lengths", "threshold", "steps_left", "temperature"), (rows,)),
        **dict.fromkeys(("policy", "seed"), (rows,)),
        "logits": (rows, block, s.vocab_size),
        "ids": (rows, block),
        "partials": (rows, block, 5, 16),
        "partial_ids": (rows, block, 16),
        "x": (rows, block, s.hidden),
        **dict.fromkeys(("shared", "hidden"), (tokens, s.hidden)),
        "gate": (rows, 1, s.hidden),
        **dict.fromkeys(("indices", "weights"), (tokens, K)),
        "pairs": pairs,
        **{
            name: (min(pairs[0], pairs[0] // size + E), 4)
            for name, size in (("few", 16), ("many", 64))
        },
        "up": (E, *((s.hidden, s.inner) if turned else (s.inner, s.hidden // packed))),
        "down": (E, *((s.inner, s.hidden) if turned else (s.hidden, s.inner // packed))),
        "matrix": (s.experts if packed == 1 else projected, s.hidden // packed),
        "correction": (s.experts,),
        "router_logits": (tokens, s.experts),
        **_scales(s, "up", (E, s.inner, s.hidden)),
        **_scales(s, "down", (E, s.hidden, s.inner)),
        **_scales(s, "matrix", (projected, s.hidden)),
        "inner": (*pairs, s.inner),
        "partial": (*pairs, s.hidden),
    }


def _scales(s: Sizes, name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what stands beside codes, as a graph's inputs have them."""
    dtype = {"fp8": "F8_E4M3", "int4": "I32", "nvfp4": "U8"}.get(s.experts_format)
    if dtype is None:
        return {}
    forms = input_forms(name, dtype, shape, "BF16", 64)
    return {one: dims for one, (_, dims) in forms.items() if one != name}


def form_of(node: Node) -> str:
    """Return the format of a node's banks: the end of its name tells."""
    return next(
        (form for form in ("nvfp4", "fp8", "int4") if node.name.lower().endswith(form)), "plain"
    )


def dtype_of(name: str, form: str = "plain") -> str:
    """Return a tensor's type in a bf16 model whose banks have a format."""
    if name in ("up", "down", "matrix") and form != "plain":
        return "fp8" if form == "fp8" else "i32"
    if name.endswith("_scale"):
        return "i32" if form == "nvfp4" else "bf16"
    if name.endswith("_scale_2"):
        return "fp32"
    return "i32" if name in INTEGERS else "fp32" if name in FLOATS else "bf16"


def attributes_of(node: Node, sizes: Sizes) -> Mapping[str, Any]:
    """Return a node's attributes, in the denoiser, which has a gate."""
    known = {
        "mask_id": sizes.mask_id,
        "num_experts": sizes.experts,
        "n_groups": sizes.groups,
        "gated": 1,
        "per_token": sizes.experts_per_token,
        "normalized": 1,
        "scaling": sizes.scaling,
        "epsilon": sizes.epsilon,
    }
    return {name: known[name] for name in node.attributes}


def released_call(node: Node, rows: int, block: int, tactic: int) -> Call:
    """Return a node's call in a profile whose blocks have up to `LARGEST_BLOCK` tokens."""
    form = form_of(node)
    sizes = Sizes(experts_format=form)

    def of_node(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        return {name: shapes[name] for name in node.takes}

    return Call(
        of_node(tensor_shapes(sizes, rows, block)),
        of_node(tensor_shapes(sizes, rows, LARGEST_BLOCK)),
        {name: dtype_of(name, form) for name in node.takes},
        attributes_of(node, sizes),
        tactic=tactic,
    )
