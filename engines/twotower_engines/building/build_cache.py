"""Engine files that were built before: `$XDG_CACHE_HOME/twotower/builds/<key>/{plan,record.json}`.

Beside an engine lies `traffic.json` where its kernels are known, and `layers.json` where the
builder could open it.

A key is a digest of everything that decides an engine's bytes: the graph, the flavour, the versions
of its tools, the builder's code, flags and profiles, and the machines that it is for. So a SKU may
find an engine that was built for another one. A builder holds the lock of the key, and a second
process waits and finds the result. Delete the folder to empty the cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twotower_contract.atomic import locked, partial_folder, put_in_place
from twotower_contract.digests import file_sha256, file_state
from twotower_contract.json_file import read_json, write_json
from twotower_engines.artifacts.cache_root import in_cache
from twotower_engines.building.flavours.flavour import layers_file, traffic_file
from twotower_engines.errors import BuildError

ENGINE_FILE = "plan"
RECORD_FILE = "record.json"
SIDE_FILES: Mapping[str, Callable[[Path], Path]] = {
    "layers.json": layers_file,
    "traffic.json": traffic_file,
}
"""Name in the cache -> where the file lies beside an engine."""


@dataclass(frozen=True, slots=True)
class CachedEngine:
    """A finished engine file.

    Attributes:
        path: Its file.
        sha256: In hex.
        report: Report of its builder.
        beside: Files that were written beside it, by their names in `SIDE_FILES`.
    """

    path: Path
    sha256: str
    report: dict[str, Any]
    beside: Mapping[str, Path] = field(default_factory=dict)

    def copy_beside(self, engine: Path) -> None:
        """Copy what lies beside it to where it lies beside a copy of the engine."""
        for name, path in self.beside.items():
            shutil.copyfile(path, SIDE_FILES[name](engine))


class EngineCache:
    """The cache in one folder.

    Args:
        root: `$XDG_CACHE_HOME/twotower/builds` where not given.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = in_cache("builds") if root is None else root

    @contextlib.contextmanager
    def holding(self, keys: Iterable[str], waiting: Callable[[], None]) -> Iterator[None]:
        """Keep other processes from building these keys; waits for one that does."""
        locks = self.root / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            for key in sorted(set(keys)):  # in one order everywhere, so that no two can block
                path = locks / key
                path.touch()
                stack.enter_context(locked(path, waiting))
            yield

    def find(self, key: str) -> CachedEngine | None:
        """Return the engine of a key; None where there is none, or its bytes were changed."""
        folder = self.root / key
        try:
            record = read_json(folder / RECORD_FILE, BuildError)
            digest, report = record.text("sha256"), record.section("report").values
        except BuildError:
            return None
        path = folder / ENGINE_FILE
        if file_state(path, digest) != "ok":
            return None
        return _cached(folder, digest, report)

    @contextlib.contextmanager
    def workplace(self) -> Iterator[Path]:
        """Give a folder to build engines in, which are then handed to `keep`."""
        with partial_folder(self.root) as folder:
            yield folder

    def keep(self, key: str, engine: Path, report: Mapping[str, Any]) -> CachedEngine:
        """Move an engine from a `workplace` into the cache; the caller holds the key."""
        made = engine.parent / key
        made.mkdir()
        for name, place in SIDE_FILES.items():
            if place(engine).is_file():
                place(engine).rename(made / name)
        engine.rename(made / ENGINE_FILE)
        digest = file_sha256(made / ENGINE_FILE)
        write_json(made / RECORD_FILE, {"sha256": digest, "report": dict(report)})
        put_in_place(made, self.root / key)
        return _cached(self.root / key, digest, dict(report))


def _cached(folder: Path, digest: str, report: dict[str, Any]) -> CachedEngine:
    beside = {name: folder / name for name in SIDE_FILES if (folder / name).is_file()}
    return CachedEngine(folder / ENGINE_FILE, digest, report, beside)


def digest_of(parts: Mapping[str, Any]) -> str:
    """Return the sha256 in hex of a JSON value, whatever the order of its keys."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
