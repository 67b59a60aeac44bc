"""The refinement policies in `twotower::RefineBlock`: which positions first, and how many of them.

Their sources: `docs/kernels.md`; how to add one: `CONTRIBUTING.md`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from twotower_export.graph.body import Body


@dataclass(frozen=True)
class Seen:
    """The batch as a policy sees it; all float32.

    Attributes:
        confidence: [B, S].
        entropy: [B, S], in nats.
        position: [1, S], in the block.
        bound: [B, 1], the row's threshold, factor or bound.
    """

    confidence: ir.Value
    entropy: ir.Value
    position: ir.Value
    bound: ir.Value


@dataclass(frozen=True)
class Order:
    """The order that the keys gave; both [B, S] float32.

    Attributes:
        number: 1 for the position that is committed first.
        entropy_before: Sum over the positions that are committed before.
    """

    number: ir.Value
    entropy_before: ir.Value


@dataclass(frozen=True)
class PolicyRule:
    """A policy's rule for a batch.

    Attributes:
        key: Writes the sort key, float32, broadcast to [B, S]; the position with the lowest is
            committed first.
        fits: Writes, from the order, whether the policy would commit that far; [B, S] bool. Wanted
            is everything up to the furthest position that fits. None: never more than the step's
            share.
    """

    key: Callable[[Body, Seen], ir.Value]
    fits: Callable[[Body, Seen, Order], ir.Value] | None = None


def _most_confident(b: Body, seen: Seen) -> ir.Value:
    return b.op.Neg(seen.confidence)


def _within_factor(b: Body, seen: Seen, order: Order) -> ir.Value:
    doubt = b.op.Sub(b.f32(1.0), seen.confidence)
    return b.op.Less(b.op.Mul(b.op.Add(order.number, b.f32(1.0)), doubt), seen.bound)


POLICY_RULES: Mapping[str, PolicyRule] = {
    "threshold": PolicyRule(
        _most_confident, lambda b, seen, order: b.op.Greater(seen.confidence, seen.bound)
    ),
    "quota": PolicyRule(_most_confident),
    "factor": PolicyRule(_most_confident, _within_factor),
    "entropy": PolicyRule(
        lambda b, seen: seen.entropy,
        lambda b, seen, order: b.op.LessOrEqual(order.entropy_before, seen.bound),
    ),
    "leftmost": PolicyRule(lambda b, seen: seen.position),
}
"""By name, in the order of the numbers."""
