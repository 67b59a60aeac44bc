"""The tokenizer of the tiny checkpoints: byte-level BPE, so that any text survives a round trip.

Ids 0 to 3 are special, as in the released checkpoint: unknown, begin, end, and the mask that marks
a position that is still to be denoised. Then come the 256 bytes, then the merges.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import islice
from types import MappingProxyType
from typing import TYPE_CHECKING

from twotower_export.tiny.corpus import documents

if TYPE_CHECKING:
    from tokenizers import Tokenizer

UNKNOWN, BEGIN, END, MASK = "<unk>", "<s>", "</s>", "<mask>"
SPECIAL_TOKENS = (UNKNOWN, BEGIN, END, MASK)
END_ID, MASK_ID = 2, 3
SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + 256


def train_tokenizer(vocab_size: int, texts: Iterable[str] | None = None) -> Tokenizer:
    """Learns merges until the vocabulary holds at most ``vocab_size`` ids.

    Args:
        vocab_size: At least 260 (the special tokens and the 256 bytes).
        texts: What to learn from; by default 4000 documents of the corpus.

    Raises:
        ValueError: If ``vocab_size`` leaves no room for the bytes.
    """
    from tokenizers import Tokenizer
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer

    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(f"vocab_size is {vocab_size}; at least {SMALLEST_VOCABULARY} are needed")
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus_texts() if texts is None else texts, trainer)
    return tokenizer


def _corpus_texts() -> Iterable[str]:
    for document in islice(documents("train", seed=0), 4000):
        for answer in document.answers:
            yield document.prompt + answer


def tokenizer_config() -> dict[str, object]:
    """Returns the content of tokenizer_config.json."""
    return {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": BEGIN,
        "eos_token": END,
        "mask_token": MASK,
        "pad_token": UNKNOWN,
        "unk_token": UNKNOWN,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 262144,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, str]:
    """Returns the tokenizer's files by name."""
    special: Sequence[tuple[str, str]] = (
        ("bos_token", BEGIN),
        ("eos_token", END),
        ("mask_token", MASK),
        ("pad_token", UNKNOWN),
        ("unk_token", UNKNOWN),
    )
    return {
        "tokenizer.json": tokenizer.to_str(),
        "tokenizer_config.json": json.dumps(tokenizer_config(), indent=2) + "\n",
        "special_tokens_map.json": json.dumps(dict(special), indent=2) + "\n",
    }


@cache
def corpus_tokenizer_files(vocab_size: int) -> Mapping[str, str]:
    """Returns the files of the tokenizer that the corpus gives, trained once per size."""
    return MappingProxyType(tokenizer_files(train_tokenizer(vocab_size)))
