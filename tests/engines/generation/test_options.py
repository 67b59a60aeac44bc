"""The effect of each option on whole answers, in every mode that has it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.support.reference import END_ID
from twotower_engines.artifacts.tokenizer import Tokenizer
from twotower_engines.errors import RequestError
from twotower_engines.generation.generator import Generator
from twotower_engines.generation.request import GIVEN, Request, RequestLimits

MODES = ("mask_diffusion", "ar", "mock_ar")
LIMITS = RequestLimits(
    context=100, block_size_max=32, vocab_size=300, end_ids=(2,), mask_token_id=3
)


@pytest.fixture(scope="module")
def engines(random_engines):
    return random_engines("MEM*E", seed=3)


@pytest.fixture(scope="module")
def generator(engines):
    with Generator(engines.engines, threads=1) as opened:
        yield opened


def new_ids(generator, request):
    return generator.generate(request).output_ids[len(request.prompt_ids) :]


def asked(mode, **options):
    """A request whose answer is drawn, so that it has many different tokens."""
    usual = {"temperature": 1.0, "seed": 4, "max_new_tokens": 40, "ignore_eos": True}
    return Request("r", (5, 6), mode=mode, **{**usual, **options})


@pytest.mark.parametrize("mode", MODES)
def test_the_models_end_token_ends_by_itself(random_engines, mode):
    """The end token is made likely: its rows of the heads are those of the likeliest token."""
    made = random_engines("MEM*E", seed=3)
    runtime, likely = made.runtime, new_ids_of(made.runtime, asked(mode))[7]
    runtime.eos_token_ids = (likely,)
    try:
        whole = new_ids_of(runtime, asked(mode))
        ended = new_ids_of(runtime, replace(asked(mode), ignore_eos=False))
    finally:
        runtime.eos_token_ids = (END_ID,)
    assert len(whole) == 40
    assert ended == whole[: whole.index(likely) + 1]


def new_ids_of(runtime, request):
    from twotower_engines.generation.scheduler import Scheduler

    scheduler, ids = Scheduler(runtime, slots=1), []
    scheduler.submit(request)
    while not scheduler.idle:
        for event in scheduler.turn():
            assert event.error is None
            ids += event.ids
    return tuple(ids)


@pytest.mark.parametrize("mode", ["ar", "mock_ar"])
def test_no_end_token_is_chosen_before_the_least_length(generator, mode):
    whole = new_ids(generator, asked(mode))
    ends = tuple(set(whole[:5]))
    assert len(new_ids(generator, asked(mode, eos_ids=ends))) == 1
    longer = new_ids(generator, asked(mode, eos_ids=ends, min_new_tokens=20))
    assert not set(longer[:19]) & set(ends)
    assert 20 <= len(longer) <= 40


def test_diffusion_goes_on_over_end_tokens_before_the_least_length(generator):
    whole = new_ids(generator, asked("mask_diffusion"))
    least = next(i for i in range(20, 40) if whole[i] in whole[:i])
    ended = new_ids(
        generator, asked("mask_diffusion", eos_ids=(whole[least],), min_new_tokens=least + 1)
    )
    assert ended == whole[: least + 1]


@pytest.mark.parametrize("most", [1, 3, 7, 16, 17])
def test_the_last_call_that_is_allowed_fills_the_block(generator, most):
    request = asked("mask_diffusion", max_denoiser_calls=most, threshold=1.0, max_new_tokens=64)
    result = generator.generate(request)
    assert result.denoiser_calls == most
    assert result.finish_reason == "calls"
    assert len(result.output_ids) - 2 == 16 * (1 + (most - 1) // 16)
    mock = generator.generate(asked("mock_ar", max_denoiser_calls=most))
    assert (mock.denoiser_calls, len(mock.output_ids) - 2) == (most, most)


def test_a_bound_that_is_not_met_changes_nothing(generator):
    request = asked("mask_diffusion")
    assert generator.generate(replace(request, max_denoiser_calls=10**6)).output_ids == (
        generator.generate(request).output_ids
    )


@pytest.mark.parametrize("mode", MODES)
def test_a_token_that_repeats_itself_ends_the_answer(generator, mode):
    request = replace(asked(mode), temperature=0.0, max_new_tokens=64)
    whole = new_ids(generator, request)
    runs = [i for i in range(1, 64) if whole[i] == whole[i - 1]]
    result = generator.generate(replace(request, max_repetition_run=1))
    assert result.finish_reason == ("repetition" if runs else "length")
    assert result.output_ids[2:] == whole[: runs[0] + 1 if runs else 64]
    assert runs or mode != "mask_diffusion", "the model should repeat itself in some mode"


def test_a_canvas_stays_and_the_rest_is_filled(generator, engines):
    canvas = (-1, 50, -1, -1, 51, *(-1,) * 13, 52, -1, *range(60, 72), 70, 71, 72, 73)
    request = asked("mask_diffusion", canvas=canvas, max_new_tokens=48, block_size=8)
    events = list(generator.stream(request))
    ids = [token for event in events for token in event.ids]
    assert len(ids) == 48
    assert [one for one, fixed in zip(ids, canvas, strict=False) if fixed != -1] == [
        one for one in canvas if one != -1
    ]
    assert [event.masked_counts[:1] for event in events] == [(6,), (8,), (3,), (), (4,), (8,)]
    free = new_ids(generator, replace(request, canvas=()))
    assert list(free) != ids
    assert (
        list(new_ids(generator, replace(request, canvas=(free[0], *(-1,) * 20, free[21])))) != ids
    )


def test_a_canvas_that_fixes_the_answer_is_the_answer(generator):
    result = generator.generate(
        asked("mask_diffusion", canvas=tuple(range(40, 88)), max_new_tokens=48)
    )
    assert (result.output_ids[2:], result.denoiser_calls) == (tuple(range(40, 88)), 0)


def test_nothing_ends_before_the_last_fixed_token(generator):
    request = asked("mask_diffusion", max_new_tokens=64)
    whole = new_ids(generator, request)
    fixed = replace(request, canvas=(*(-1,) * 40, 90), eos_ids=tuple(set(whole)), ignore_eos=False)
    assert len(new_ids(generator, fixed)) > 40


def test_details_tell_what_the_denoiser_said(generator, engines, reference):
    """Against the numpy towers, step by step: the token's probability when it was committed."""
    request = Request("r", (5, 6, 7), max_new_tokens=16, logprobs=True, canvas=(-1, 50))
    (event,) = generator.stream(replace(request, ignore_eos=True))
    model, caches = engines.reference, engines.reference.new_cache()
    model.extend(caches, (5, 6, 7))
    block = np.full(16, 3)
    block[1] = 50
    for step, masked in enumerate(event.masked_counts):
        logits = np.array(model.denoise(caches, block, masked / 16), np.float64)
        logits[:, 3] = -np.inf
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        for place, (token, detail) in enumerate(zip(event.ids, event.details, strict=True)):
            if detail.step == step:
                assert detail.logprob == pytest.approx(log_p[place, token], abs=1e-3)
                assert detail.confidence == pytest.approx(np.exp(detail.logprob))
                block[place] = token
        assert (block == 3).sum() == (*event.masked_counts, 0)[step + 1]
    assert (event.details[1].step, event.details[1].logprob) == (GIVEN, 0.0)
    assert generator.generate(replace(request, logprobs=False)).output_ids[3:] == event.ids


@pytest.mark.parametrize("mode", ["ar", "mock_ar"])
def test_details_of_a_token_by_token_answer(generator, mode):
    request = asked(mode, logprobs=True, top_logprobs=3, temperature=0.0, block_size=7)
    events = list(generator.stream(request))
    assert sum(len(event.details) for event in events) == 40
    for event in events:
        for token, detail in zip(event.ids, event.details, strict=True):
            assert detail.top[0] == (token, detail.logprob)
            assert [one for _, one in detail.top] == sorted(
                (p for _, p in detail.top), reverse=True
            )
            assert sum(np.exp(p) for _, p in detail.top) < 1


def test_the_canvas_is_shown_at_every_step(generator):
    request = asked("mask_diffusion", temperature=0.0, threshold=1.0, steps=4)
    blocks = list(generator.stream(request))
    events = list(generator.stream(replace(request, stream_mode="denoise")))
    assert [event for event in events if not event.canvas] == blocks
    assert [(event.canvas.count(3), event.ids) for event in events[:4]] == [
        (12, ()), (8, ()), (4, ()), (0, blocks[0].ids),
    ]  # fmt: skip
    for step in events[:3]:
        assert len(step.canvas_confidence) == 16
        assert all(0 < one <= 1 for one in step.canvas_confidence)
        kept = zip(step.canvas, blocks[0].ids, strict=True)
        assert all(shown in (3, token) for shown, token in kept)


def test_stop_strings_need_a_tokenizer_and_end_the_answer(engines, generator):
    tokenizer = Tokenizer(engines.folder)
    with pytest.raises(RequestError, match="no tokenizer to find text with"):
        generator.generate(asked("ar", stop=("a",)))
    with Generator(engines.engines, threads=1, tokenizer=tokenizer) as speaking:
        for mode in MODES:
            whole = new_ids(generator, asked(mode))
            text = tokenizer.decode(whole)
            windows = [text[at:][:2] for at in range(5, len(text) - 3)]
            stop = next(one for one in windows if "\ufffd" not in one)
            events = list(speaking.stream(asked(mode, stop=(stop, "never there"))))
            assert events[-1].finish_reason == "stop"
            assert "".join(event.text for event in events) == text[: text.index(stop)]
            ids = [token for event in events for token in event.ids]
            assert tuple(ids) == whole[: len(ids)]
            assert stop in tokenizer.decode(ids)
            assert stop not in tokenizer.decode(ids[:-1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"canvas": (-1, 300)}, "canvas: token 300 at place 1 is outside"),
        ({"canvas": (-1, 3)}, "canvas holds the mask token, 3; write -1 where"),
        ({"canvas": (2, -1, 5)}, "the model's end token 2 before its last fixed token"),
        ({"canvas": (9, 5), "eos_ids": (9,)}, "canvas has the end token 9 before its last"),
        ({"canvas": (5,) * 65}, "canvas has 65 places, but max_new_tokens is 64"),
        ({"canvas": (5,), "mode": "ar"}, "mode ar fixes no token"),
        ({"min_new_tokens": 65}, "min_new_tokens is 65, above max_new_tokens, 64"),
        ({"top_logprobs": 3, "mode": "ar"}, "top_logprobs is given without logprobs"),
        ({"top_logprobs": 3, "logprobs": True}, "logits stay on the device"),
        ({"stop": ("a",)}, "these engines have no tokenizer"),
        ({"stop": ("",)}, "stop: '' is no text of 1 to 256 bytes"),
        ({"eos_ids": (9,) * 257}, "eos_ids has 257 token ids; it must have at most 256"),
    ],
)
def test_contradictions_are_refused(options, message):
    with pytest.raises(RequestError, match=message):
        Request("r", (5, 6), **options).check(LIMITS)


def test_a_canvas_may_end_with_the_end_token():
    Request("r", (5,), canvas=(5, -1, 2)).check(LIMITS)
    Request("r", (5,), canvas=(2, -1, 2), ignore_eos=True).check(LIMITS)
