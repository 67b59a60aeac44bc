"""The refinement policies in the decision kernel: which positions first, and how many of them.

Their sources: `docs/kernels.md`; how to add one: `CONTRIBUTING.md`.
"""

from __future__ import annotations

import triton.language as tl

from twotower_contract.policies import POLICIES
from twotower_engines.kernels.jit import kernel

THRESHOLD = tl.constexpr(POLICIES["threshold"])
QUOTA = tl.constexpr(POLICIES["quota"])
FACTOR = tl.constexpr(POLICIES["factor"])
ENTROPY = tl.constexpr(POLICIES["entropy"])


@kernel
def policy_rule(
    policy: tl.tensor,
    threshold: tl.tensor,
    confidence: tl.tensor,
    entropy: tl.tensor,
    position: tl.tensor,
    number: tl.tensor,
    entropy_before: tl.tensor,
) -> tuple[tl.tensor, tl.tensor]:
    """Return a policy's sort key per position, and whether it would commit that far.

    The position with the lowest key is committed first. Wanted is everything up to the furthest
    position that fits; what fits nowhere leaves it at the step's share.

    Args:
        policy: Number of the policy, a scalar; an unknown one is `leftmost`.
        threshold: The row's threshold, factor or bound, a scalar.
        confidence: Float32, as all other arguments below.
        entropy: Entropy in nats; only where the policy is `entropy`.
        position: Position in the block.
        number: 1 for the position that is committed first. The key may not depend on it.
        entropy_before: Entropy summed over the positions that are committed before, as above.
    """
    key, fits = position, number < 0.0  # leftmost
    if policy == THRESHOLD:
        key, fits = -confidence, confidence > threshold
    elif policy == QUOTA:
        key = -confidence
    elif policy == FACTOR:
        key, fits = -confidence, (number + 1.0) * (1.0 - confidence) < threshold
    elif policy == ENTROPY:
        key, fits = entropy, entropy_before <= threshold
    return key, fits
