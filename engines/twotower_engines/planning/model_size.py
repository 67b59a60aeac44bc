"""The size of a model: parameters per tower and part, and bytes of context state per slot.

It is read from a checkpoint's `config.json`, a bundle's `manifest.json`, and the headers of
safetensors shards, without reading a weight. Nothing here depends on GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from twotower_contract.config import CONFIG_FILE, ModelConfig
from twotower_contract.engine_set import find_engine_sets
from twotower_contract.errors import CheckpointError
from twotower_contract.index import shard_files
from twotower_contract.json_file import read_json
from twotower_contract.layout import TOWERS, Tower
from twotower_contract.manifest import FORMAT, MANIFEST_FILE, manifest_of_file
from twotower_contract.quantized import FORMAT_OF_DTYPE, FORMATS, weights_in
from twotower_contract.shards import ITEM_SIZES, read_header
from twotower_contract.sizes import PARTS, part_of, parts_of_tower
from twotower_engines.errors import PlanError

RELEASED = Path(__file__).with_name("data") / "released"
"""The released model's config.json."""

_Tensors = Mapping[str, tuple[str, tuple[int, ...]]]
"""Stored dtype and shape by name."""


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Sizes of one model.

    Attributes:
        config: The towers' shapes, and the dtype that they compute in.
        towers: `context`, and `denoiser` where there is one.
        source: The file that it was read from.
        warnings: Oddities in the files, for people.
        precision: The format of the weights where they are quantized, the narrowest of several.
        stored: Tower to the bytes of each part, where they are quantized.
    """

    config: ModelConfig
    towers: tuple[Tower, ...]
    source: str
    warnings: tuple[str, ...] = ()
    precision: str | None = None
    stored: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def layers(self, kind: str) -> int:
        """Return how many layers of a kind (`M`, `*` or `E`) one tower has."""
        return self.config.pattern.count(kind)

    @property
    def expert_parameters(self) -> int:
        """Parameters of one routed expert: up and down, no gate."""
        return 2 * self.config.moe_intermediate_size * self.config.hidden_size

    @property
    def parameters(self) -> int:
        """Parameters of all towers."""
        return sum(sum(parts_of_tower(self.config, tower).values()) for tower in self.towers)

    @property
    def parameters_in_words(self) -> str:
        """The number of parameters in words, as `63.19 B parameters`."""
        count = self.parameters
        for size, letter in ((1e9, "B"), (1e6, "M")):
            if count >= size:
                return f"{count / size:.4g} {letter} parameters"
        return f"{count:,} parameters"

    def as_json(self) -> dict[str, Any]:
        """Return the sizes, for programs."""
        return {
            "source": self.source,
            "dtype": self.config.dtype,
            "precision": self.precision,
            "towers": list(self.towers),
            "pattern": self.config.pattern,
            "parameters": self.parameters,
            "parameters_per_part": {
                tower: parts_of_tower(self.config, tower) for tower in self.towers
            },
        }


def read_model_size(path: Path = RELEASED) -> ModelSize:
    """Read the sizes of a model; of the released one where none is named.

    Args:
        path: A checkpoint folder, a bundle, an engine set or the folder of several, a
            `config.json`, or a `manifest.json`. The headers of a checkpoint's shards are read
            as well, to see that they hold as many parameters as the configuration says.

    Raises:
        PlanError: There is no such file.
        ConfigError: The configuration is refused, in the words of `twotower export`.
        BundleError: The manifest is malformed.
    """
    for name in (MANIFEST_FILE, CONFIG_FILE):
        if (path / name).exists():
            return read_model_size(path / name)
    for engines in find_engine_sets(path):  # of one model, as a rule
        return read_model_size(engines / MANIFEST_FILE)
    if not path.exists() or path.is_dir():
        found = "an empty folder" if path.is_dir() else "nothing"
        if path.is_dir() and any(path.iterdir()):
            found = "neither of them"
        raise PlanError(
            f"{path}: wanted a checkpoint folder with {CONFIG_FILE}, a bundle with "
            f"{MANIFEST_FILE}, or one of these files; found {found}"
        )
    values = read_json(path).values
    if values.get("format") == FORMAT:
        manifest = manifest_of_file(path)
        size = ModelSize(manifest.model, manifest.towers, str(path))
        return _as_stored(size, {n: (t.dtype, t.shape) for n, t in manifest.tensors.items()})
    return _size_of_config(values, path)


def _size_of_config(values: Mapping[str, Any], path: Path) -> ModelSize:
    config = ModelConfig.from_json(values, source=str(path))
    architectures = values.get("architectures") or []
    is_single = bool(architectures) and not any("TwoTower" in str(name) for name in architectures)
    size = ModelSize(config, TOWERS[:1] if is_single else TOWERS, str(path))
    tensors = _stored_tensors(path.parent)
    if tensors is None:
        return size
    held = sum(weights_in(name, *tensor) for name, tensor in tensors.items())
    if held == size.parameters:
        return _as_stored(size, tensors)
    warning = (
        f"{path} describes {size.parameters:,} parameters, the shards beside it hold {held:,}: "
        "the plan follows the configuration; `twotower inspect` says what differs"
    )
    return replace(size, warnings=(warning,))


def _as_stored(size: ModelSize, tensors: _Tensors) -> ModelSize:
    """Return the size with the bytes of its tensors, where some are quantized."""
    formats = {FORMAT_OF_DTYPE[dtype] for dtype, _ in tensors.values() if dtype in FORMAT_OF_DTYPE}
    if any(dtype == "U8" for dtype, _ in tensors.values()):
        formats.discard("fp8")  # NVFP4's scales are E4M3, too; of a mixture the narrower is named
    if not formats:
        return size
    stored: dict[str, dict[str, int]] = {tower: dict.fromkeys(PARTS, 0) for tower in size.towers}
    base = not any(name.startswith("context_tower.") for name in tensors)
    for name, (dtype, shape) in tensors.items():
        tower, part = part_of(size.config, name, base=base)
        if tower in stored:
            stored[tower][part] += ITEM_SIZES[dtype] * math.prod(shape)
    return replace(size, precision=max(formats, key=FORMATS.index), stored=stored)


def _stored_tensors(folder: Path) -> _Tensors | None:
    """Return the tensors of the shards' headers; None where there is no shard, or a broken one.

    A broken shard is the exporter's to explain: a plan needs no weights at all.
    """
    try:
        headers = [read_header(folder / file)[0] for file in shard_files(folder)]
    except CheckpointError:
        return None
    return {
        name: (entry["dtype"], tuple(entry["shape"]))
        for header in headers
        for name, entry in header.items()
        if name != "__metadata__"
    }
