"""The trained checkpoint that ships: it speaks, it is fast, and it needs both towers' bridge."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from tokenizers import Tokenizer

from tests.support.reference import ReferenceModel, generate_ar, generate_mask_diffusion
from tests.support.torch_generation import END_ID, generate, load_towers
from twotower_contract.config import read_config
from twotower_export.checkpoint import open_checkpoint
from twotower_export.reference.towers import (
    ContextTower,
    Denoiser,
    Towers,
    advance_states,
    empty_states,
)
from twotower_export.tiny.checkpoints import copy_pretrained, tiny_config
from twotower_export.tiny.corpus import fact_documents, story_documents, vocabulary, words
from twotower_export.tiny.tokenizer import train_tokenizer
from twotower_export.tiny.training import (
    Recipe,
    batches,
    context_of_blocks,
    train,
    write_trained_checkpoint,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("trained")
    copy_pretrained(path)
    return path


@pytest.fixture(scope="module")
def held_out():
    """Seven stories and three facts, told to those who never asked for them in training."""
    stories = islice(story_documents("held_out", 11), 7)
    return [*stories, *islice(fact_documents("held_out", 11), 3)]


class Spoken:
    """What the checkpoint answers to the held-out prompts, and how good that is."""

    def __init__(self, folder, documents, ablate=None):
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        prompts = [tokenizer.encode(document.prompt).ids for document in documents]
        answers, self.tokens_per_call = generate(
            load_towers(folder), prompts, max_new_tokens=112, ablate=ablate
        )
        self.ended = [answer[-1] == END_ID for answer in answers]
        self.texts = [tokenizer.decode(answer) for answer in answers]
        self.exact = [
            text in document.answers for text, document in zip(self.texts, documents, strict=True)
        ]
        self.agreement = [
            max(
                sum(a == b for a, b in zip(answer, expected, strict=False)) / len(expected)
                for expected in (tokenizer.encode(text).ids for text in document.answers)
            )
            for answer, document in zip(answers, documents, strict=True)
        ]


def mean(values):
    return sum(values) / len(values)


@pytest.fixture(scope="module")
def spoken(folder, held_out):
    return Spoken(folder, held_out)


def test_several_tokens_per_denoiser_call(spoken):
    assert spoken.tokens_per_call > 4  # the promise is 2


def test_answers_are_recognisable_text(spoken):
    known = vocabulary()
    shares = []
    for text in spoken.texts:
        found = words(text)
        assert len(found) >= 10
        shares.append(mean([word in known for word in found]))
        assert shares[-1] >= 0.9, text
    assert mean(shares) > 0.98


def test_answers_continue_sensibly_and_end(spoken):
    assert mean(spoken.ended) > 0.9
    assert mean(spoken.exact) >= 0.8, "\n".join(spoken.texts)
    assert mean(spoken.agreement) > 0.95


@pytest.mark.parametrize("missing", ["seeds", "attention"])
def test_the_denoiser_needs_the_context(folder, held_out, spoken, missing):
    """Zeroed Mamba seeds, or hidden context keys and values, ruin the answers."""
    blind = Spoken(folder, held_out, ablate=missing)
    assert mean(blind.exact) == 0
    assert mean(blind.agreement) < 0.5 * mean(spoken.agreement)
    assert blind.tokens_per_call < 0.75 * spoken.tokens_per_call


def test_independent_model_says_the_same(folder, held_out, spoken):
    """One story through the plain numpy recurrence: the same tokens, calls and end."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = ReferenceModel.load(folder)
    prompt = tokenizer.encode(held_out[0].prompt).ids
    answer = generate_mask_diffusion(model, prompt, 128, eos_ids=(END_ID,))
    new = answer.output_ids[len(prompt) :]
    assert answer.finish_reason == "eos"
    said = new[: new.index(END_ID) + 1]
    assert tokenizer.decode(said) == spoken.texts[0]
    _, tokens_per_call = generate(load_towers(folder), [prompt], max_new_tokens=128)
    assert len(said) / answer.denoiser_calls == pytest.approx(tokens_per_call)


def test_context_tower_alone_speaks_too(folder, held_out):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    prompt = tokenizer.encode(held_out[0].prompt).ids
    answer = generate_ar(ReferenceModel.load(folder), prompt, 128, eos_ids=(END_ID,))
    text = tokenizer.decode(answer.output_ids[len(prompt) :])
    assert answer.finish_reason == "eos"
    assert text in held_out[0].answers


def test_shipped_folder_says_how_it_was_made(folder):
    text = (folder / "README.md").read_text()
    config = read_config(folder / "config.json")
    assert f"--pattern '{config.pattern}' --hidden {config.hidden_size} --seed" in text
    assert repr(Recipe()) in text, "the recipe changed: train and ship the checkpoint again"


# --- the training itself ------------------------------------------------------------------------

SHORT = Recipe(rows=1, context_steps=10, denoiser_steps=3)


@pytest.fixture(scope="module")
def small():
    return tiny_config("M*E", 16, "float32", vocab_size=300), train_tokenizer(300)


def test_training_learns_and_repeats_itself(small):
    losses = []
    first = train(*small, seed=3, recipe=SHORT, progress=lambda tower, x: losses.append((tower, x)))
    again = train(*small, seed=3, recipe=SHORT)
    assert [tower for tower, _ in losses] == ["context tower"] * 10 + ["denoiser"] * 3
    assert losses[9][1] < losses[0][1] - 0.2
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_denoiser_starts_as_the_frozen_context_tower(small):
    tensors = train(*small, seed=3, recipe=Recipe(rows=2, context_steps=2, denoiser_steps=0))
    for name, tensor in tensors.items():
        if name.startswith("context_tower."):
            copy = tensors[name.replace("context_tower.", "denoiser_tower.")]
            assert torch.equal(tensor, copy), name
    assert torch.equal(tensors["lm_head.weight"], tensors["context_lm_head.weight"])
    assert tensors["scale_shift_tables.1"][:, 0].tolist() == [0, 0, 1]
    trained = train(*small, seed=3, recipe=Recipe(rows=2, context_steps=2, denoiser_steps=2))
    changed = {name for name, tensor in tensors.items() if not torch.equal(tensor, trained[name])}
    assert not any(name.startswith("context_") for name in changed)
    assert {"lm_head.weight", "scale_shift_tables.1", "t_block.1.bias"} <= changed


def test_blocks_are_seeded_by_strictly_earlier_tokens(small):
    config, tokenizer = small
    towers = Towers(config, ContextTower(config), Denoiser(config))
    for parameter in towers.context.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    ids, lengths = next(batches(tokenizer, Recipe(rows=3), seed=0))
    ids, lengths = ids[:3], lengths[:3].clamp(max=60)
    offsets = torch.tensor([0, 7, 31])
    blocks, starts, states = context_of_blocks(towers, ids, lengths, offsets, 16)
    rows = [(row, s) for s in range(0, 64, 16) for row in range(3)]
    expected = [(row, int(offsets[row]) + s) for row, s in rows]
    expected = [(row, start) for row, start in expected if start < lengths[row]]
    assert starts.tolist() == [start for _, start in expected]
    for number, (row, start) in enumerate(expected):
        assert torch.equal(blocks[number], ids[row, start : start + 16])
        own = empty_states(config, 1, 128, torch.float32)
        if start:
            size, none = torch.tensor([start]), torch.tensor([0])
            with torch.no_grad():
                _, emitted = towers.context(ids[row : row + 1, :start], size, none, own)
            own = advance_states(own, emitted, size, none)
        for name, state in own.items():
            got, state = states[name][number], state[0]
            if "cache" in name:
                got, state = got[:, :start], state[:, :start]
            assert torch.allclose(got, state, atol=1e-5), (name, row, start)


def test_a_trained_checkpoint_is_written_whole(tmp_path):
    recipe = Recipe(rows=1, context_steps=1, denoiser_steps=1)
    config = write_trained_checkpoint(tmp_path, "ME", 16, seed=9, recipe=recipe)
    assert read_config(tmp_path / "config.json") == config
    assert {tensor.dtype for tensor in open_checkpoint(tmp_path).tensors.values()} == {"BF16"}
    assert "--pattern 'ME' --hidden 16 --seed 9" in (tmp_path / "README.md").read_text()
