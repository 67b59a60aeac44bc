"""The tokenizer's files of a checkpoint: which there are, and which ids end an answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from twotower_contract.config import ModelConfig, token_ids
from twotower_contract.errors import ConfigError
from twotower_contract.json_file import read_json

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

    Raises:
        ConfigError: a file is unreadable, or names something that cannot end an answer.
    """
    ids = set(config.eos_token_ids)
    for file, id_ in _ids_of_files(folder):
        if not 0 <= id_ < config.vocab_size:
            raise ConfigError(
                f"{file}: eos_token_id {id_} is outside the vocabulary "
                f"(0 to {config.vocab_size - 1}); take this file and config.json of the same "
                "revision"
            )
        if id_ == config.mask_token_id:
            raise ConfigError(
                f"{file}: eos_token_id {id_} is the mask; name another mask with "
                "--mask-token-id, or correct this file"
            )
        ids.add(id_)
    return tuple(sorted(ids))


def _ids_of_files(folder: Path) -> Iterator[tuple[Path, int]]:
    """Ends of text beside the configuration, with the file that names each."""
    generation = folder / "generation_config.json"
    if generation.is_file():
        for id_ in token_ids(read_json(generation).values.get("eos_token_id"), str(generation)):
            yield generation, id_
    of_tokenizer = _tokenizer_eos(folder)
    if of_tokenizer is not None:
        yield folder / "tokenizer.json", of_tokenizer


def _tokenizer_eos(folder: Path) -> int | None:
    """Id of the `eos_token` that `tokenizer_config.json` names, if it does."""
    settings, vocabulary = folder / "tokenizer_config.json", folder / "tokenizer.json"
    if not settings.is_file() or not vocabulary.is_file():
        return None
    token: Any = read_json(settings).values.get("eos_token")
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
        id_ = known.get(token) if isinstance(known, dict) else None
        return None if id_ is None else int(id_)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise ConfigError(
            f"{vocabulary}: is no tokenizer: {error!r:.200}; copy or download it again"
        ) from error
