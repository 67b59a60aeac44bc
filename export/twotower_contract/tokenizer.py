"""A checkpoint's tokenizer, opened so that a text has the ids that transformers gives it.

`tokenizer.json` may hold settings of its last use, truncation and padding, which would cut or pad
prompts in silence: they are switched off. And `tokenizer_config.json` or `special_tokens_map.json`
may name tokens that it lacks: transformers adds those when it loads, and so do we.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from twotower_contract.errors import ConfigError, TwoTowerError
from twotower_contract.files import read_file
from twotower_contract.json_file import Document, read_json

TOKENIZER_FILE: Final = "tokenizer.json"
SETTINGS_FILE: Final = "tokenizer_config.json"
SPECIAL_FILE: Final = "special_tokens_map.json"
ADDED_FILE: Final = "added_tokens.json"
TOKENIZER_FILES: Final = (
    TOKENIZER_FILE,
    SETTINGS_FILE,
    SPECIAL_FILE,
    ADDED_FILE,
    "chat_template.jinja",
)
"""Files of an exported tokenizer."""

NAMED: Final = tuple(f"{one}_token" for one in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
LISTS: Final = ("additional_special_tokens", "extra_special_tokens")
FLAGS: Final = ("lstrip", "rstrip", "single_word", "normalized", "special")
REMEDY: Final = "copy or download it again"


def open_tokenizer(tokenizers: Any, folder: Path, error: type[TwoTowerError] = ConfigError) -> Any:
    """Open the tokenizer of a folder, a `tokenizers.Tokenizer`.

    Args:
        tokenizers: The library, as its user imported it.
        folder: A checkpoint, a bundle or an engine set.
        error: The error class to raise.

    Raises:
        TwoTowerError: It is missing, or one of its files cannot be read.
    """
    path = folder / TOKENIZER_FILE
    content = read_file(path, error, REMEDY)
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except Exception as problem:  # the library raises bare Exception
        raise error(f"{path}: cannot be read as a tokenizer: {problem}; {REMEDY}") from problem
    tokenizer.no_truncation()
    tokenizer.no_padding()
    known = {str(one) for one in tokenizer.get_added_tokens_decoder().values()}
    tokenizer.add_tokens(
        [tokenizers.AddedToken(**one) for one in _named_tokens(folder, known, error)]
    )
    return tokenizer


def _named_tokens(
    folder: Path, known: set[str], error: type[TwoTowerError]
) -> Iterator[dict[str, Any]]:
    """Yield the tokens that the files beside `tokenizer.json` name, in transformers' order.

    That is (`PreTrainedTokenizerBase._from_pretrained`): those of `added_tokens_decoder` by their
    ids, the named ones, the lists. The other files count where there is no decoder.

    Args:
        folder: As for `open_tokenizer`.
        known: Tokens that `tokenizer.json` adds; only the decoder may change their flags.
        error: The error class to raise.
    """
    settings = _document(folder / SETTINGS_FILE, error)
    special: list[dict[str, Any]] = []
    decoder: dict[int, dict[str, Any]] = {}
    if "added_tokens_decoder" not in settings.values:
        merged = settings.values | _document(folder / SPECIAL_FILE, error).values
        settings = Document(merged, settings.source, error, REMEDY)
    for key, value in _special(settings):
        special.append(_token(settings, key, value) | {"special": True})
    contents = {one["content"] for one in special}
    if "added_tokens_decoder" in settings.values:
        for id_, value in settings.values_of("added_tokens_decoder").items():
            decoder[_id(settings, id_)] = _token(settings, f"added_tokens_decoder: {id_}", value)
    else:
        added = _document(folder / ADDED_FILE, error)
        for text in added.values:
            flags = {"normalized": text not in contents, "special": text in contents}
            decoder[added.integer(text)] = {"content": text, **flags}
    for _, token in sorted(decoder.items()):
        known.add(token["content"])
        yield token
    yield from (one for one in special if one["content"] not in known)


def _special(settings: Document) -> Iterator[tuple[str, Any]]:
    """Yield key and value of every special token that a file names."""
    for key in NAMED:
        if settings.values.get(key) is not None:
            yield key, settings.values[key]
    for key in LISTS:
        several = settings.values.get(key) or []
        if not isinstance(several, list | dict):
            raise settings.refusal(f"the field `{key}` should be a list, found {several!r:.80}")
        for value in several.values() if isinstance(several, dict) else several:
            yield key, value


def _id(settings: Document, text: str) -> int:
    if not text.isdecimal() or len(text) > 10:
        raise settings.refusal(f"the field `added_tokens_decoder` has the id {text!r:.80}")
    return int(text)


def _document(path: Path, error: type[TwoTowerError]) -> Document:
    """Return the object of a file that may be absent."""
    if not path.exists() and not path.is_symlink():
        return Document({}, str(path), error, REMEDY)
    return read_json(path, error, REMEDY)


def _token(settings: Document, key: str, value: Any) -> dict[str, Any]:
    """Return the arguments of an `AddedToken`: a token is a text, or an object with its flags."""
    if isinstance(value, str):
        value = {"content": value}
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise settings.refusal(f"the field `{key}` names no token: {value!r:.80}")
    flags = {flag: bool(value[flag]) for flag in FLAGS if flag in value}
    return {"content": value["content"], **flags}
