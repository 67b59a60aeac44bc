"""The GPUs that engines are planned and built for: the table, and what a row of it says.

`skus.json` is the table, each number with its source.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from twotower_contract.json_file import read_json
from twotower_contract.machine import memory_bytes

GIB: Final = 1 << 30
TABLE_FILE: Final = Path(__file__).with_name("skus.json")
DEFAULT_ACHIEVED: Final = 0.85

WORDS: Final = ("title", "device_names", "note")
"""Keys of the table's rows that are not numbers and need no source."""


@dataclass(frozen=True, slots=True)
class Sku:
    """One GPU, or the CPU.

    Attributes:
        name: Value of `--sku`, and the folder of its engines.
        title: Name for people.
        compute_capability: Compute capability, as `9.0`; None for the CPU.
        arch: CPU architecture of its machines, as `platform.machine()` names it: an engine runs
            only on the architecture that built it.
        memory: Bytes that CUDA sees; for the CPU, of this machine.
        reserved: Bytes of these that are never free: the system's part of unified memory.
        bandwidth: Bytes per second, as specified.
        achieved: Share of the bandwidth that kernels reach.
        flops: Dense bf16 operations per second; for the CPU, fp32.
        peer: Bytes per second to a second GPU of the machine; None where there can be no second.
        precisions: Precisions that weights may have on it, widest first.
        flavours: Flavours that can serve it; the first is the default.
        device_names: Names that the driver gives it, without "NVIDIA".
        note: Differences of sibling products, for people; may be empty.
        sources: Field of the table to the source of its number.
    """

    name: str
    title: str
    compute_capability: str | None
    arch: str
    memory: int
    reserved: int
    bandwidth: float
    achieved: float
    flops: float
    peer: float | None
    precisions: tuple[str, ...]
    flavours: tuple[str, ...]
    device_names: tuple[str, ...] = ()
    note: str = ""
    sources: Mapping[str, str] = field(default_factory=dict)

    @property
    def flavour(self) -> str:
        """The flavour that `auto` takes."""
        return self.flavours[0]

    @property
    def max_gpus(self) -> int:
        """Number of GPUs that one process can use: two if they are connected, else one."""
        return 1 if self.peer is None else 2

    def as_json(self) -> dict[str, Any]:
        """Return every number with its source."""
        return {
            "name": self.name,
            "title": self.title,
            "compute_capability": self.compute_capability,
            "arch": self.arch,
            "memory_bytes": self.memory,
            "reserved_bytes": self.reserved,
            "bandwidth_bytes_per_s": self.bandwidth,
            "achieved_bandwidth": self.achieved,
            "bf16_flops": self.flops,
            "peer_bytes_per_s": self.peer,
            "precisions": list(self.precisions),
            "flavour": self.flavour,
            "flavours": list(self.flavours),
            "note": self.note,
            "sources": dict(self.sources),
        }


@functools.cache
def known_skus() -> dict[str, Sku]:
    """Return the table by name, in its order."""
    table = read_json(TABLE_FILE)
    table.check_format("twotower-skus", 1)
    sources = table.section("sources").values
    return {
        name: _sku_of_table(name, row.values, sources)
        for name, row in table.section("skus").children().items()
    }


def sku_of_values(values: Mapping[str, Any]) -> Sku:
    """Return the SKU that the keys of a row, or of a user's file, describe."""
    peer = values.get("peer_gb_s")
    return Sku(
        name=values["name"],
        title=values.get("title", values["name"]),
        compute_capability=values["compute_capability"],
        arch=values["arch"],
        memory=int(values["memory_gib"] * GIB),
        reserved=int(values.get("reserved_gib", 0) * GIB),
        bandwidth=values["bandwidth_gb_s"] * 1e9,
        achieved=float(values.get("achieved_bandwidth", DEFAULT_ACHIEVED)),
        flops=values["bf16_tflops"] * 1e12,
        peer=None if peer is None else peer * 1e9,
        precisions=tuple(values["precisions"]),
        flavours=tuple(values["flavours"]),
        device_names=tuple(values.get("device_names", ())),
        note=values.get("note", ""),
    )


def _sku_of_table(name: str, row: Mapping[str, Any], sources: Mapping[str, Any]) -> Sku:
    values = {key: pair[0] for key, pair in row.items() if key not in WORDS}
    where = {key: str(sources[pair[1]]) for key, pair in row.items() if key in values}
    values |= {"name": name, **{key: row[key] for key in WORDS if key in row}}
    if values["memory_gib"] is None:
        values["memory_gib"] = memory_bytes() / GIB
    if values["arch"] is None:
        values["arch"] = platform.machine()
    return replace(sku_of_values(values), sources=where)
