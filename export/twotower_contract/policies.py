"""The refinement policies by name, and the numbers that graphs and kernels know them by."""

from __future__ import annotations

POLICIES = {"threshold": 0, "quota": 1, "factor": 2, "entropy": 3, "leftmost": 4}
"""Number of each refinement policy in the denoiser's input `policy`."""

POLICY_NAMES = tuple(POLICIES)
"""Name of each refinement policy, in the order of their numbers."""

BOUND_POLICIES = ("factor", "entropy")
"""Policies whose threshold is a bound of its own kind, not a probability."""
