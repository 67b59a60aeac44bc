"""The recurrence of a Mamba step in a CPU's own operators.

Several tokens are a few products of matrices, which take a third of the time of ONNX Runtime's
operator for the recurrence: that one goes from token to token, and is used for single ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from twotower_engines.runtime.nodes import MICROSOFT, Nodes

CHUNK = 16
"""Tokens of a product. A row whose tokens share a call with longer ones gives the same values as
alone, since whole chunks follow that change nothing."""


def whole_chunks(tokens: int) -> int:
    """Return the tokens that a call is filled up to: the context tower takes whole chunks."""
    return tokens if tokens <= CHUNK else -(-tokens // CHUNK) * CHUNK


@dataclass(frozen=True)
class Sizes:
    """Heads, their columns, rows of a head's state, and groups of heads."""

    H: int
    P: int
    N: int
    G: int


class Given(NamedTuple):
    """Inputs of a step's recurrence.

    Attributes:
        x: [B, L, H * P].
        B: [B, L, G * N].
        C: [B, L, G * N].
        dt: [B, L, H]; zero past the length of a row.
        rate: [H], negative: a state decays by exp(dt * rate) per token.
        state: [B, H, N, P], the one before the first token.
    """

    x: str
    B: str
    C: str
    dt: str
    rate: str
    state: str


def scan(b: Nodes, sizes: Sizes, given: Given) -> tuple[str, str]:
    """Return the recurrence token by token, [B, L, H * P], and the new state."""
    heads = b.add("Reshape", given.x, b.constant([0, 0, sizes.H, sizes.P]))
    moved = b.add("Mul", heads, b.add("Unsqueeze", given.dt, b.constant([3])))
    moved = b.add("Reshape", moved, b.constant([0, 0, sizes.H * sizes.P]))
    new_state = f"{b.prefix}.new_state"
    scanned = b.add(
        "LinearAttention",
        *(given.C, given.B, moved, given.state, b.add("Mul", given.dt, given.rate)),
        others=[new_state],
        domain=MICROSOFT,
        update_rule="gated",
        q_num_heads=sizes.G,
        kv_num_heads=sizes.H,
        scale=1.0,
    )
    return scanned, new_state


def products(b: Nodes, sizes: Sizes, given: Given, chunks: str | None = None) -> tuple[str, ...]:
    """Return the recurrence as products of matrices, [B, L, H * P], and the new state.

    With c the sums of dt * rate up to each token of a chunk (Mamba-2, arXiv:2405.21060, section 6):
    y_i = sum over j <= i of exp(c_i - c_j) dt_j (C_i . B_j) x_j, plus exp(c_i) C_i state, where the
    state is that before the chunk; after it, it is
    exp(c_last) state + sum over j of exp(c_last - c_j) dt_j B_j x_j.

    Args:
        b: Where the nodes go.
        sizes: Of the step.
        given: Its inputs.
        chunks: int64 [3]: 0, the number of chunks and their tokens. Without it all tokens are one
            chunk, and there is no new state.
    """
    H, P, N, G = sizes.H, sizes.P, sizes.N, sizes.G
    R = H // G

    def turned(x: str, parts: list[int], perm: list[int]) -> str:
        """Return [B, L, ...] with parts of the last dimension, in another order, chunks first."""
        if chunks is None:
            shape = b.constant([0, 0, *parts])
        else:
            shape = b.add("Concat", chunks, b.constant(parts), axis=0)
            perm = [1, 0, *(axis + 1 for axis in perm[1:])]
        return b.add("Transpose", b.add("Reshape", x, shape), perm=perm)

    x = turned(given.x, [G, R, P], [0, 2, 3, 1, 4])  # [..., B, G, R, L, P]
    C = turned(given.C, [G, N], [0, 2, 1, 3])  # [..., B, G, L, N]
    B = turned(given.B, [G, N], [0, 2, 3, 1])  # [..., B, G, N, L]
    dt = turned(given.dt, [G, R], [0, 2, 3, 1])  # [..., B, G, R, L]
    rate = b.add("Reshape", given.rate, b.constant([G, R, 1]))
    sums = b.add("CumSum", b.add("Mul", dt, rate), b.constant(-1))
    column = b.add("Unsqueeze", sums, b.constant([-1]))
    row = b.add("Unsqueeze", b.add("Sub", sums, b.add("Log", dt)), b.constant([-2]))
    # exp(c_i - c_j) dt_j; past the diagonal it may be infinite: it is left out, not multiplied
    moved = b.add("Trilu", b.add("Exp", b.add("Sub", column, row)), upper=0)
    alike = b.add("Unsqueeze", b.add("MatMul", C, B), b.constant([-3]))
    inside = b.add("MatMul", b.add("Mul", moved, alike), x)
    state = b.add("Reshape", given.state, b.constant([0, G, R, N, P]))
    fading = b.add("Exp", column)
    new_states = []
    if chunks is not None:
        state, new_state = _states(b, state, x, B, moved, fading)
        new_states.append(b.add("Reshape", new_state, b.constant([0, H, N, P])))
    before = b.add("MatMul", b.add("Unsqueeze", C, b.constant([-3])), state)
    y = b.add("Add", inside, b.add("Mul", before, fading))
    perm = [0, 3, 1, 2, 4] if chunks is None else [1, 0, 4, 2, 3, 5]
    y = b.add("Transpose", y, perm=perm)
    if chunks is not None:
        y = b.add("Reshape", y, b.constant([0, -1, G, R, P]))
    return b.add("Reshape", y, b.constant([0, 0, H * P])), *new_states


def _states(b: Nodes, state: str, x: str, B: str, moved: str, fading: str) -> tuple[str, str]:
    """Return the states before each chunk, and that after the last.

    Args:
        b: Where the nodes go.
        state: [B, G, R, N, P], the one before the first chunk.
        x: [chunks, B, G, R, L, P].
        B: [chunks, B, G, N, L].
        moved: [chunks, B, G, R, L, L]: what reaches token i of token j.
        fading: [chunks, B, G, R, L, 1]: what reaches token i of the state.
    """
    last = b.constant([-1]), b.constant([2**62]), b.constant([-2])
    weights = b.add("Transpose", b.add("Slice", moved, *last), perm=[0, 1, 2, 3, 5, 4])
    added = b.add("MatMul", b.add("Unsqueeze", B, b.constant([-3])), b.add("Mul", x, weights))
    kept = b.add("Slice", fading, *last)
    body = Nodes(f"{b.prefix}.chunk")
    names = [f"{body.prefix}.{name}" for name in ("state", "added", "kept")]
    before = body.add("Identity", names[0])
    after = body.add("Add", body.add("Mul", names[0], names[2]), names[1])
    graph = body.branch(after, before, inputs=names)
    new_state = f"{b.prefix}.last_state"
    made = b.add(
        "Scan",
        state,
        added,
        kept,
        output=new_state,
        others=[f"{b.prefix}.states"],
        body=graph,
        num_scan_inputs=2,
    )
    return f"{b.prefix}.states", made
