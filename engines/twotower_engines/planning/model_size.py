"""How large a model is: parameters per tower and part, and bytes of context state per slot.

Reads a checkpoint's `config.json`, a bundle's `manifest.json`, and the headers of safetensors
shards; never a weight. Knows nothing about GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from twotower_contract.config import ModelConfig
from twotower_contract.errors import CheckpointError
from twotower_contract.json_file import read_json
from twotower_contract.layout import TOWERS
from twotower_contract.manifest import FORMAT, MANIFEST_FILE, manifest_of_file
from twotower_contract.shards import read_header
from twotower_engines.errors import PlanError

__all__ = ["PARTS", "ModelSize", "read_model_size"]

CONFIG_FILE = "config.json"

PARTS = (
    "embeddings",
    "mamba",
    "attention",
    "router",
    "shared experts",
    "routed experts",
    "norms",
    "head",
    "time conditioning",
)
"""Parts of a tower, in the order in which they are listed."""

SSM_ITEM = 4  # the SSM state is float32 whatever the weights are
ITEM_OF_DTYPE = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Sizes of one model.

    Attributes:
        config: The towers' shapes, and the dtype that they compute in.
        towers: `context`, and `denoiser` where there is one.
        source: The file that it was read from.
        warnings: What looked odd while reading, for people.
    """

    config: ModelConfig
    towers: tuple[str, ...]
    source: str
    warnings: tuple[str, ...] = ()

    @property
    def item(self) -> int:
        """Bytes of one element in the checkpoint's dtype."""
        return ITEM_OF_DTYPE[self.config.dtype]

    def layers(self, kind: str) -> int:
        """Return how many layers of a kind (`M`, `*` or `E`) one tower has."""
        return self.config.pattern.count(kind)

    @property
    def expert_parameters(self) -> int:
        """Parameters of one routed expert: up and down, no gate."""
        return 2 * self.config.moe_intermediate_size * self.config.hidden_size

    def parts(self, tower: str) -> dict[str, int]:
        """Return the parameters of each part of a tower; the embeddings and head are its own."""
        c = self.config
        mamba = (c.projection_width + c.d_inner) * c.hidden_size  # in_proj and out_proj
        mamba += c.conv_dim * (c.conv_kernel + 1) + 3 * c.mamba_num_heads + c.d_inner
        return {
            "embeddings": c.vocab_size * c.hidden_size,
            "mamba": self.layers("M") * mamba,
            "attention": self.layers("*") * 2 * (c.query_width + c.kv_width) * c.hidden_size,
            "router": self.layers("E") * (c.num_experts * c.hidden_size + c.num_experts),
            "shared experts": self.layers("E") * 2 * c.shared_intermediate_size * c.hidden_size,
            "routed experts": self.layers("E") * c.num_experts * self.expert_parameters,
            "norms": (len(c.pattern) + 1) * c.hidden_size,
            "head": c.vocab_size * c.hidden_size,
            "time conditioning": self._time_conditioning() if tower == "denoiser" else 0,
        }

    def _time_conditioning(self) -> int:
        """t_embedder (two linears), t_block (one) and three rows per layer."""
        h, frequencies = self.config.hidden_size, self.config.time_frequency_dim
        embedder = h * frequencies + h + h * h + h
        return embedder + 3 * h * h + 3 * h + len(self.config.pattern) * 3 * h

    @property
    def parameters(self) -> int:
        """Parameters of all towers."""
        return sum(sum(self.parts(tower).values()) for tower in self.towers)

    @property
    def parameters_in_words(self) -> str:
        """As `63.19 B parameters`."""
        count = self.parameters
        for size, letter in ((1e9, "B"), (1e6, "M")):
            if count >= size:
                return f"{count / size:.4g} {letter} parameters"
        return f"{count:,} parameters"

    def kv_bytes_per_token(self, item: int) -> int:
        """Bytes of keys and values that one context token leaves, all layers together."""
        c = self.config
        return self.layers("*") * 2 * c.kv_width * item

    @property
    def ssm_bytes(self) -> int:
        """Bytes of the SSM states of one slot."""
        c = self.config
        return self.layers("M") * c.d_inner * c.ssm_state_size * SSM_ITEM

    def conv_bytes(self, item: int) -> int:
        """Bytes of the convolution histories of one slot: the newest raw columns."""
        c = self.config
        return self.layers("M") * (c.conv_kernel - 1) * c.conv_dim * item

    def as_json(self) -> dict[str, Any]:
        """Return what a program may want to know of it."""
        return {
            "source": self.source,
            "dtype": self.config.dtype,
            "towers": list(self.towers),
            "pattern": self.config.pattern,
            "parameters": self.parameters,
            "parameters_per_part": {tower: self.parts(tower) for tower in self.towers},
        }


def read_model_size(path: Path) -> ModelSize:
    """Read the sizes of a model.

    Args:
        path: A checkpoint folder, a bundle or engine set folder, a `config.json`, or a
            `manifest.json`. Of a checkpoint with shards, their headers are read as well, to see
            that they hold as many parameters as the configuration says.

    Raises:
        PlanError: There is no such file.
        ConfigError: The configuration is refused, in the words of `twotower export`.
        BundleError: The manifest is malformed.
    """
    for name in (MANIFEST_FILE, CONFIG_FILE):
        if (path / name).is_file():
            return read_model_size(path / name)
    if not path.is_file():
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
        return ModelSize(manifest.model, manifest.towers, str(path))
    return _size_of_config(values, path)


def _size_of_config(values: Mapping[str, Any], path: Path) -> ModelSize:
    config = ModelConfig.from_json(values, source=str(path))
    architectures = values.get("architectures") or []
    is_single = bool(architectures) and not any("TwoTower" in str(name) for name in architectures)
    size = ModelSize(config, TOWERS[:1] if is_single else TOWERS, str(path))
    held = _stored_parameters(path.parent)
    if held is None or held == size.parameters:
        return size
    warning = (
        f"{path} describes {size.parameters:,} parameters, the shards beside it hold {held:,}: "
        "the plan follows the configuration; `twotower inspect` says what differs"
    )
    return replace(size, warnings=(warning,))


def _stored_parameters(folder: Path) -> int | None:
    """Count elements in the shards' headers; None where there is no shard, or a broken one.

    A broken shard is the exporter's to explain: a plan needs no weights at all.
    """
    shards = sorted(folder.glob("*.safetensors"))
    try:
        headers = [read_header(shard)[0] for shard in shards]
    except CheckpointError:
        return None
    entries = [one for header in headers for name, one in header.items() if name != "__metadata__"]
    return sum(math.prod(entry["shape"]) for entry in entries) if shards else None
