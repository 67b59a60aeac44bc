"""A tokenizer beside the files that NVIDIA's release has: the ids of transformers, nothing cut."""

from __future__ import annotations

import json
import shutil
from importlib import resources

import pytest
import tokenizers

from twotower_contract.errors import ConfigError
from twotower_contract.tokenizer import open_tokenizer

TEXT = "Mia <think>the fox</think> lived <|im_end|> by <s> the <extra> river. <mask>"


@pytest.fixture
def folder(tmp_path):
    for path in (resources.files("twotower_export") / "data" / "tiny").iterdir():
        if "token" in path.name:
            shutil.copy(path, tmp_path)
    return tmp_path


def change(path, **values):
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | values))


def transformers_ids(folder, text=TEXT):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)(text)["input_ids"]


def token(content, special=True):
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word"), False)
    return {"content": content, **flags, "normalized": False, "special": special}


BESIDE = {
    "as it is": {},
    "decoder": {
        "tokenizer_config.json": {
            "added_tokens_decoder": {
                "837": token("<|im_end|>"), "0": token("<unk>"), "836": token("<think>", False),
            }
        }
    },
    "lists": {"tokenizer_config.json": {"additional_special_tokens": ["<think>", "</think>"]}},
    "new lists": {"tokenizer_config.json": {"extra_special_tokens": ["<extra>"]}},
    "map": {
        "special_tokens_map.json": {
            "additional_special_tokens": ["<|im_end|>"], "sep_token": token("<extra>"),
        }
    },
    "decoder and map": {
        "tokenizer_config.json": {"added_tokens_decoder": {"836": token("<think>")}},
        "special_tokens_map.json": {"additional_special_tokens": ["<extra>"]},
    },
    "added tokens": {"added_tokens.json": {"</think>": 837, "<extra>": 836}},
}  # fmt: skip


@pytest.mark.parametrize("files", BESIDE.values(), ids=BESIDE)
def test_ids_are_those_of_transformers(folder, files):
    for name, values in files.items():
        change(folder / name, **values)
    tokenizer = open_tokenizer(tokenizers, folder)
    assert tokenizer.encode(TEXT).ids == transformers_ids(folder)
    if files:
        assert max(tokenizer.encode(TEXT).ids) >= 836, "no token was added"


def test_truncation_and_padding_are_switched_off(folder):
    whole = open_tokenizer(tokenizers, folder).encode(TEXT).ids
    change(
        folder / "tokenizer.json",
        truncation={"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
        padding={"strategy": {"Fixed": 99}, "direction": "Left", "pad_to_multiple_of": None,
                 "pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>"},
    )  # fmt: skip
    assert open_tokenizer(tokenizers, folder).encode(TEXT).ids == whole == transformers_ids(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"added_tokens_decoder": {"x": token("<a>")}}, "has the id 'x'"),
        ({"added_tokens_decoder": {"836": 7}}, "`added_tokens_decoder: 836` names no token: 7"),
        ({"added_tokens_decoder": [1]}, "`added_tokens_decoder` should be an object"),
        ({"sep_token": ["</s>"]}, "`sep_token` names no token"),
        ({"additional_special_tokens": [None]}, "`additional_special_tokens` names no token"),
        ({"additional_special_tokens": 7}, "`additional_special_tokens` should be a list"),
    ],
)
def test_what_names_no_token_is_refused(folder, values, message):
    change(folder / "tokenizer_config.json", **values)
    with pytest.raises(ConfigError, match=message):
        open_tokenizer(tokenizers, folder)
