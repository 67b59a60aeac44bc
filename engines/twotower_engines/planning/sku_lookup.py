"""Finds the SKUs that `--sku` names: in the table, on this machine, or in a file."""

from __future__ import annotations

import difflib
from pathlib import Path

from twotower_contract.skus import Sku, known_skus
from twotower_engines.errors import PlanError
from twotower_engines.planning.local_gpu import local_gpu, local_sku
from twotower_engines.planning.sku_file import sku_of_file

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


def default_skus() -> str:
    """Return the SKU to build for where none is named: this machine's GPU.

    Raises:
        PlanError: It has none. The CPU is no default: the released model is too large for it.
    """
    if local_gpu() is not None:
        return "local"
    raise PlanError(
        "no --sku is given, and this machine has no NVIDIA GPU to build for; name one, or `--sku "
        "cpu` for a small model (`twotower plan BUNDLE --sku all` shows what holds it)"
    )


def complete_skus(incomplete: str) -> list[str]:
    """Return the lists of SKUs that begin as typed, for the shell."""
    before, comma, last = incomplete.rpartition(",")
    names = (*known_skus(), "local", "all")
    return [f"{before}{comma}{name}" for name in names if name.startswith(last)]
