"""Finds the SKUs that `--sku` names: in the table, on this machine, or in a file."""

from __future__ import annotations

import difflib
from pathlib import Path

from twotower_engines.errors import PlanError
from twotower_engines.planning.local_gpu import local_sku
from twotower_engines.planning.skus import Sku, known_skus, sku_of_file

FILE_SUFFIXES = (".toml", ".json")


def find_sku(name: str) -> Sku:
    """Return a SKU.

    Args:
        name: A name of the table, `local`, or the path of a SKU file (.toml or .json).

    Raises:
        PlanError: There is no such SKU, its file is malformed, or no GPU was found for `local`.
    """
    if name.endswith(FILE_SUFFIXES):
        return sku_of_file(Path(name))
    spelled = name.lower().replace("_", "-").replace(" ", "-")
    if spelled == "local":
        return local_sku()
    if spelled in known_skus():
        return known_skus()[spelled]
    names = [*known_skus(), "local", "all"]
    close = [known for known in names if spelled and known.startswith(spelled)]
    close = close or difflib.get_close_matches(spelled, names, 3)
    hint = f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(names)}"
    raise PlanError(f"unknown SKU {name!r}: {hint} (a .toml or .json file describes another GPU)")


def resolve_skus(text: str) -> list[Sku]:
    """Return the SKUs of a comma-separated list; `all` stands for the whole table.

    Raises:
        PlanError: The list is empty, or a name in it is not that of a SKU.
    """
    skus: dict[str, Sku] = {}
    for name in (part.strip() for part in text.split(",")):
        if not name:
            continue
        for sku in known_skus().values() if name == "all" else [find_sku(name)]:
            skus[sku.name] = sku
    if not skus:
        raise PlanError(f"--sku is {text!r}: name at least one SKU, or `all`")
    return list(skus.values())
