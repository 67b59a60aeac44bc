"""A digest of our own sources: a key of the version alone would give developers stale engines."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path


def code_digest(*patterns: str) -> str:
    """Return the sha256 in hex of the sources that some patterns name.

    Args:
        patterns: A package, a slash, and a pattern as of `Path.glob` inside it, as in
            `twotower_engines/kernels/*.py`. The package is found without being imported.

    Raises:
        ValueError: A pattern matches no file: sources were moved, and the key would not know them.
    """
    digest = hashlib.sha256()
    for pattern in patterns:
        package, _, inside = pattern.partition("/")
        folder = _folder(package)
        paths = sorted(path for path in folder.glob(inside) if path.is_file())
        if not paths:
            raise ValueError(f"the pattern {pattern!r} matches no file in {folder}")
        for path in paths:
            name = f"{package}/{path.relative_to(folder).as_posix()}"
            digest.update(name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _folder(package: str) -> Path:
    """Return where an installed package lies."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"no package {package!r} is installed")
    return Path(spec.submodule_search_locations[0])
