"""Recipes: which matrices of a checkpoint become narrow, and in which format.

The default is NVIDIA's (`is_narrow_by_default`); a file of rules may say something else.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from twotower_contract.errors import CheckpointError, TwoTowerError, listed
from twotower_contract.json_file import read_json
from twotower_contract.layout import Tower
from twotower_contract.quantized import (
    FORMAT_OF_DTYPE,
    FORMATS,
    INT4_GROUPS,
    NVFP4_BLOCK,
    Format,
    is_quantizable,
)
from twotower_contract.sizes import is_narrow_by_default, part_of
from twotower_export.checkpoint import Checkpoint
from twotower_export.quantization.encoding import Scales

PARTS: Final = {
    "routed-experts": "routed experts",
    "shared-experts": "shared experts",
    "mamba": "mamba",
    "attention": "attention",
    "head": "head",
}
"""Parts that have matrices which can be quantized, as the command line calls them."""

RULE_KEYS: Final = ("match", "format")


class RecipeError(TwoTowerError):
    """A recipe asks for what cannot be done."""


@dataclass(frozen=True)
class Recipe:
    """How a checkpoint is quantized.

    Attributes:
        formats: Format of each matrix that becomes narrow, by its name.
        group: Weights that share a scale in `int4`; 0 where nothing is in that format.
        scales: How scales are chosen.
    """

    formats: Mapping[str, Format]
    group: int
    scales: Scales

    @property
    def digest(self) -> str:
        """The sha256 in hex over all of it."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def default_recipe(
    checkpoint: Checkpoint,
    format_: Format,
    keep: Sequence[str] = (),
    towers: Sequence[Tower] = (),
    scales: Scales = "search",
    group: int | None = None,
) -> Recipe:
    """Return the recipe that NVIDIA's exclusions make.

    Args:
        checkpoint: The checkpoint.
        format_: The format of all that becomes narrow.
        keep: More parts that keep their dtype, names from `PARTS`.
        towers: Towers to quantize; all by default.
        scales: How to choose the scales.
        group: Weights that share a scale in `int4`; the most that divide all rows by default.

    Raises:
        RecipeError: A part is unknown, or nothing would be quantized.
    """
    unknown = [part for part in keep if part not in PARTS]
    if unknown:
        raise RecipeError(f"--keep names {unknown[0]!r}; the parts are {', '.join(PARTS)}")
    kept = {PARTS[part] for part in keep}
    formats: dict[str, Format] = {}
    for name in _matrices(checkpoint):
        tower, part = part_of(checkpoint.config, name, base=checkpoint.base)
        is_narrow = is_narrow_by_default(checkpoint.config, name, base=checkpoint.base)
        if is_narrow and part not in kept and (not towers or tower in towers):
            formats[name] = format_
    return _checked(checkpoint, formats, scales, "this checkpoint with these options", group)


def read_recipe(
    checkpoint: Checkpoint, path: Path, scales: Scales = "search", group: int | None = None
) -> Recipe:
    """Read a recipe: `{"rules": [{"match": "*.experts.*", "format": "nvfp4"}, ...]}`.

    The first rule whose pattern matches a matrix's name decides; a format of `keep` leaves it as
    it is, and so does the lack of a rule.

    Raises:
        RecipeError: The file is malformed, or a rule matches no matrix that can be quantized.
    """
    document = read_json(path, RecipeError, "see docs/quantize.md")
    rules = document.items("rules")
    matrices = _matrices(checkpoint)
    formats: dict[str, Format] = {}
    used: set[int] = set()
    for rule in rules:
        unknown = [key for key in rule.values if key not in RULE_KEYS]
        if unknown or rule.text("format") not in (*FORMATS, "keep"):
            raise rule.refusal(
                f"a rule has a `match` and a `format` ({', '.join(FORMATS)} or keep), not "
                f"{rule.values}"
            )
    for name in matrices:
        for number, rule in enumerate(rules):
            if fnmatch.fnmatchcase(name, rule.text("match")):
                used.add(number)
                if rule.text("format") != "keep":
                    formats[name] = rule.text("format")  # type: ignore[assignment]  # checked
                break
    idle = [rule.text("match") for number, rule in enumerate(rules) if number not in used]
    if idle:
        raise document.refusal(
            f"nothing is left for the rule {idle[0]!r}: it matches no matrix of experts, Mamba, "
            "attention or heads that an earlier rule leaves"
        )
    return _checked(checkpoint, formats, scales, str(path), group)


def _matrices(checkpoint: Checkpoint) -> list[str]:
    """Return the names of the matrices that can be quantized, in the checkpoint's order."""
    names = []
    for name, tensor in checkpoint.tensors.items():
        if tensor.dtype in FORMAT_OF_DTYPE:
            raise CheckpointError(
                f"{checkpoint.path}: is quantized already ({name} is {tensor.dtype}); name the "
                "checkpoint that it was made of"
            )
        if is_quantizable(name):
            names.append(name)
    return names


def _checked(
    checkpoint: Checkpoint,
    formats: Mapping[str, Format],
    scales: Scales,
    source: str,
    wanted: int | None,
) -> Recipe:
    """Refuse a recipe that no layout can hold."""
    if not formats:
        raise RecipeError(f"{source}: leaves nothing to quantize; keep less")
    kinds = set(formats.values())
    if "int4" in kinds and len(kinds) > 1:
        raise RecipeError(
            f"{source}: mixes int4 with {', '.join(sorted(kinds - {'int4'}))}: int4 has a layout "
            "of its own (compressed-tensors), which the others do not share; choose one of them"
        )
    rows = {name: checkpoint.tensors[name].shape[-1] for name in formats}
    uneven = [
        f"{name} has rows of {rows[name]}"
        for name, kind in formats.items()
        if kind == "nvfp4" and rows[name] % NVFP4_BLOCK
    ]
    group = 0
    if "int4" in kinds:
        common = math.gcd(*rows.values())
        choices = (wanted,) if wanted else INT4_GROUPS
        group = next((size for size in choices if common % size == 0), 0)
        uneven = [f"the rows have {common} as their greatest common divisor"] * (group == 0)
    if uneven:
        sizes = NVFP4_BLOCK if "nvfp4" in kinds else wanted or min(INT4_GROUPS)
        raise RecipeError(
            f"{checkpoint.path}: {listed(uneven)}, and a scale is shared by {sizes} weights of a "
            "row; keep them, or choose fp8"
        )
    return Recipe(dict(formats), group, scales)
