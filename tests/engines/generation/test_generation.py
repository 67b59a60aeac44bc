"""Generation on ONNX Runtime against the reference loops, token by token, in float32.

Models, prompts and options are drawn at random; the reference is numpy, one token at a time.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random

import numpy as np
import pytest

from twotower_contract.policies import POLICIES
from twotower_engines.errors import GenerationError, RequestError
from twotower_engines.generation.generator import Generator
from twotower_engines.generation.request import Request, RequestLimits
from twotower_engines.generation.sampling import row_seed, sample
from twotower_export.tiny.checkpoints import tiny_config

SEED = 3860  # of all that is drawn: the first seven models have every mix of layers
MODELS = 7
REQUESTS = 3


def drawn_model(number):
    """Layers and sizes of a random model."""
    draw = random.Random(f"model {SEED}.{number}")
    groups, kv = draw.randint(1, 3), draw.randint(1, 2)
    experts = draw.randint(2, 9)
    return {
        "pattern": "".join(draw.choices("ME*", k=draw.randint(1, 8))),
        "seed": number,
        "hidden": draw.randint(8, 40),
        "n_groups": groups,
        "mamba_num_heads": groups * draw.randint(1, 4),
        "mamba_head_dim": draw.randint(2, 9),
        "ssm_state_size": draw.randint(3, 17),
        "num_key_value_heads": kv,
        "num_attention_heads": kv * draw.randint(1, 3),
        "head_dim": draw.randint(3, 17),
        "num_experts": experts,
        "num_experts_per_tok": draw.randint(1, experts),
        "dtype": draw.choice(["float32", "bfloat16"]),
        "logit_scale": draw.uniform(3, 9),
    }


def drawn_request(draw, name, vocabulary):
    """A random mask diffusion request."""
    prompt = tuple(draw.randrange(vocabulary) for _ in range(draw.randint(1, 40)))
    policy = draw.choice(["threshold", "threshold", *POLICIES])
    bound = {"factor": draw.uniform(0.3, 4), "entropy": draw.uniform(0.1, 9)}
    return Request(
        name,
        prompt,
        max_new_tokens=draw.randint(1, 40),
        block_size=draw.randint(1, 20),
        steps=draw.randint(1, 24),
        threshold=bound.get(policy, min(1.0, draw.uniform(0.02, 1.1))),
        policy=policy,
        eos_ids=tuple(draw.sample(range(vocabulary), draw.choice([0, 0, 12]))),
        ignore_eos=draw.choice([True, False]),
    )


def drawn_requests(number, model):
    """The random requests of a drawn model, given its configuration."""
    draw = random.Random(number)
    for name in range(REQUESTS):
        request = drawn_request(draw, str(name), model.vocab_size)
        if "M" not in model.pattern:
            # Nothing but Mamba knows positions: all masked ones of a block are equally likely, and
            # the last bit of a sum would decide which is committed. This policy does not ask them.
            request = dataclasses.replace(request, policy="leftmost", threshold=0.9)
        yield request


def test_the_drawn_models_have_every_mix_of_layers():
    mixes = {frozenset(drawn_model(number)["pattern"]) for number in range(MODELS)}
    assert len(mixes) == 2 ** len("ME*") - 1


def test_the_drawn_requests_have_every_policy():
    drawn = {
        request.policy
        for number in range(MODELS)
        for request in drawn_requests(number, tiny_config(drawn_model(number)["pattern"]))
    }
    assert drawn == set(POLICIES)


def reference_answer(reference, model, request, **more):
    eos_ids = request.eos_ids if request.ignore_eos else (*request.eos_ids, reference.END_ID)
    answer = reference.generate_mask_diffusion(
        model,
        list(request.prompt_ids),
        request.max_new_tokens,
        request.block_size,
        request.steps,
        request.threshold,
        request.temperature,
        request.policy,
        eos_ids,
        **more,
    )
    return reference.cut_at_end(answer, len(request.prompt_ids), eos_ids)


@pytest.fixture(scope="module", params=range(MODELS))
def model(request, random_engines):
    made = random_engines(**drawn_model(request.param))
    made.number = request.param
    with Generator(made.engines, threads=1) as made.generator:
        yield made


def test_mask_diffusion_is_token_exact(model, reference):
    for request in drawn_requests(model.number, model.engines.manifest.model):
        expected = reference_answer(reference, model.reference, request)
        found = model.generator.generate(request)
        assert found.output_ids == tuple(expected.output_ids), request
        assert found.finish_reason == expected.finish_reason
        assert [list(counts) for counts in found.blocks] == expected.masked_counts
        assert found.denoiser_calls == expected.denoiser_calls
        blocks = len(found.blocks)
        assert found.context_calls == 1 + blocks - 1  # prefill, and all blocks but the last


@pytest.mark.parametrize("mode", ["ar", "mock_ar"])
def test_autoregressive_modes_are_token_exact(model, reference, mode):
    draw = random.Random(model.number)
    loop = {"ar": reference.generate_ar, "mock_ar": reference.generate_mock_ar}[mode]
    for number, length in enumerate([1, draw.randint(2, 40)]):
        vocabulary = model.engines.manifest.model.vocab_size
        prompt = tuple(draw.randrange(vocabulary) for _ in range(length))
        eos_ids = tuple(draw.sample(range(vocabulary), 10)) if number else ()
        request = Request(str(number), prompt, mode=mode, max_new_tokens=24, eos_ids=eos_ids)
        expected = loop(model.reference, list(prompt), 24, (*eos_ids, reference.END_ID))
        found = model.generator.generate(request)
        assert found.output_ids == tuple(expected.output_ids)
        assert found.finish_reason == expected.finish_reason
        assert found.denoiser_calls == expected.denoiser_calls
        assert found.blocks == ()


def whole_blocks(draw, model, **changes):
    """A random request whose last block is not trimmed."""
    request = drawn_request(draw, "p", model.engines.manifest.model.vocab_size)
    request = dataclasses.replace(request, **changes)
    length = draw.randint(1, 3) * request.block_size
    return dataclasses.replace(request, max_new_tokens=length, eos_ids=(), ignore_eos=True)


def test_no_block_takes_more_calls_than_steps_or_keeps_a_mask(model):
    draw, mask = random.Random(f"steps {model.number}"), model.engines.manifest.model.mask_token_id
    for _ in range(3):
        request = whole_blocks(draw, model)
        found = model.generator.generate(request)
        assert mask not in found.output_ids[len(request.prompt_ids) :], request
        assert len(found.output_ids[len(request.prompt_ids) :]) % request.block_size == 0
        for counts in found.blocks:
            assert counts[0] == request.block_size
            assert len(counts) <= request.steps, request
            assert all(one > next_one for one, next_one in itertools.pairwise(counts)), request


def test_one_step_commits_a_whole_block(model):
    draw = random.Random(f"one step {model.number}")
    for _ in range(3):
        request = whole_blocks(draw, model, steps=1)
        found = model.generator.generate(request)
        count = request.max_new_tokens // request.block_size
        assert found.blocks == ((request.block_size,),) * count, request
        assert found.denoiser_calls == count


def test_no_confidence_above_the_threshold_commits_the_even_share(model):
    """No probability is above 1."""
    draw = random.Random(f"even share {model.number}")
    for _ in range(3):
        request = whole_blocks(draw, model, threshold=1.0, policy="threshold")
        schedule, left = [], request.block_size
        for step in range(request.steps):
            if left:
                schedule.append(left)
                left -= math.ceil(left / (request.steps - step))
        for counts in model.generator.generate(request).blocks:
            assert counts == tuple(schedule), request


@pytest.mark.parametrize("number", range(3))
def test_mock_ar_with_two_equal_towers_is_ar(random_engines, number):
    """The denoiser reads the context of all tokens but the last, and its own layers do the rest."""
    made = random_engines(**drawn_model(number), equal_towers=True)
    draw = random.Random(f"equal {number}")
    vocabulary = made.engines.manifest.model.vocab_size
    with Generator(made.engines, threads=1) as generator:
        for length in (1, 2, draw.randint(6, 60)):
            prompt = tuple(draw.randrange(vocabulary) for _ in range(length))
            ar = generator.generate(Request("a", prompt, mode="ar", max_new_tokens=16))
            mock = generator.generate(Request("m", prompt, mode="mock_ar", max_new_tokens=16))
            assert mock.output_ids == ar.output_ids, prompt
            assert (ar.denoiser_calls, mock.denoiser_calls) == (0, 16)


@pytest.fixture(scope="module")
def usual(random_engines):
    made = random_engines()
    with Generator(made.engines, threads=1) as made.generator:
        yield made


def graph_noise(seed, block, vocabulary):
    """The graph's Gumbel noise (block, vocabulary), from its definition in Python integers."""
    prime = 2**31 - 1

    def fifth(x):
        return pow(x, 5, prime)

    noise = np.empty((block, vocabulary))
    for place in range(block):
        first = fifth((seed + 1 + 7919 * (place + 1)) % prime)
        second = fifth((first + 104729) % prime)
        for token in range(vocabulary):
            mixed = fifth((fifth((token + first) % prime) + second) % prime)
            noise[place, token] = -np.log(-np.log((mixed // 256 + 0.5) * 2.0**-23))
    return noise


def test_mask_diffusion_at_a_temperature_is_token_exact(usual, reference):
    for seed, temperature in ((0, 0.3), (2**64 - 1, 1.0), (12345, 2.0)):
        request = Request(
            "t", (5, 6, 7), max_new_tokens=12, block_size=8, steps=4, threshold=0.3,
            temperature=temperature, seed=seed,
        )  # fmt: skip
        expected = reference_answer(
            reference,
            usual.reference,
            request,
            gumbel=lambda start, step, seed=seed: graph_noise(row_seed(seed, start, step), 8, 300),
        )
        found = usual.generator.generate(request)
        assert found.output_ids == tuple(expected.output_ids)


@pytest.mark.parametrize("mode", ["ar", "mock_ar"])
def test_autoregressive_draws_are_the_rules_draws(usual, reference, mode):
    prompt, options = (9, 8, 7), {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 4}
    positions = iter(range(3, 100))

    def choose(logits):
        return sample(
            np.asarray(logits), *(options[name] for name in ("temperature", "top_k", "top_p")),
            seed=4, position=next(positions),
        )  # fmt: skip

    loop = {"ar": reference.generate_ar, "mock_ar": reference.generate_mock_ar}[mode]
    expected = loop(usual.reference, list(prompt), 20, (), choose)
    found = usual.generator.generate(Request("s", prompt, mode=mode, max_new_tokens=20, **options))
    assert found.output_ids == tuple(expected.output_ids)
    other = usual.generator.generate(
        Request("s", prompt, mode=mode, max_new_tokens=20, **{**options, "seed": 5})
    )
    assert other.output_ids != found.output_ids


def test_a_trimmed_answer_is_the_start_of_the_longer_one(usual):
    long = usual.generator.generate(Request("l", (5, 6), max_new_tokens=48))
    for count in (1, 15, 16, 17, 33):
        short = usual.generator.generate(Request("s", (5, 6), max_new_tokens=count))
        assert short.output_ids == long.output_ids[: 2 + count]
        assert len(short.blocks) == -(-count // 16)
        assert short.finish_reason == "length"


def test_an_end_token_is_the_last_of_an_answer(usual):
    whole = usual.generator.generate(Request("w", (5, 6), max_new_tokens=64)).output_ids[2:]
    place = next(i for i in range(16, 64) if whole[i] not in whole[:i])
    stopped = usual.generator.generate(
        Request("e", (5, 6), max_new_tokens=64, eos_ids=(299, whole[place]))
    )
    assert stopped.finish_reason == "eos"
    assert stopped.output_ids[2:] == whole[: place + 1]


def test_an_end_token_that_is_trimmed_away_does_not_count(usual):
    whole = usual.generator.generate(Request("w", (5, 6), max_new_tokens=32)).output_ids[2:]
    place = next(i for i in range(17, 32) if whole[i] not in whole[:i])
    cut = usual.generator.generate(
        Request("e", (5, 6), max_new_tokens=place, eos_ids=(whole[place],))
    )
    assert cut.finish_reason == "length"
    assert cut.output_ids[2:] == whole[:place]


@pytest.mark.parametrize("mode", ["ar", "mock_ar"])
def test_an_end_token_is_the_last_of_an_autoregressive_answer(usual, mode):
    whole = usual.generator.generate(Request("w", (5, 6), mode=mode, max_new_tokens=30)).output_ids[
        2:
    ]
    place = next(i for i in range(29, 0, -1) if whole[i] not in whole[:i])
    stopped = usual.generator.generate(
        Request("e", (5, 6), mode=mode, max_new_tokens=30, eos_ids=(whole[place],))
    )
    assert stopped.finish_reason == "eos"
    assert stopped.output_ids[2:] == whole[: place + 1]


def test_streamed_blocks_are_the_answer(usual):
    request = Request("s", (5, 6, 7), max_new_tokens=40)
    events = list(usual.generator.stream(request))
    assert [len(event.ids) for event in events] == [16, 16, 8]
    assert [event.finish_reason for event in events] == [None, None, "length"]
    result = usual.generator.generate(request)
    assert sum((event.ids for event in events), (5, 6, 7)) == result.output_ids
    assert [event.context_calls for event in events] == [1, 2, 3]
    calls = [len(event.masked_counts) for event in events]
    assert [event.denoiser_calls for event in events] == list(np.cumsum(calls))


def test_leaving_a_stream_frees_its_slot(usual):
    for _ in usual.generator.stream(Request("s", (5, 6, 7), max_new_tokens=400)):
        break
    assert usual.generator.generate(Request("s", (5, 6), max_new_tokens=4)).finish_reason


def test_a_closed_generator_says_so(usual):
    with Generator(usual.engines, threads=1) as generator:
        generator.generate(Request("before", (5, 6, 7), max_new_tokens=8))
    generator.close()
    with pytest.raises(RuntimeError, match="these engines are closed"):
        generator.generate(Request("after", (5, 6, 7), max_new_tokens=8))


def test_logits_that_are_not_numbers_fail_with_a_reason(random_engines):
    poison = 77
    made = random_engines(poison=poison)
    with Generator(made.engines, threads=1) as generator:
        for mode in ("mask_diffusion", "ar", "mock_ar"):
            with pytest.raises(GenerationError, match="NaN or infinity at token 3"):
                generator.generate(Request("n", (5, 6, poison), mode=mode))
        generator.generate(Request("n", (5, 6, 7)))


LIMITS = RequestLimits(context=100, block_size_max=32, vocab_size=300)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_ids": ()}, "the prompt is empty"),
        ({"prompt_ids": (5, 300)}, "token 300 at place 1 is outside .* 0 to 299"),
        ({"prompt_ids": (-1,)}, "token -1 at place 0"),
        ({"eos_ids": (2, 400)}, "eos_ids: token 400 at place 1"),
        ({"prompt_ids": (5,) * 37}, "37 tokens .* 101 together; .* hold 100"),
        ({"prompt_ids": (5,), "max_new_tokens": 100}, "the prompt has 1 token and .* 101 together"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
        ({"mode": "diffusion"}, "mode is 'diffusion'; it must be one of mask_diffusion, mock_ar"),
        ({"block_size": 0}, "block_size is 0; these engines take 1 to 32"),
        ({"block_size": 33}, "block_size is 33"),
        ({"steps": 0}, "steps is 0"),
        ({"threshold": 0.0}, "threshold is 0.0; .* more than 0 and at most 1"),
        ({"threshold": 1.01}, "threshold is 1.01"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"threshold": float("inf"), "policy": "entropy"}, "threshold is inf"),
        ({"policy": "best"}, "policy is 'best'; it must be one of threshold, quota"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1e300}, r"temperature is 1e\+300; .* at most 3.4e\+38"),
        (
            {"temperature": 1e-7},
            r"temperature is 1e-07; it must be 0 \(greedy\), or at least 1e-06",
        ),
        ({"mode": "ar", "top_k": -1}, "top_k is -1"),
        ({"mode": "ar", "top_p": 0.0}, "top_p is 0.0"),
        (
            {"temperature": 1e-38},
            "temperature is 1e-38; it must be 0 .* at least 1e-06",
        ),
        ({"top_p": 0.5}, "mask_diffusion draws from all"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "must be at least 0 and at most 18446744073709551615"),
    ],
)
def test_what_cannot_be_done_is_refused(change, message):
    values = {"request_id": "r", "prompt_ids": (5, 6), **change}
    with pytest.raises(RequestError, match=message) as caught:
        Request(**values).check(LIMITS)
    assert caught.value.exit_code == 2


def test_what_is_just_possible_is_accepted():
    Request("r", (0, 299) * 18, block_size=32, threshold=1.0, seed=2**64 - 1).check(LIMITS)
    Request("r", (5,), threshold=3.0, policy="factor").check(LIMITS)
    Request("r", (5,), temperature=float(np.float32(1e-6))).check(LIMITS)


def test_engines_without_a_denoiser_offer_ar_only():
    limits = RequestLimits(100, 32, 300, modes=("ar",))
    Request("r", (5,), mode="ar").check(limits)
    with pytest.raises(RequestError, match="needs the denoiser tower"):
        Request("r", (5,)).check(limits)
