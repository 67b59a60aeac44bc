"""The size of a model: parameters per tower and part, and bytes of context state per slot.

It is read from a checkpoint's `config.json`, a bundle's `manifest.json`, and the headers of
safetensors shards, without reading a weight. Nothing here depends on GPUs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from twotower_engines.artifacts.document import Document, read_json
from twotower_engines.artifacts.manifest import MANIFEST_FILE, ModelConfig
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

# Where NVIDIA's config.json has another name for a field of ModelConfig.
_CONFIG_KEYS = {
    "pattern": "hybrid_override_pattern",
    "norm_eps": "layer_norm_epsilon",
    "num_experts": "n_routed_experts",
    "shared_intermediate_size": "moe_shared_expert_intermediate_size",
}
_DEFAULTS: dict[str, Any] = {
    "norm_eps": 1e-5,
    "n_group": 1,
    "topk_group": 1,
    "conv_kernel": 4,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": True,
    "max_position_embeddings": 262144,
    "time_frequency_dim": 256,  # not in config.json; width of NVIDIA's `TimestepEmbedder`
}
_SIZES_OF_KIND = {
    "M": ("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size"),
    "*": ("num_attention_heads", "num_key_value_heads", "head_dim"),
    "E": (
        "num_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "shared_intermediate_size",
    ),
}


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Sizes of one model.

    Attributes:
        config: The towers' shapes.
        dtype: Type that the checkpoint computes in, `bfloat16` or `float32`.
        towers: `context`, and `denoiser` where there is one.
        source: The file that it was read from.
        warnings: Oddities in the files, for people.
    """

    config: ModelConfig
    dtype: str
    towers: tuple[str, ...]
    source: str
    warnings: tuple[str, ...] = ()

    @property
    def item(self) -> int:
        """Bytes of one element in the checkpoint's dtype."""
        return ITEM_OF_DTYPE[self.dtype]

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
        inner = c.mamba_num_heads * c.mamba_head_dim
        projections = (inner + c.conv_dim + c.mamba_num_heads) * c.hidden_size
        mamba = projections + inner * c.hidden_size  # in_proj and out_proj
        mamba += c.conv_dim * (c.conv_kernel + 1) + 3 * c.mamba_num_heads + inner
        query, key = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        return {
            "embeddings": c.vocab_size * c.hidden_size,
            "mamba": self.layers("M") * mamba,
            "attention": self.layers("*") * 2 * (query + key) * c.hidden_size,
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
        """The number of parameters in words, as `63.19 B parameters`."""
        count = self.parameters
        for size, letter in ((1e9, "B"), (1e6, "M")):
            if count >= size:
                return f"{count / size:.4g} {letter} parameters"
        return f"{count:,} parameters"

    def kv_bytes_per_token(self, item: int) -> int:
        """Bytes of keys and values that one context token leaves, all layers together."""
        c = self.config
        return self.layers("*") * 2 * c.num_key_value_heads * c.head_dim * item

    @property
    def ssm_bytes(self) -> int:
        """Bytes of the SSM states of one slot."""
        c = self.config
        state = c.mamba_num_heads * c.mamba_head_dim * c.ssm_state_size
        return self.layers("M") * state * SSM_ITEM

    def conv_bytes(self, item: int) -> int:
        """Bytes of the convolution histories of one slot: the newest raw columns."""
        c = self.config
        return self.layers("M") * (c.conv_kernel - 1) * c.conv_dim * item

    def as_json(self) -> dict[str, Any]:
        """Return the sizes, for programs."""
        return {
            "source": self.source,
            "dtype": self.dtype,
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
        PlanError: There is no such file, or it describes no model that we know.
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
    document = read_json(path, PlanError)
    if document.values.get("format") == "twotower-bundle":
        return _size_of_manifest(document)
    return _size_of_config(document, path)


def _size_of_manifest(document: Document) -> ModelSize:
    model = document.section("model")
    values = {field.name: model.values.get(field.name) for field in fields(ModelConfig)}
    return ModelSize(
        config=_model_config(values, model.where),
        dtype=_known_dtype(document.text("dtype"), document.where),
        towers=document.texts("towers"),
        source=document.where,
    )


def _size_of_config(document: Document, path: Path) -> ModelSize:
    values = document.values
    named = {
        field.name: values.get(_CONFIG_KEYS.get(field.name, field.name))
        for field in fields(ModelConfig)
    }
    dtype = values.get("torch_dtype") or values.get("dtype") or "bfloat16"
    architectures = values.get("architectures") or []
    is_single = bool(architectures) and not any("TwoTower" in str(name) for name in architectures)
    size = ModelSize(
        config=_model_config(named, str(path)),
        dtype=_known_dtype(str(dtype), str(path)),
        towers=("context",) if is_single else ("context", "denoiser"),
        source=str(path),
    )
    held = _stored_parameters(path.parent)
    if held is None or held == size.parameters:
        return size
    warning = (
        f"{path} describes {size.parameters:,} parameters, the shards beside it hold {held:,}: "
        "the plan follows the configuration; `twotower inspect` says what differs"
    )
    return ModelSize(size.config, size.dtype, size.towers, size.source, (warning,))


def _model_config(values: Mapping[str, Any], where: str) -> ModelConfig:
    """Check the types of all fields that the pattern needs; the others may be absent."""
    pattern = values.get("pattern")
    if not isinstance(pattern, str) or not pattern:
        raise PlanError(
            f"{where}: has no layer pattern (`hybrid_override_pattern`), found {pattern!r:.80}; "
            "only Nemotron-H models can be planned"
        )
    unknown = sorted(set(pattern) - set(_SIZES_OF_KIND))
    if unknown:
        raise PlanError(f"{where}: pattern letter {unknown[0]!r} is none of M, E and *")
    needed = {"vocab_size", "hidden_size"}
    for kind in set(pattern):
        needed.update(_SIZES_OF_KIND[kind])
    checked: dict[str, Any] = {"pattern": pattern}
    for field in fields(ModelConfig):
        value = values.get(field.name)
        if field.name == "pattern":
            continue
        if field.name in needed:
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                key = _CONFIG_KEYS.get(field.name, field.name)
                raise PlanError(
                    f"{where}: `{key}` should be a positive integer, found {value!r:.80}"
                )
            checked[field.name] = value
        else:
            checked[field.name] = _DEFAULTS.get(field.name, 0) if value is None else value
    return ModelConfig(**checked)


def _known_dtype(dtype: str, where: str) -> str:
    if dtype not in ITEM_OF_DTYPE:
        raise PlanError(
            f"{where}: dtype {dtype!r} is none of {', '.join(ITEM_OF_DTYPE)}; "
            "take the BF16 checkpoint"
        )
    return dtype


def _stored_parameters(folder: Path) -> int | None:
    """Count elements in the shards' headers; None where there is no shard, or a broken one.

    A broken shard is the exporter's to explain: a plan needs no weights at all.
    """
    shards = sorted(folder.glob("*.safetensors"))
    total = 0
    for shard in shards:
        try:
            with shard.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if length > os.fstat(file.fileno()).st_size:
                    return None
                header = json.loads(file.read(length))
            for name, tensor in header.items():
                if name != "__metadata__":
                    total += _product(tensor["shape"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
    return total if shards else None


def _product(shape: list[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
