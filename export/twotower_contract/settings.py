"""Settings of `config.json` that change the mathematics, and the values that are implemented."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from twotower_contract.errors import ConfigError
from twotower_contract.quantized import check_quantization_config

IMPLEMENTED: Final[dict[str, tuple[Any, ...]]] = {
    "attention_bias": (False,),
    "bidirectional_mamba": (False, None),
    "conv_kernel": (4,),  # the cached history has three columns
    "mamba_hidden_act": ("silu",),
    "mamba_proj_bias": (False,),
    "mlp_bias": (False,),
    "mlp_hidden_act": ("relu2",),
    "moe_latent_size": (None,),
    "n_group": (1,),  # group-limited routing
    "n_shared_experts": (1,),
    "num_nextn_predict_layers": (0, None),
    "residual_in_fp32": (False,),
    "sliding_window": (None,),
    "tie_word_embeddings": (False,),
    "topk_group": (1,),
    "use_bias": (False,),
    "use_conv_bias": (True,),
}
"""Values that the towers implement, the usual one first; a key that is absent means that value."""

PLAIN: Final = (None, "default")
"""Types of rotary embeddings without scaling."""

LAYER_KINDS: Final = {"M": "Mamba-2", "*": "attention", "E": "mixture of experts"}
LETTERS_IN_WORDS: Final = ", ".join(f"{letter!r} ({kind})" for letter, kind in LAYER_KINDS.items())

# Layer types of transformers 5 (`layers_block_type`), its own names and those it saved before.
_LETTERS: Final = {
    "linear_attention": "M",
    "mamba": "M",
    "full_attention": "*",
    "attention": "*",
    "moe": "E",
    "mlp": "-",
}


def layer_letters(values: Mapping[str, Any], source: str) -> str:
    """Return the letters of the layers, as NVIDIA writes them or as transformers 5 does."""
    pattern, types = values.get("hybrid_override_pattern"), values.get("layers_block_type")
    if types is not None:
        if not isinstance(types, list) or not all(type(t) is str and t in _LETTERS for t in types):
            raise ConfigError(
                f"{source}: layers_block_type is {types!r:.200}, not a list of "
                f"{', '.join(_LETTERS)}: this is no Nemotron-H configuration"
            )
        letters = "".join(_LETTERS[one] for one in types)
        if pattern not in (None, letters):
            raise ConfigError(
                f"{source}: hybrid_override_pattern is {pattern!r:.200}, but layers_block_type "
                f"says {letters!r}; remove the wrong one"
            )
        return letters
    if not isinstance(pattern, str):
        raise ConfigError(
            f"{source}: hybrid_override_pattern is {pattern!r:.200}, not a text of the letters "
            f"{LETTERS_IN_WORDS}: this is no Nemotron-H configuration"
        )
    return pattern


def check_settings(values: Mapping[str, Any], source: str) -> None:
    """Refuse a setting of `config.json` under which the towers would compute something else.

    Raises:
        ConfigError: Names the key, its value, and what is implemented.
    """
    for key, allowed in IMPLEMENTED.items():
        value = values.get(key, allowed[0])
        if not any(type(value) is type(one) and value == one for one in allowed):
            raise ConfigError(
                f"{source}: {key} is {value!r:.120}, but TwoTower's towers are defined with "
                f"{allowed[0]!r} only; this is another model"
            )
    check_quantization_config(values.get("quantization_config"), source)
    for key in ("rope_scaling", "rope_parameters"):
        _check_positions(values.get(key), f"{source}: {key}")
    _check_time_step_limit(values.get("time_step_limit"), source)


def _check_positions(value: Any, name: str) -> None:
    """Refuse an encoding of positions: the attention layers have none, whatever is written here."""
    neutral = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    if value is None or (
        isinstance(value, dict)
        and neutral.issuperset(value)
        and all(value.get(key) in PLAIN for key in ("rope_type", "type"))
    ):
        return
    raise ConfigError(
        f"{name} is {value!r:.120}, which stretches positions, but TwoTower's attention has none; "
        "this is another model"
    )


def _check_time_step_limit(limit: Any, source: str) -> None:
    """Refuse a clamp of the time step that has an effect: the towers have none."""
    if limit is None:
        return
    try:
        low, high = float(limit[0]), float(limit[1])
    except (TypeError, ValueError, LookupError):
        raise ConfigError(
            f"{source}: time_step_limit is {limit!r}, not two numbers [low, high]"
        ) from None
    # softplus is positive: any low bound <= 0 clamps nothing
    if not low <= 0 or high != math.inf:  # NaN is refused, too
        raise ConfigError(
            f"{source}: time_step_limit is [{low}, {high}], which clamps Mamba's time step; "
            "the released model has [0, Infinity] and the towers implement no clamp"
        )
