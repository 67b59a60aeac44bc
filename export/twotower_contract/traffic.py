"""The kernels of a compiled engine, and the bytes that each reads and writes.

A builder writes `<tower>.traffic.json` beside an engine: for each profile its kernels with the
tensors that they read and write. Sizes that a call decides are written as expressions over the
names of the graph's dynamic dimensions, so that the bytes of any call follow.

Bytes that a kernel skips (tiles under a mask, experts that no token chose) count as if read,
and what the GPU's cache still holds counts as traffic.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from twotower_contract.errors import EngineSetError
from twotower_contract.json_file import Document, read_json, write_json
from twotower_contract.layout import ROW_LISTS

FORMAT: Final = "twotower-traffic"
FORMAT_VERSION: Final = 1

BITS: Final = {
    **dict.fromkeys(("FLOAT", "INT32"), 32),
    **dict.fromkeys(("BF16", "HALF"), 16),
    **dict.fromkeys(("BOOL", "INT8", "UINT8", "FP8", "E8M0"), 8),
    **dict.fromkeys(("INT4", "FP4"), 4),
    "INT64": 64,
}
"""Name of a type in a listing -> bits of an element."""

LARGE: Final = 100_000
"""Bytes of the smallest input whose copy is worth a mention."""

ENDS: Final = "ends"
"""Kind of a kernel before, between or after the layers."""

PRODUCT: Final = re.compile(r"gemm|matmul|mha|attention|fusion|conv|plugin", re.IGNORECASE)
"""Kernels that read an input in order to multiply with it."""

Size = int | str
"""A number, or a sum as `context + block`."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor as a kernel sees it.

    Attributes:
        name: Name in the engine; inputs and outputs of the graph have their own.
        sizes: Numbers whose product is the number of elements.
        type: A name of `BITS`.
    """

    name: str
    sizes: tuple[Size, ...]
    type: str

    def bytes(self, call: Mapping[str, int]) -> int:
        """Return its bytes in a call with these dimensions."""
        return -(-math.prod(value_of(size, call) for size in self.sizes) * BITS[self.type] // 8)


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel.

    Attributes:
        name: Name in the engine.
        kind: The compiler's kind, for example `gemm`.
        layer: Number of the tower's layer that it belongs to; None before and after the layers.
        reads: What it reads.
        writes: What it writes.
    """

    name: str
    kind: str
    layer: int | None
    reads: tuple[Tensor, ...]
    writes: tuple[Tensor, ...]

    @property
    def is_product(self) -> bool:
        """Whether it multiplies with its inputs, rather than move them."""
        return PRODUCT.search(f"{self.kind} {self.name}") is not None


@dataclass(frozen=True, slots=True)
class Listing:
    """The kernels of one profile of an engine.

    Attributes:
        profile: Name of the profile.
        usual: Dynamic dimension to the size that the profile is made for.
        scratch: Bytes of scratch memory at the profile's largest sizes; None where unknown.
        inputs: Inputs of the graph.
        outputs: Outputs of the graph.
        kernels: Kernels in the order in which they run.
        unsized: Tensors whose sizes the builder did not say; they are in no kernel.
    """

    profile: str
    usual: Mapping[str, int]
    scratch: int | None
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    kernels: tuple[Kernel, ...]
    unsized: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Moved:
    """The bytes that some kernels move.

    Attributes:
        kernels: Number of kernels.
        read: Bytes read.
        written: Bytes written.
        least: Bytes of the graph's inputs and outputs that no kernel before them touched.
    """

    kernels: int
    read: int
    written: int
    least: int

    @property
    def total(self) -> int:
        """Bytes read and written."""
        return self.read + self.written


@dataclass(frozen=True, slots=True)
class Traffic:
    """The bytes that one call of an engine moves.

    Attributes:
        kernels: Each kernel with what it moves.
        copies: Kernel, input and bytes, where a kernel copies or transposes a large input.
    """

    kernels: tuple[tuple[Kernel, Moved], ...]
    copies: tuple[tuple[str, str, int], ...]

    @property
    def moved(self) -> Moved:
        """All kernels together."""
        return _sum(moved for _, moved in self.kernels)

    @property
    def least(self) -> int:
        """Bytes that the call must move: weights, states and other inputs once, outputs once."""
        return self.moved.least

    @property
    def ratio(self) -> float:
        """Bytes moved over the least."""
        return self.moved.total / self.least

    def by_kind(self, pattern: str) -> dict[str, Moved]:
        """Return what the kernels of each kind of layer move, and those of no layer.

        Args:
            pattern: A letter for each layer.
        """
        kinds: dict[str, list[Moved]] = {}
        for kernel, moved in self.kernels:
            kind = ENDS if kernel.layer is None else pattern[kernel.layer]
            kinds.setdefault(kind, []).append(moved)
        order = [*dict.fromkeys(pattern), ENDS]
        return {kind: _sum(kinds[kind]) for kind in order if kind in kinds}


def traffic_of(listing: Listing, call: Mapping[str, int] | None = None) -> Traffic:
    """Return what a call moves.

    Three things are counted by what they touch: of a table of embeddings the rows of the call's
    tokens, of a cache that a kernel writes into where it lies, the new rows, and of what a kernel
    reads that takes a list of rows, these.

    Args:
        call: Dynamic dimension to its size in the call; the profile's usual sizes where absent.
    """
    sizes = {**listing.usual, **(call or {})}
    tokens = math.prod(value_of(size, sizes) for size in _ids(listing).sizes)
    waiting = {tensor.name: _touched(tensor, sizes, tokens) for tensor in listing.inputs}
    waiting |= {tensor.name: _renewed(tensor, listing, sizes) for tensor in listing.outputs}
    kernels = []
    for kernel in listing.kernels:
        # a state that is renewed where it lies has one name here, as an input or as an output
        states = {t.name.removesuffix("_new") for t in (*kernel.reads, *kernel.writes)}
        both = (name for state in states for name in (state, f"{state}_new"))
        least = sum(waiting.pop(name, 0) for name in both)
        kernels.append((kernel, _moved(kernel, sizes, tokens, least)))
    return Traffic(tuple(kernels), tuple(_copies(listing, sizes)))


def write_listings(path: Path, source: str, listings: Sequence[Listing]) -> None:
    """Write the listings of an engine's profiles.

    Args:
        source: Where they come from, for people.
    """
    tensors: dict[Tensor, int] = {}

    def numbered(some: Iterable[Tensor]) -> list[int]:
        return [tensors.setdefault(tensor, len(tensors)) for tensor in some]

    profiles = [
        {
            "profile": one.profile,
            "usual": dict(one.usual),
            "scratch": one.scratch,
            "inputs": numbered(one.inputs),
            "outputs": numbered(one.outputs),
            "kernels": [
                [k.name, k.kind, k.layer, numbered(k.reads), numbered(k.writes)]
                for k in one.kernels
            ],
            "unsized": list(one.unsized),
        }
        for one in listings
    ]
    head = {"format": FORMAT, "format_version": FORMAT_VERSION, "source": source}
    table = [[tensor.name, list(tensor.sizes), tensor.type] for tensor in tensors]
    write_json(path, {**head, "profiles": profiles, "tensors": table})


def read_listings(path: Path) -> tuple[str, list[Listing]]:
    """Return where an engine's listings come from, and the listings, by profile.

    Raises:
        EngineSetError: The file is missing or malformed.
    """
    document = read_json(path, EngineSetError, "build the engines again")
    document.check_format(FORMAT, FORMAT_VERSION)
    try:
        table = [
            Tensor(name, tuple(sizes), kind) for name, sizes, kind in document.values["tensors"]
        ]
        listings = [_listing(one, table) for one in document.items("profiles")]
    except (IndexError, KeyError, TypeError, ValueError) as problem:
        raise document.refusal(f"is damaged ({problem})") from problem
    return document.text("source"), listings


def _listing(values: Document, table: Sequence[Tensor]) -> Listing:
    def named(numbers: Iterable[int]) -> tuple[Tensor, ...]:
        return tuple(table[number] for number in numbers)

    kernels = tuple(
        Kernel(name, kind, layer, named(reads), named(writes))
        for name, kind, layer, reads, writes in values.values["kernels"]
    )
    return Listing(
        profile=values.text("profile"),
        usual=values.values_of("usual"),
        scratch=values.values["scratch"],
        inputs=named(values.integers("inputs")),
        outputs=named(values.integers("outputs")),
        kernels=kernels,
        unsized=values.texts("unsized"),
    )


def value_of(size: Size, call: Mapping[str, int]) -> int:
    """Return a size in a call with these dimensions."""
    if isinstance(size, int):
        return size
    return sum(call[term] if term in call else int(term) for term in size.split(" + "))


def _ids(listing: Listing) -> Tensor:
    return next(tensor for tensor in listing.inputs if tensor.name == "ids")


def _touched(tensor: Tensor, call: Mapping[str, int], tokens: int) -> int:
    """Return the bytes of a tensor that a kernel reads: of a table, a row for each token."""
    if not tensor.name.endswith("embeddings.weight"):
        return tensor.bytes(call)
    return min(tensor.bytes(call), tokens * Tensor("", tensor.sizes[1:], tensor.type).bytes(call))


def _moved(kernel: Kernel, call: Mapping[str, int], tokens: int, least: int) -> Moved:
    """Return what a kernel moves; where it writes into its input, only what it writes there.

    That is as much as it reads of the rest, and no more than there is.
    """
    in_place = {one.name for one in kernel.reads} & {one.name for one in kernel.writes}
    listed = _of_listed_rows(kernel, call)
    read = sum(_touched(one, listed, tokens) for one in kernel.reads if one.name not in in_place)
    sizes = {one.name: one.bytes(call) for one in kernel.writes}
    room = sum(sizes.pop(name) for name in in_place)
    return Moved(1, read, sum(sizes.values()) + min(read, room), least)


def _of_listed_rows(kernel: Kernel, call: Mapping[str, int]) -> Mapping[str, int]:
    """Return a call as a kernel reads it: of other inputs the rows of a list that it takes."""
    lists = (ROW_LISTS[one.name] for one in kernel.reads if one.name in ROW_LISTS)
    lengths = [call[dim] for dim in lists if dim in call]
    return {**call, "batch": max(lengths)} if lengths else call


def _renewed(output: Tensor, listing: Listing, call: Mapping[str, int]) -> int:
    """Return the bytes of an output that are new: of a cache, the rows of the call's tokens."""
    cache = output.name.removesuffix("_new")
    if cache == output.name or not cache.endswith("cache"):
        return output.bytes(call)
    sizes = list(output.sizes)
    length = _ids(listing).sizes[1]
    return Tensor("", (*sizes[:-2], length, sizes[-1]), output.type).bytes(call)


def _copies(listing: Listing, call: Mapping[str, int]) -> Iterator[tuple[str, str, int]]:
    """Yield kernels that write as much as a large input that they read, and not an output.

    The input is most of what the kernel reads: one that reads twice as much of something else makes
    more of it than a copy. A cache that was updated in place is still the input that it was.
    """
    inputs = {one.name for one in listing.inputs}
    inputs |= {one.name for one in listing.outputs if one.name.removesuffix("_new") in inputs}
    outputs = {one.name for one in listing.outputs}
    for kernel in listing.kernels:
        names = {one.name for one in kernel.reads}
        written = [one.bytes(call) for one in kernel.writes if one.name not in outputs | names]
        most = max((one.bytes(call) for one in kernel.reads), default=0)
        for one in kernel.reads if not kernel.is_product else ():
            size = one.bytes(call)
            is_copied = LARGE <= size <= max(written, default=0) and 2 * size >= most
            if one.name in inputs and is_copied:
                yield kernel.name, one.name, size


def _sum(some: Iterable[Moved]) -> Moved:
    every = list(some)
    return Moved(
        sum(one.kernels for one in every),
        sum(one.read for one in every),
        sum(one.written for one in every),
        sum(one.least for one in every),
    )
