"""The bytes that engines move, for `twotower inspect ENGINES --traffic`."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from twotower_contract.digests import file_state
from twotower_contract.engine_set import EngineSet, find_engine_sets, open_engine_set
from twotower_contract.errors import EngineSetError, printable
from twotower_contract.layout import ROW_LISTS
from twotower_contract.tables import aligned
from twotower_contract.traffic import Listing, Moved, Traffic, read_listings, traffic_of

ROWS: Final = (1, 4, 16, 64, 256)
"""Rows of the calls that a profile of open sizes is shown for."""

SAMPLED: Final = ROW_LISTS["sampled_rows"]

LARGEST: Final = 8
"""Kernels of a call that the text names."""

LEGEND: Final = (
    "GB: read and written by all kernels. least: weights, states and other inputs once, outputs",
    "once. Of embeddings the rows of the call's tokens count, of a cache that is written where it",
    "lies the new rows. Tiles that a kernel skips, and experts that it leaves out, count as read.",
    "sampled: rows that draw noise, at a temperature above 0.",
)


def engines_traffic(folder: Path) -> dict[str, Any]:
    """Return what the calls of an engine set, or of the folder of several, move.

    Raises:
        EngineSetError: There is no engine set, or none whose kernels are known, or a listing is
            missing or was changed.
    """
    sets = [open_engine_set(one) for one in find_engine_sets(folder)]
    if not sets:
        raise EngineSetError(
            f"{folder}: is no engine set, so --traffic means nothing: build engines, and name them"
        )
    engines = [_of_set(opened) for opened in sets if opened.build.traffic]
    if not engines:
        names = ", ".join(f"{one.build.sku} ({one.build.flavour})" for one in sets)
        raise EngineSetError(
            f"{folder}: the kernels of these engines are not known: {names}; a GPU's builder lists "
            "them since this version of twotower, so build again for a GPU"
        )
    return {"kind": "traffic", "path": str(folder.resolve()), "engines": engines}


def traffic_text(found: Mapping[str, Any]) -> str:
    """Return the tables that `twotower inspect --traffic` prints."""
    return "\n".join(line for one in found["engines"] for line in map(printable, _text_of_set(one)))


def _of_set(opened: EngineSet) -> dict[str, Any]:
    pattern = opened.manifest.model.pattern
    towers = {}
    for tower, listing in opened.build.traffic.items():
        path = opened.folder / listing.file
        state = file_state(path, listing.sha256)
        if state != "ok":
            raise EngineSetError(f"{path}: is {state}; build the engines again")
        source, listings = read_listings(path)
        profiles = [_of_profile(one, pattern, opened.build.limits.slots) for one in listings]
        towers[tower] = {"source": source, "profiles": profiles}
    build = opened.build
    return {
        "path": str(opened.folder),
        "sku": build.sku,
        "flavour": build.flavour,
        "precision": build.precision,
        "pattern": pattern,
        "towers": towers,
    }


def _of_profile(listing: Listing, pattern: str, slots: int) -> dict[str, Any]:
    has_open_rows = any("batch" in one.sizes for k in listing.kernels for one in k.writes)
    calls = [listing.usual]
    if has_open_rows:
        rows = [n for n in ROWS if n < slots] + [slots]
        lists = {dim: 0 for dim in ROW_LISTS.values() if dim in listing.usual}
        calls = [{**listing.usual, **lists, "batch": count} for count in rows]
        if SAMPLED in lists:
            calls += [{**call, SAMPLED: call["batch"]} for call in calls]
    return {
        "profile": listing.profile,
        "scratch_bytes": listing.scratch,
        "unsized": list(listing.unsized),
        "calls": [_of_call(traffic_of(listing, call), call, pattern) for call in calls],
    }


def _of_call(traffic: Traffic, call: Mapping[str, int], pattern: str) -> dict[str, Any]:
    return {
        "sizes": dict(call),
        **_moved(traffic.moved),
        "ratio": round(traffic.ratio, 4),
        "kinds": {kind: _moved(moved) for kind, moved in traffic.by_kind(pattern).items()},
        "copies": [
            {"kernel": kernel, "input": name, "bytes": size}
            for kernel, name, size in traffic.copies
        ],
        "each": [
            {"kernel": kernel.name, "kind": kernel.kind, "layer": kernel.layer}
            | {"read_bytes": moved.read, "written_bytes": moved.written}
            for kernel, moved in traffic.kernels
        ],
    }


def _moved(moved: Moved) -> dict[str, int]:
    return {
        "kernels": moved.kernels,
        "read_bytes": moved.read,
        "written_bytes": moved.written,
        "moved_bytes": moved.total,
        "least_bytes": moved.least,
    }


def _text_of_set(found: Mapping[str, Any]) -> Iterator[str]:
    yield f"{found['path']}: {found['sku']}, {found['flavour']}, {found['precision']}"
    for tower, one in found["towers"].items():
        for profile in one["profiles"]:
            yield ""
            yield from _text_of_profile(tower, one["source"], profile, found["pattern"])
    yield ""
    yield from LEGEND


def _text_of_profile(
    tower: str, source: str, found: Mapping[str, Any], pattern: str
) -> Iterator[str]:
    scratch = found["scratch_bytes"]
    memory = "" if scratch is None else f"; {scratch / 1e6:,.0f} MB of scratch at its largest sizes"
    yield f"{tower}, profile {found['profile']}, from {source}{memory}"
    calls = found["calls"]
    names = [name for name in calls[0]["sizes"] if any(call["sizes"][name] for call in calls)]
    head = ["rows" if name == "batch" else name for name in names]
    rows = [
        [
            *(f"{call['sizes'][name]:,}" for name in names),
            f"{call['moved_bytes'] / 1e9:.3f}",
            f"{call['least_bytes'] / 1e9:.3f}",
            f"{call['moved_bytes'] / call['least_bytes']:.3f}",
            f"{call['kernels']:,}",
            f"{len(call['copies']):,}",
            f"{sum(one['bytes'] for one in call['copies']) / 1e9:.3f}",
        ]
        for call in calls
    ]
    yield from _table(
        [[*head, "GB", "least", "ratio", "kernels", "copies", "GB copied"], *rows], ()
    )
    call = calls[0]
    yield f"  at {calls[0]['sizes']['batch']} rows, by kind of layer:"
    kinds = [
        [
            f"{kind} ({pattern.count(kind)} layers)" if kind in pattern else kind,
            f"{one['kernels']:,}",
            f"{one['kernels'] / pattern.count(kind):.1f}" if kind in pattern else "",
            *(f"{one[f'{way}_bytes'] / 1e9:.3f}" for way in ("read", "written", "least")),
        ]
        for kind, one in call["kinds"].items()
    ]
    yield from _table([["", "kernels", "a layer", "GB read", "written", "least"], *kinds])
    largest = sorted(call["each"], key=lambda one: -one["read_bytes"] - one["written_bytes"])
    yield "  the largest kernels:"
    kernels = [
        [
            one["kernel"][-60:],
            "" if one["layer"] is None else f"layer {one['layer']}",
            *(f"{one[f'{way}_bytes'] / 1e6:,.1f}" for way in ("read", "written")),
        ]
        for one in largest[:LARGEST]
    ]
    yield from _table([["", "", "MB read", "written"], *kernels])
    if call["copies"]:
        yield "  inputs that are copied or transposed:"
        for name, count, size in _grouped(call["copies"]):
            yield f"    {name}: {count} kernel{'s' * (count > 1)}, {size / 1e6:,.1f} MB"
    if found["unsized"]:
        yield f"  without a size, and not counted: {', '.join(found['unsized'])}"


def _grouped(copies: Sequence[Mapping[str, Any]]) -> list[tuple[str, int, int]]:
    """Return inputs that differ in the number of their layer alone as one, with count and bytes."""
    groups: dict[str, list[int]] = {}
    for one in copies:
        name = ".".join("*" if part.isdigit() else part for part in one["input"].split("."))
        groups.setdefault(name, []).append(one["bytes"])
    return [(name, len(sizes), sum(sizes)) for name, sizes in groups.items()]


def _table(rows: Sequence[Sequence[str]], left: Container[int] = (0,)) -> list[str]:
    return [f"    {line}" for line in aligned(rows, left)]
