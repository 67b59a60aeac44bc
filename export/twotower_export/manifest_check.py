"""Whether a bundle's manifest has everything that is read of it, of the right kind.

A manifest that was edited, cut short or written by another program is refused by the name of its
first wrong field, before anything is looked up in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from twotower_export.checkpoint import STORED_DTYPES
from twotower_export.config import ModelConfig
from twotower_export.errors import BundleError, ConfigError
from twotower_export.layout import TOWERS, expected_tensors
from twotower_export.shards import ITEM_SIZES

_TENSOR: Final = {"shard": int, "dtype": str, "shape": [int], "begin": int, "end": int}
_FILE: Final = {"file": str, "sha256": str}
_FIELDS: Final[dict[str, Any]] = {
    "twotower_version": str,
    "checkpoint": {
        "path": str,
        "id": (str, type(None)),
        "revision": (str, type(None)),
        "fingerprint": str,
    },
    "model": {},
    "dtype": str,
    "mask_token_id": int,
    "eos_token_ids": [int],
    "towers": [str],
    "max_tokens_per_call": int,
    "shards": [{"file": str, "size": int, "data_start": int, "sample_sha256": str}],
    "tensors": {"*": {**_TENSOR, "sample": str}},
    "graphs": {"native": {"*": _FILE}, "float32": {"*": _FILE}},
    "weights": {"*": {"*": {"how": str, "shape": [int], "sources": [str]}}},
}


def check_manifest(manifest: Mapping[str, Any], source: str) -> None:
    """Refuse a manifest that lacks a field, has one of another kind, or contradicts itself.

    Args:
        manifest: parsed, of the right format and version.
        source: what to call it in messages.

    Raises:
        BundleError: names the field and what was found.
    """
    try:
        check_fields(manifest, _FIELDS)
        config = config_of(manifest, source)
        _check_towers(manifest)
        _check_tensors(manifest)
        _check_weights(manifest, config)
    except (WrongFieldError, ConfigError) as error:
        raise BundleError(
            f"{source}: {str(error).removeprefix(f'{source}: ')}; write the bundle again with "
            "`twotower export`"
        ) from error


def config_of(manifest: Mapping[str, Any], source: str = "manifest.json") -> ModelConfig:
    """The model that a manifest describes.

    Raises:
        ConfigError: it describes none.
    """
    return ModelConfig.from_block(
        manifest["model"],
        source=source,
        mask_token_id=manifest["mask_token_id"],
        eos_token_ids=tuple(manifest["eos_token_ids"]),
        dtype=manifest["dtype"],
    )


class WrongFieldError(Exception):
    """A field is not what it should be; the message begins with its name."""


def check_fields(value: Any, kind: Any, where: str = "") -> None:
    """Compare a value with the kind that it should be of, and everything inside it.

    Args:
        value: parsed JSON.
        kind: a type, several types, `[kind of the items]`, `{"*": kind of the values}`, or an
            object with these fields; others may be there, too.
        where: path to the value, for messages.

    Raises:
        WrongFieldError: names the first field that is missing or of another kind.
    """
    if isinstance(kind, dict):
        if not isinstance(value, dict):
            raise WrongFieldError(f"{_called(where)} should be an object, found {value!r:.80}")
        each = kind.get("*")
        for name in value if each is not None else kind:
            if name not in value:
                raise WrongFieldError(f"the field `{_inside(where, name)}` is missing")
            check_fields(value[name], kind[name] if each is None else each, _inside(where, name))
    elif isinstance(kind, list):
        if not isinstance(value, list):
            raise WrongFieldError(f"{_called(where)} should be a list, found {value!r:.80}")
        for index, item in enumerate(value):
            check_fields(item, kind[0], f"{where}[{index}]")
    elif not isinstance(value, kind) or isinstance(value, bool):
        wanted = kind if isinstance(kind, type) else kind[0]
        raise WrongFieldError(
            f"{_called(where)} should be of type {wanted.__name__}, found {value!r:.80}"
        )


def _called(where: str) -> str:
    return f"the field `{where}`" if where else "the whole"


def _inside(where: str, name: str) -> str:
    return f"{where}: {name}" if where else name


def _check_towers(manifest: Mapping[str, Any]) -> None:
    towers = manifest["towers"]
    if not towers or not set(towers) <= set(TOWERS):
        raise WrongFieldError(
            f"the field `towers` is {towers}, not one or both of {', '.join(TOWERS)}"
        )
    for tower in towers:
        if not manifest["weights"].get(tower):
            raise WrongFieldError(f"the field `weights: {tower}` is missing or empty")


def _check_tensors(manifest: Mapping[str, Any]) -> None:
    """Every tensor fits its dtype and lies in a shard."""
    shards, tensors = manifest["shards"], manifest["tensors"]
    for name, entry in tensors.items():
        if entry["dtype"] not in STORED_DTYPES:
            raise WrongFieldError(
                f"the tensor {name} has dtype {entry['dtype']!r}, not BF16 or F32"
            )
        size = ITEM_SIZES[entry["dtype"]] * math.prod(entry["shape"])
        if not 0 <= entry["shard"] < len(shards) or entry["end"] - entry["begin"] != size:
            raise WrongFieldError(
                f"the tensor {name} lies at bytes {entry['begin']} to {entry['end']} of shard "
                f"{entry['shard']}, but has {size} bytes, and there are {len(shards)} shards"
            )


def _check_weights(manifest: Mapping[str, Any], config: ModelConfig) -> None:
    """Every weight input is made of tensors that are listed, and that such a model has."""
    known = expected_tensors(config) | expected_tensors(config, ("context",), base=True)
    for tower, inputs in manifest["weights"].items():
        for name, weight in inputs.items():
            sources = weight["sources"]
            bad = [one for one in sources if one not in manifest["tensors"] or one not in known]
            if bad or not sources:
                raise WrongFieldError(
                    f"the weight `{tower}: {name}` is made of {(bad or ['nothing'])[0]}, which "
                    "is not among the tensors, or none of such a model"
                )
