"""The model's configuration: NVIDIA's `config.json`, checked, and back.

Everything that the towers need is a field of `ModelConfig`. A setting that would change the
mathematics and that the towers do not implement is refused here, by name, before any work starts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from twotower_contract.errors import ConfigError
from twotower_contract.json_file import Document, read_json
from twotower_contract.options import INT32_MAX
from twotower_contract.settings import (
    IMPLEMENTED,
    LAYER_KINDS,
    LETTERS_IN_WORDS,
    check_settings,
    layer_letters,
)

CONFIG_FILE: Final = "config.json"

DEFAULT_MASK_TOKEN_ID: Final = 3
"""The mask of NVIDIA's `inference.py`; their `config.json` does not name it."""

MAX_LAYERS: Final = 1024
MAX_EXPERTS: Final = 4096
"""Most layers of a tower and experts of a layer: each has tensors of its own to list."""

# Field of ModelConfig -> key of config.json, where they differ.
_KEYS: Final = {
    "pattern": "hybrid_override_pattern",
    "norm_eps": "layer_norm_epsilon",
    "num_experts": "n_routed_experts",
    "shared_intermediate_size": "moe_shared_expert_intermediate_size",
    "eos_token_ids": "eos_token_id",
    "dtype": "torch_dtype",
}

# Which sizes a layer kind brings; a pattern without the kind may lack them.
_SIZES_OF_KIND: Final = {
    "M": ("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size", "conv_kernel"),
    "*": ("num_attention_heads", "num_key_value_heads", "head_dim"),
    "E": (
        "num_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "shared_intermediate_size",
    ),
}

_DTYPES: Final = ("bfloat16", "float32")

# Fields that a manifest has beside its `model` block.
_OUTSIDE_BLOCK: Final = ("mask_token_id", "bos_token_id", "pad_token_id", "eos_token_ids", "dtype")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and constants of one model; both towers have the same.

    Attributes:
        vocab_size: Rows of the embeddings and of each head.
        hidden_size: Width of the residual stream.
        pattern: One letter per layer: `M` Mamba-2, `*` attention, `E` mixture of experts.
        norm_eps: Epsilon of every RMS norm, the gated ones of Mamba included.
        num_attention_heads, num_key_value_heads, head_dim: Grouped-query attention.
        mamba_num_heads, mamba_head_dim: Their product is the inner width of a Mamba layer.
        n_groups, ssm_state_size: Groups that share B and C, and the state's columns per channel.
        conv_kernel: Taps of the causal convolution.
        num_experts, num_experts_per_tok: Routed experts, and how many a token uses.
        moe_intermediate_size, shared_intermediate_size: Widths of a routed expert and of the
            shared one.
        routed_scaling_factor, norm_topk_prob, n_group, topk_group: The router's constants.
        max_position_embeddings: The longest context that the model was made for, in tokens.
        time_frequency_dim: Width of the sinusoid of the time embedding.
        mask_token_id: The id that means "not decided yet" inside a block.
        bos_token_id: First token of a text, if the model has one.
        pad_token_id: Padding, if the model has it.
        eos_token_ids: Tokens that end an answer.
        dtype: Compute dtype of the checkpoint, `bfloat16` or `float32`.
    """

    vocab_size: int
    hidden_size: int
    pattern: str
    norm_eps: float = 1e-5
    num_attention_heads: int = 0
    num_key_value_heads: int = 0
    head_dim: int = 0
    mamba_num_heads: int = 0
    mamba_head_dim: int = 0
    n_groups: int = 1
    ssm_state_size: int = 0
    conv_kernel: int = 4
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    shared_intermediate_size: int = 0
    routed_scaling_factor: float = 1.0
    norm_topk_prob: bool = True
    n_group: int = 1
    topk_group: int = 1
    max_position_embeddings: int = 262144
    time_frequency_dim: int = 256
    mask_token_id: int = DEFAULT_MASK_TOKEN_ID
    bos_token_id: int | None = 1
    pad_token_id: int | None = 0
    eos_token_ids: tuple[int, ...] = (2,)
    dtype: str = "bfloat16"
    source: str = field(default="config", compare=False, repr=False)
    """Names the configuration in messages: a path, where it came from a file."""

    def __post_init__(self) -> None:
        self._check_pattern()
        self._check_sizes()
        self._check_tokens()
        if self.dtype not in _DTYPES:
            raise ConfigError(
                f"{self.source}: torch_dtype is {self.dtype!r}, but only bfloat16 and float32 are "
                "supported (float16 cannot hold the model's states); take the BF16 checkpoint"
            )

    @classmethod
    def from_json(
        cls,
        values: Mapping[str, Any],
        *,
        mask_token_id: int | None = None,
        source: str = CONFIG_FILE,
    ) -> ModelConfig:
        """Read a parsed `config.json`.

        Args:
            values: The file's content; unknown keys are ignored unless they name mathematics.
            mask_token_id: Overrides the file's mask id, which is absent in NVIDIA's.
            source: Name of the file in messages.

        Raises:
            ConfigError: A key is missing or of the wrong type, a size is impossible, or a setting
                asks for something that the towers do not compute.
        """
        pattern = layer_letters(values, source)
        check_settings(values, source)
        read = _read_fields(values, pattern, source)
        read["eos_token_ids"] = token_ids(values.get("eos_token_id", 2), source)
        read["dtype"] = _dtype(values)
        if mask_token_id is not None:
            read["mask_token_id"] = mask_token_id
        config = cls(**read, source=source)
        layers = values.get("num_hidden_layers", len(pattern))
        if layers != len(pattern):
            raise ConfigError(
                f"{source}: num_hidden_layers is {layers!r}, but hybrid_override_pattern "
                f"{pattern!r} has {len(pattern)} letters; take config.json of the same revision"
            )
        return config

    @classmethod
    def from_block(cls, block: Document, **others: Any) -> ModelConfig:
        """Invert `model_block`; `others` are the fields that a manifest has beside it.

        Raises:
            ConfigError: A value is impossible.
            TwoTowerError: The class of the document: a field is missing, unknown, or of another
                type.
        """
        types = _types_in_block()
        for name in block.values:
            if name not in types:
                raise block.refusal(f"the field `{block.name_of(name)}` is unknown")
        read = {name: block.typed(name, type_) for name, type_ in types.items()}
        return cls(**read, **others, source=block.source)

    @property
    def item_bytes(self) -> int:
        """Bytes of one element in the model's dtype."""
        return 2 if self.dtype == "bfloat16" else 4

    @property
    def tensor_dtype(self) -> str:
        """The model's dtype in safetensors' spelling."""
        return "BF16" if self.dtype == "bfloat16" else "F32"

    @property
    def num_layers(self) -> int:
        """Layers of each tower."""
        return len(self.pattern)

    @property
    def d_inner(self) -> int:
        """Width of z, of x and of y in a Mamba layer."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the causal convolution: x | B | C."""
        return self.d_inner + 2 * self.n_groups * self.ssm_state_size

    @property
    def projection_width(self) -> int:
        """Rows of `in_proj`: z | xBC | dt."""
        return self.d_inner + self.conv_dim + self.mamba_num_heads

    @property
    def query_width(self) -> int:
        """Rows of `q_proj`."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Rows of `k_proj` and of `v_proj`."""
        return self.num_key_value_heads * self.head_dim

    @cached_property
    def layers_of_kind(self) -> dict[str, tuple[int, ...]]:
        """Layer indices by letter; every letter is a key."""
        return {kind: tuple(i for i, k in enumerate(self.pattern) if k == kind) for kind in "M*E"}

    def model_block(self) -> dict[str, Any]:
        """Return the `model` block of a bundle's manifest."""
        return {name: getattr(self, name) for name in _types_in_block()}

    def _check_pattern(self) -> None:
        if not 1 <= len(self.pattern) <= MAX_LAYERS:
            count = len(self.pattern)
            what = f"has {count} letters, not 1 to {MAX_LAYERS}" if count else "is empty: no layers"
            raise ConfigError(f"{self.source}: hybrid_override_pattern {what}")
        for index, letter in enumerate(self.pattern):
            if letter not in LAYER_KINDS:
                what = "a plain MLP layer, which TwoTower lacks" if letter == "-" else "unknown"
                raise ConfigError(
                    f"{self.source}: hybrid_override_pattern has the letter {letter!r} at layer "
                    f"{index}: {what}; supported are {LETTERS_IN_WORDS}"
                )

    def _check_sizes(self) -> None:
        sizes = ["vocab_size", "hidden_size", "max_position_embeddings", "time_frequency_dim"]
        for letter, names in _SIZES_OF_KIND.items():
            if letter in self.pattern:
                sizes += names
        for name in sizes:
            most = MAX_EXPERTS if name == "num_experts" else INT32_MAX  # of ids and positions
            if not 1 <= getattr(self, name) <= most:
                raise ConfigError(
                    f"{self.source}: {_KEYS.get(name, name)} is {getattr(self, name)}, not >= 1 "
                    f"and at most {most}; take config.json of the released checkpoint"
                )
        divides = [
            ("*", "num_attention_heads", "num_key_value_heads"),
            ("M", "mamba_num_heads", "n_groups"),
        ]
        for letter, many, few in divides:
            if letter in self.pattern and getattr(self, many) % getattr(self, few):
                raise ConfigError(
                    f"{self.source}: {many} {getattr(self, many)} is no multiple of "
                    f"{few} {getattr(self, few)}"
                )
        if "E" in self.pattern and self.num_experts_per_tok > self.num_experts:
            raise ConfigError(
                f"{self.source}: num_experts_per_tok {self.num_experts_per_tok} exceeds "
                f"n_routed_experts {self.num_experts}"
            )
        for name in ("norm_eps", "routed_scaling_factor"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(
                    f"{self.source}: {_KEYS.get(name, name)} is {getattr(self, name)}, not a "
                    "finite number above 0; take config.json of the released checkpoint"
                )
        if self.time_frequency_dim % 2:
            raise ConfigError(f"{self.source}: time_frequency_dim must be even: cosines and sines")

    def _check_tokens(self) -> None:
        ids = {f"eos_token_id[{i}]": id_ for i, id_ in enumerate(self.eos_token_ids)}
        for name, value in {"mask_token_id": self.mask_token_id, **ids}.items():
            if not 0 <= value < self.vocab_size:
                remedy = "with --mask-token-id" if name == "mask_token_id" else "in this file"
                raise ConfigError(
                    f"{self.source}: {name} {value} is outside the vocabulary "
                    f"(0 to {self.vocab_size - 1}); correct it {remedy}"
                )
        if self.mask_token_id in self.eos_token_ids:
            raise ConfigError(
                f"{self.source}: token {self.mask_token_id} is both the mask and an end of text "
                "(eos_token_id), so no answer could ever end with it; name the mask with "
                "--mask-token-id, or correct eos_token_id"
            )


def read_config(path: Path, *, mask_token_id: int | None = None) -> ModelConfig:
    """Read and check a `config.json`.

    Raises:
        ConfigError: The file is unreadable or refused; see `ModelConfig.from_json`.
    """
    values = read_json(path).values
    return ModelConfig.from_json(values, mask_token_id=mask_token_id, source=str(path))


def token_ids(value: Any, source: str) -> tuple[int, ...]:
    """Return the ids of an `eos_token_id`: one, a list of them, or null for none.

    Raises:
        ConfigError: It is something else.
    """
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(id_, int) and not isinstance(id_, bool) for id_ in ids):
        raise ConfigError(
            f"{source}: eos_token_id is {value!r:.80}, not a token id or a list of them"
        )
    return tuple(ids)


def config_json(config: ModelConfig) -> dict[str, Any]:
    """Return a checkpoint's `config.json` with NVIDIA's keys; the inverse of `from_json`.

    The unlimited time step is written as the literal `Infinity`, as in the released checkpoint.
    """
    values: dict[str, Any] = {
        "architectures": ["NemotronHTwoTowerForCausalLM"],
        "model_type": "nemotron_h",
        "num_hidden_layers": config.num_layers,
    }
    for key, value in config.model_block().items():
        values[_KEYS.get(key, key)] = value
    values |= {
        "norm_eps": config.norm_eps,
        "torch_dtype": config.dtype,
        "bos_token_id": config.bos_token_id,
        "pad_token_id": config.pad_token_id,
        "eos_token_id": (
            config.eos_token_ids[0]
            if len(config.eos_token_ids) == 1
            else list(config.eos_token_ids)
        ),
        "intermediate_size": config.moe_intermediate_size,
        "n_shared_experts": 1,
        "mamba_hidden_act": "silu",
        "mlp_hidden_act": "relu2",
        "mamba_ssm_cache_dtype": "float32",
        "chunk_size": 128,
        "expand": 2,
        "rope_theta": 10000,
        "partial_rotary_factor": 1.0,
        "time_step_min": 0.001,
        "time_step_max": 0.1,
        "time_step_floor": 1e-4,
        "time_step_limit": [0.0, math.inf],
    }
    values |= {
        key: allowed[0] for key, allowed in IMPLEMENTED.items() if isinstance(allowed[0], bool)
    } | {"sliding_window": None}
    # NVIDIA's file has no mask id and no width of the sinusoid: written only where they differ
    if config.mask_token_id != DEFAULT_MASK_TOKEN_ID:
        values["mask_token_id"] = config.mask_token_id
    if config.time_frequency_dim == 256:
        del values["time_frequency_dim"]
    del values["bidirectional_mamba"]
    return dict(sorted(values.items()))


def _types_in_block() -> dict[str, str]:
    """Return the fields of a manifest's `model` block, with the names of their types."""
    outside = (*_OUTSIDE_BLOCK, "source")
    return {f.name: str(f.type) for f in fields(ModelConfig) if f.name not in outside}


def _read_fields(values: Mapping[str, Any], pattern: str, source: str) -> dict[str, Any]:
    """Read the plain fields of `ModelConfig`; refuse a file that lacks a required one."""
    required = {"vocab_size", "hidden_size"}
    for letter, names in _SIZES_OF_KIND.items():
        required |= {name for name in names if letter in pattern} - {"conv_kernel", "n_groups"}
    document = Document(dict(values), source, remedy="take config.json of the released checkpoint")
    read: dict[str, Any] = {}
    missing: list[str] = []
    for one in fields(ModelConfig):
        if one.name in ("source", "eos_token_ids", "dtype"):
            continue
        key = _KEYS.get(one.name, one.name)
        if one.name == "pattern":
            read["pattern"] = pattern
            continue
        if key == "layer_norm_epsilon" and key not in values:
            key = "norm_eps"
        value = values.get(key)
        if value is None:
            if one.name in required:
                missing.append(key)
            elif key in values and "None" in str(one.type):
                read[one.name] = None
            continue
        read[one.name] = document.typed(key, str(one.type).removesuffix(" | None"))
    if missing:
        raise ConfigError(f"{source}: misses {', '.join(sorted(missing))}")
    return read


def _dtype(values: Mapping[str, Any]) -> str:
    value = values.get("torch_dtype")
    if value is None:  # the name of newer transformers
        value = values.get("dtype")
    return "bfloat16" if value is None else str(value).removeprefix("torch.")
