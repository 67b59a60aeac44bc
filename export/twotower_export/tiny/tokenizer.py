"""The tokenizer of the tiny checkpoints: byte-level BPE, so that any text survives a round trip.

Ids 0 to 3 are special, as in the released checkpoint: unknown, begin, end, and the mask that marks
a position that is still to be denoised. Then come the 256 bytes, then the merges.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
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


def train_tokenizer(vocab_size: int) -> Tokenizer:
    """Learn merges from 4000 documents of the corpus, until there are ``vocab_size`` ids at most.

    Raises:
        ValueError: If it is below 260 (the special tokens and the 256 bytes).
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
    texts = (
        document.prompt + answer
        for document in islice(documents("train", seed=0), 4000)
        for answer in document.answers
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, str]:
    """Return the tokenizer's files by name."""
    special = {
        "bos_token": BEGIN,
        "eos_token": END,
        "mask_token": MASK,
        "pad_token": UNKNOWN,
        "unk_token": UNKNOWN,
    }
    config = {
        "add_bos_token": False,
        "add_eos_token": False,
        **special,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 262144,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    return {
        "tokenizer.json": tokenizer.to_str(),
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
        "special_tokens_map.json": json.dumps(special, indent=2) + "\n",
    }


@cache
def corpus_tokenizer_files(vocab_size: int) -> Mapping[str, str]:
    """Return the files of the tokenizer that the corpus gives, trained once per size."""
    return MappingProxyType(tokenizer_files(train_tokenizer(vocab_size)))
