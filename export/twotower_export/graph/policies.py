"""The refinement policies in `twotower::RefineBlock`: which positions first, and how many of them.

Their sources: `docs/kernels.md`; how to add one: `CONTRIBUTING.md`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from twotower_contract.policies import POLICIES
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
        key: Float32, broadcast to [B, S]; the position with the lowest key is committed first.
        fits: From the order, whether the policy would commit that far; [B, S] bool. Wanted is
            everything up to the furthest position that fits. None: never more than the step's
            share.
    """

    key: ir.Value
    fits: Callable[[Order], ir.Value] | None = None


def _threshold(b: Body, seen: Seen) -> PolicyRule:
    def fits(order: Order) -> ir.Value:
        return b.op.Greater(seen.confidence, seen.bound)

    return PolicyRule(b.op.Neg(seen.confidence), fits)


def _quota(b: Body, seen: Seen) -> PolicyRule:
    return PolicyRule(b.op.Neg(seen.confidence))


def _factor(b: Body, seen: Seen) -> PolicyRule:
    def fits(order: Order) -> ir.Value:
        doubt = b.op.Sub(b.f32(1.0), seen.confidence)
        return b.op.Less(b.op.Mul(b.op.Add(order.number, b.f32(1.0)), doubt), seen.bound)

    return PolicyRule(b.op.Neg(seen.confidence), fits)


def _entropy(b: Body, seen: Seen) -> PolicyRule:
    def fits(order: Order) -> ir.Value:
        return b.op.LessOrEqual(order.entropy_before, seen.bound)

    return PolicyRule(seen.entropy, fits)


def _leftmost(b: Body, seen: Seen) -> PolicyRule:
    return PolicyRule(seen.position)


POLICY_RULES: Mapping[str, Callable[[Body, Seen], PolicyRule]] = dict(
    zip(POLICIES, (_threshold, _quota, _factor, _entropy, _leftmost), strict=True)
)
"""By name, in the order of the numbers."""
