"""Optimization profiles: which sizes each tower's engine is built for.

A profile gives each named dimension of the graphs (`batch`, `tokens`, `block`, `context`) a least,
a usual and a largest size. The names come from the graphs, so one profile says the shapes of every
input. Nothing here knows TensorRT.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from twotower_contract.engine_set import Limits
from twotower_contract.layout import ROW_LISTS
from twotower_engines.errors import BuildError

Dims = Sequence[int | str]

USUAL_BLOCK = 16
"""Tokens of a block in NVIDIA's `inference.py`: what the engines are tuned for."""

FIXED = ("context",)
"""Dimensions of one size in all profiles, which becomes a number in the graph: TensorRT updates a
cache in place whose room it knows."""

ROW_BUCKETS = (1, 4, 16, 64, 256)
"""Most rows of each profile of the denoiser: a step of one row should not pay for sixteen."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Least, usual and largest size of one dimension."""

    least: int
    usual: int
    most: int

    def __post_init__(self) -> None:
        if not 0 <= self.least <= self.usual <= self.most:
            raise BuildError(
                f"sizes {self.least} to {self.most}, usually {self.usual}: a size is not "
                "negative, and the usual one lies between the least and the largest"
            )

    def as_json(self) -> list[int]:
        """Return the three sizes."""
        return [self.least, self.usual, self.most]


@dataclass(frozen=True, slots=True)
class Profile:
    """One profile.

    Attributes:
        name: For people, for example `chunk`.
        sizes: Dimension name to sizes.
    """

    name: str
    sizes: Mapping[str, Sizes]

    def shapes(self, dims: Dims, where: str) -> tuple[list[int], list[int], list[int]]:
        """Return the least, usual and largest shape of an input.

        Args:
            dims: Its dimensions as in the graph: numbers, and names of dynamic ones.
            where: Name of the input in messages.

        Raises:
            BuildError: A dynamic dimension has a name that no profile knows.
        """
        unknown = [dim for dim in dims if isinstance(dim, str) and dim not in self.sizes]
        if unknown:
            raise BuildError(
                f"{where}: its dimension `{unknown[0]}` is none of {', '.join(self.sizes)}; "
                "export the checkpoint again with this version of twotower"
            )
        triples = [[dim] * 3 if isinstance(dim, int) else self.sizes[dim].as_json() for dim in dims]
        least, usual, most = ([triple[index] for triple in triples] for index in range(3))
        return least, usual, most

    def as_json(self) -> dict[str, Any]:
        """Return the profile as build.json keeps it."""
        return {"name": self.name, **{dim: one.as_json() for dim, one in self.sizes.items()}}


def narrow_profiles(tower: str, limits: Limits) -> list[Profile]:
    """Return profiles that TensorRT tunes kernels for, one for each kind of call.

    The context tower: one token of each row, a block, a chunk of a prompt. The denoiser: row
    buckets. The runtime takes the first profile that fits a call, so narrow ones come first.
    """
    cache = _cache(limits)
    if tower == "denoiser":
        block = _block(limits)
        return [
            Profile(f"rows-{rows.most}", {**_rows(rows), "block": block, **cache})
            for rows in _row_buckets(limits.slots)
        ]
    few = min(4, limits.slots)
    rows = Sizes(1, few, limits.slots)
    chunk = limits.max_tokens_per_call
    block_tokens = min(limits.block_size_max, chunk)
    kinds = [
        ("token", rows, Sizes(1, 1, 1)),
        ("block", rows, Sizes(1, min(USUAL_BLOCK, block_tokens), block_tokens)),
        # prompts come one by one, so most chunks travel alone
        ("chunk", Sizes(1, 1, limits.slots), Sizes(1, chunk, chunk)),
    ]
    return [Profile(name, {"batch": batch, "tokens": t, **cache}) for name, batch, t in kinds]


def wide_profiles(tower: str, limits: Limits) -> list[Profile]:
    """Return the one profile of a flavour that tunes kernels when it meets a shape.

    TensorRT-RTX compiles kernels for the shapes that it sees at run time; profiles only bound
    them, and each further one costs as much build time and engine size as the first.
    """
    rows, cache = Sizes(1, min(4, limits.slots), limits.slots), _cache(limits)
    if tower == "denoiser":
        return [Profile("all", {**_rows(rows), **cache, "block": _block(limits)})]
    chunk = limits.max_tokens_per_call
    tokens = Sizes(1, min(USUAL_BLOCK, chunk), chunk)
    return [Profile("all", {"batch": rows, **cache, "tokens": tokens})]


def _rows(rows: Sizes) -> dict[str, Sizes]:
    """Return the sizes of a denoiser's rows, and of lists of them: none or up to all."""
    listed = Sizes(0, rows.usual, rows.most)
    return {"batch": rows, **dict.fromkeys(ROW_LISTS.values(), listed)}


def _cache(limits: Limits) -> dict[str, Sizes]:
    """Return the size of a cache: the runtime passes each slot's whole room."""
    return {"context": Sizes(*[limits.cache_tokens] * 3)}


def _block(limits: Limits) -> Sizes:
    return Sizes(1, min(USUAL_BLOCK, limits.block_size_max), limits.block_size_max)


def _row_buckets(slots: int) -> list[Sizes]:
    """Return the rows of each bucket, usually its most: for example 1 to 1, 2 to 4, 5 to 10."""
    bounds = [most for most in ROW_BUCKETS if most < slots] + [slots]
    least = [1, *(most + 1 for most in bounds)]
    return [Sizes(few, most, most) for few, most in zip(least, bounds, strict=False)]
