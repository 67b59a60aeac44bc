"""Plans that were built before: `$XDG_CACHE_HOME/twotower/builds/<key>/{plan,record.json}`.

A key is a digest of everything that decides a plan's bytes: the graph, the flavour, the versions of
its tools, flags and profiles, and the GPUs that it is for. So a SKU may find what was built for
another one. Whoever builds holds the key's lock, and a second process waits and finds the result.
Delete the folder to empty the cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .cache import cache_root
from .document import read_json, write_json
from .engine_set import file_sha256
from .errors import BuildError
from .partial import locked, partial_folder, put_in_place

__all__ = ["CachedPlan", "PlanCache", "digest_of"]

PLAN_FILE = "plan"
RECORD_FILE = "record.json"


@dataclass(frozen=True, slots=True)
class CachedPlan:
    """A finished plan: where it lies, its sha256 in hex, and what its builder reported."""

    path: Path
    sha256: str
    report: dict[str, Any]


class PlanCache:
    """The cache in one folder.

    Args:
        root: `$XDG_CACHE_HOME/twotower/builds` where not given.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = cache_root() / "builds" if root is None else root

    @contextlib.contextmanager
    def holding(self, keys: Iterable[str]) -> Iterator[None]:
        """Keep other processes from building these keys; waits for one that does."""
        locks = self.root / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            for key in sorted(set(keys)):  # in one order everywhere, so that no two can block
                path = locks / key
                path.touch()
                stack.enter_context(locked(path))
            yield

    def find(self, key: str) -> CachedPlan | None:
        """Return the plan of a key, or None; one whose bytes were changed is not returned."""
        folder = self.root / key
        try:
            record = read_json(folder / RECORD_FILE, BuildError)
            digest, report = record.text("sha256"), record.section("report").values
        except BuildError:
            return None
        path = folder / PLAN_FILE
        if not path.is_file() or file_sha256(path) != digest:
            return None
        return CachedPlan(path, digest, report)

    @contextlib.contextmanager
    def workplace(self) -> Iterator[Path]:
        """Give a folder in which plans are built, to be handed to `keep`."""
        with partial_folder(self.root) as folder:
            yield folder

    def keep(self, key: str, plan: Path, report: Mapping[str, Any]) -> CachedPlan:
        """Take a plan over from a `workplace`; the caller holds the key."""
        made = plan.parent / key
        made.mkdir()
        plan.rename(made / PLAN_FILE)
        digest = file_sha256(made / PLAN_FILE)
        write_json(made / RECORD_FILE, {"sha256": digest, "report": dict(report)})
        put_in_place(made, self.root / key)
        return CachedPlan(self.root / key / PLAN_FILE, digest, dict(report))


def digest_of(parts: Mapping[str, Any]) -> str:
    """Return the sha256 in hex of a JSON value, whatever the order of its keys."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
