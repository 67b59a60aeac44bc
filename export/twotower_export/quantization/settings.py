"""The settings by which other programs know a quantized checkpoint.

`hf_quant_config.json` and the `quantization_config` of `config.json` follow ModelOpt
(`modelopt/torch/export/convert_hf_config.py`); INT4 follows compressed-tensors.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from typing import Any, Final

from twotower_contract.quantized import NVFP4_BLOCK, Format
from twotower_export.checkpoint import Checkpoint
from twotower_export.quantization.recipe import Recipe

_ALGORITHMS: Final[Mapping[Format, dict[str, Any]]] = {
    "fp8": {"quant_algo": "FP8"},
    "nvfp4": {"quant_algo": "W4A16_NVFP4", "group_size": NVFP4_BLOCK},
}
_WEIGHTS: Final[Mapping[Format, dict[str, Any]]] = {
    "fp8": {"dynamic": False, "num_bits": 8, "type": "float"},
    "nvfp4": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": NVFP4_BLOCK},
}


def hf_quant_config(checkpoint: Checkpoint, recipe: Recipe) -> dict[str, Any] | None:
    """Return the content of `hf_quant_config.json`; None for `int4`, which has no such file."""
    kinds = sorted(set(recipe.formats.values()))
    if kinds == ["int4"]:
        return None
    if len(kinds) == 1:
        algorithm = dict(_ALGORITHMS[kinds[0]])
    else:
        layers = {_module(name): _ALGORITHMS[kind] for name, kind in recipe.formats.items()}
        algorithm = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    return {
        "producer": {"name": "twotower", "version": importlib.metadata.version("twotower")},
        "quantization": algorithm
        | {"kv_cache_quant_algo": None, "exclude_modules": _kept(checkpoint, recipe)},
    }


def quantization_config(checkpoint: Checkpoint, recipe: Recipe) -> dict[str, Any]:
    """Return the `quantization_config` of `config.json`."""
    settings = hf_quant_config(checkpoint, recipe)
    if settings is None:
        return _compressed_tensors(checkpoint, recipe)
    algorithm = settings["quantization"]
    is_mixed = "quantized_layers" in algorithm
    groups = {
        f"group_{number}": {
            "weights": _WEIGHTS[kind],
            "targets": sorted(_module(name) for name, one in recipe.formats.items() if one == kind)
            if is_mixed
            else ["Linear"],
        }
        for number, kind in enumerate(sorted(set(recipe.formats.values())))
    }
    return {
        "quant_method": "modelopt",
        "quant_algo": algorithm["quant_algo"],
        "producer": settings["producer"],
        "config_groups": groups,
        "ignore": algorithm["exclude_modules"],
    } | ({"quantized_layers": algorithm["quantized_layers"]} if is_mixed else {})


def _compressed_tensors(checkpoint: Checkpoint, recipe: Recipe) -> dict[str, Any]:
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": recipe.group,
        "dynamic": False,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": None,
                "output_activations": None,
            }
        },
        "ignore": _kept(checkpoint, recipe),
        "kv_cache_scheme": None,
    }


def _kept(checkpoint: Checkpoint, recipe: Recipe) -> list[str]:
    """Return the modules with a matrix or a convolution that keeps its dtype."""
    return sorted(
        _module(name)
        for name, tensor in checkpoint.tensors.items()
        if name.endswith(".weight")
        and len(tensor.shape) > 1
        and "embeddings" not in name
        and name not in recipe.formats
    )


def _module(name: str) -> str:
    return name.removesuffix(".weight")
