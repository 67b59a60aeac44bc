"""The tokenizer's files of a checkpoint: which there are, and which ids end an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from twotower_export.config import ModelConfig, read_json
from twotower_export.errors import ConfigError

TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def tokenizer_files(folder: Path) -> list[Path]:
    """Those of the tokenizer's files that the checkpoint has."""
    return [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]


def eos_token_ids(folder: Path, config: ModelConfig) -> tuple[int, ...]:
    """Ids that end an answer: the configuration's, the generation defaults' and the tokenizer's.

    NVIDIA's `inference.py` stops at the tokenizer's end, which is not the id in `config.json`.
    """
    ids = set(config.eos_token_ids)
    if (folder / "generation_config.json").is_file():
        value = read_json(folder / "generation_config.json").get("eos_token_id")
        ids.update(value if isinstance(value, list) else [] if value is None else [value])
    of_tokenizer = _tokenizer_eos(folder)
    if of_tokenizer is not None:
        ids.add(of_tokenizer)
    if not all(isinstance(id_, int) for id_ in ids):
        raise ConfigError(
            f"{folder / 'generation_config.json'}: eos_token_id is no token id or list of them"
        )
    return tuple(sorted(ids))


def _tokenizer_eos(folder: Path) -> int | None:
    """Id of the `eos_token` that `tokenizer_config.json` names, if it does."""
    settings, vocabulary = folder / "tokenizer_config.json", folder / "tokenizer.json"
    if not settings.is_file() or not vocabulary.is_file():
        return None
    token: Any = read_json(settings).get("eos_token")
    if isinstance(token, dict):  # an AddedToken, written out
        token = token.get("content")
    if not isinstance(token, str):
        return None
    try:
        content = json.loads(vocabulary.read_text(encoding="utf-8"))
        for one in content.get("added_tokens", []):
            if one["content"] == token:
                return int(one["id"])
        known = content["model"]["vocab"]
        # a unigram model has a list of pairs; its special tokens are all among the added ones
        return known.get(token) if isinstance(known, dict) else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{vocabulary}: is no tokenizer: {error!r}; copy or download it again"
        ) from error
