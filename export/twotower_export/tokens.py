"""The tokenizer's files of a checkpoint: which there are, and which ids end an answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from twotower_contract.config import ModelConfig, token_ids
from twotower_contract.errors import ConfigError
from twotower_contract.files import read_file
from twotower_contract.json_file import read_json
from twotower_contract.tokenizer import (
    REMEDY,
    SETTINGS_FILE,
    TOKENIZER_FILE,
    TOKENIZER_FILES,
    open_tokenizer,
)


def tokenizer_files(folder: Path) -> list[Path]:
    """Those of the tokenizer's files that the checkpoint has, each of which can be read.

    Raises:
        ConfigError: One is a Git LFS pointer, too large, or no ordinary file.
    """
    there = [folder / name for name in TOKENIZER_FILES if (folder / name).exists()]
    for path in there:
        read_file(path, ConfigError, REMEDY)
    return there


def tokenizer_warnings(folder: Path) -> list[str]:
    """Warn of a checkpoint's tokenizer that is missing or cannot be read."""
    if not (folder / TOKENIZER_FILE).exists():
        other = " (tokenizer.model alone is not read)" * (folder / "tokenizer.model").exists()
        return [
            f"{folder}: has no {TOKENIZER_FILE}{other}, so prompts and answers will be token ids; "
            "copy it from the released checkpoint and export again"
        ]
    try:
        import tokenizers

        open_tokenizer(tokenizers, folder)
    except ConfigError as problem:
        return [f"prompts and answers will be token ids: {problem}"]
    except ImportError:
        pass
    return []


def eos_token_ids(folder: Path, config: ModelConfig) -> tuple[int, ...]:
    """Return the ids that end an answer: of configuration, generation defaults and tokenizer.

    NVIDIA's `inference.py` stops at the tokenizer's end, which is not the id in `config.json`.

    Raises:
        ConfigError: A file is unreadable, or names something that cannot end an answer.
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
    """Yield ends of text beside the configuration, with the file that names each."""
    generation = folder / "generation_config.json"
    if generation.exists():
        for id_ in token_ids(read_json(generation).values.get("eos_token_id"), str(generation)):
            yield generation, id_
    of_tokenizer = _tokenizer_eos(folder)
    if of_tokenizer is not None:
        yield folder / TOKENIZER_FILE, of_tokenizer


def _tokenizer_eos(folder: Path) -> int | None:
    """Id of the `eos_token` that `tokenizer_config.json` names, if it does."""
    settings, vocabulary = folder / SETTINGS_FILE, folder / TOKENIZER_FILE
    if not settings.exists() or not vocabulary.exists():
        return None
    token: Any = read_json(settings).values.get("eos_token")
    if isinstance(token, dict):  # an AddedToken, written out
        token = token.get("content")
    if not isinstance(token, str):
        return None
    try:
        content = json.loads(read_file(vocabulary, ConfigError, REMEDY))
        for one in content.get("added_tokens", []):
            if one["content"] == token:
                return int(one["id"])
        known = content["model"]["vocab"]
        # a unigram model has a list of pairs; its special tokens are all among the added ones
        id_ = known.get(token) if isinstance(known, dict) else None
        return None if id_ is None else int(id_)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise ConfigError(f"{vocabulary}: is no tokenizer: {error!r:.200}; {REMEDY}") from error
