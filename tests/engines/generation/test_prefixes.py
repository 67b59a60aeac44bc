"""Kept prefixes: the same answers as without, and room that is never exceeded."""

from __future__ import annotations

import random
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest

from tests.engines.runtime.test_resident import make_resident
from tests.support.scheduling import CountedRuntime, finish
from twotower_contract.engine_set import Limits
from twotower_engines.generation.costs import LinearCosts
from twotower_engines.generation.prefixes import Prefixes
from twotower_engines.generation.request import Request
from twotower_engines.generation.scheduler import Scheduler

COSTS = LinearCosts(call=1e-4, token=1e-4)  # chunks are as short as they come: 32 tokens
CHUNK = 32


@pytest.fixture(scope="module")
def engines(random_engines):
    return random_engines("MEM*E", seed=3)


@contextmanager
def opened(engines, where):
    """The runtime of the CPU, or of one or two GPUs on this machine's memory."""
    if where == "cpu":
        yield engines.runtime
        return
    limits = Limits(slots=2, context=256, max_tokens_per_call=32, block_size_max=16)
    runtime = make_resident(engines.engines, 1 if where == "one-gpu" else 2, limits)
    yield runtime
    runtime.close()


def family(draw, name, stems):
    """A request that begins as others do: with one or two of a few stems."""
    stem = sum((stems[draw.randrange(len(stems))] for _ in range(draw.randint(1, 2))), ())
    prompt = (*stem[: draw.choice([len(stem), len(stem), 40])], *draw.choices(range(4, 70), k=3))
    return Request(
        name,
        prompt,
        mode=draw.choice(["mask_diffusion", "ar", "mock_ar"]),
        max_new_tokens=draw.randint(1, 20),
        prefix_cache=draw.random() < 0.9,
        logprobs=draw.random() < 0.5,
    )


@pytest.mark.parametrize(
    ("where", "places", "count"),
    [("cpu", 2, 24), ("cpu", 50, 24), ("one-gpu", 4, 7), ("two-gpus", 4, 7)],
)
def test_answers_are_those_without(engines, where, places, count):
    with opened(engines, where) as runtime:
        check_answers(runtime, places, count)


def check_answers(runtime, places, count):
    """Requests that begin alike, in turns over kept prefixes, against each of them alone."""
    draw = random.Random(places)
    stems = [tuple(draw.choices(range(4, 70), k=size)) for size in (CHUNK, 40, 70, 70)]
    room = places * runtime.state_store(1 << 20, CHUNK).place_bytes
    scheduler, answers = Scheduler(runtime, costs=COSTS, prefix_bytes=room), {}
    requests = [family(draw, str(number), stems) for number in range(count)]
    for one in requests:
        scheduler.submit(one)
        for event in scheduler.turn():
            answers.setdefault(event.request_id, []).append(event)
    finish(scheduler, answers)
    reused = 0
    for one in requests:
        plain = Scheduler(runtime, slots=1, costs=COSTS)
        plain.submit(one)
        expected = finish(plain)[one.request_id]
        got = answers[one.request_id]
        assert [event.ids for event in got] == [event.ids for event in expected], one
        reused += got[-1].reused_tokens
        saved = got[-1].reused_tokens // CHUNK
        assert got[-1].context_calls == expected[-1].context_calls - saved
        assert one.prefix_cache or not saved
    assert reused == scheduler.counters.reused_tokens
    assert 0 < scheduler.counters.prefix_bytes <= room
    if places == 50:
        assert reused > sum(len(one.prompt_ids) for one in requests) / 3
        assert scheduler.counters.prefixes_evicted == 0
    else:
        assert reused > 0
        assert scheduler.counters.prefixes_evicted > 0


def test_the_states_are_the_same_to_the_bit(engines):
    """Logits of the next token, by full reading and by going on from a kept prefix."""
    draw = random.Random(5)
    prompt = tuple(draw.choices(range(4, 70), k=3 * CHUNK + 5))
    request = Request("r", prompt, mode="ar", max_new_tokens=1, logprobs=True)
    scheduler = Scheduler(engines.runtime, slots=1, costs=COSTS, prefix_bytes=1 << 20)
    events = []
    for name in "ab":
        scheduler.submit(replace(request, request_id=name))
        events += finish(scheduler)[name]
    assert [event.reused_tokens for event in events] == [0, 3 * CHUNK]
    assert events[0].details == events[1].details


def test_only_the_rest_of_a_prompt_is_read(engines):
    counted = CountedRuntime(engines.runtime)
    scheduler = Scheduler(counted, slots=1, costs=COSTS, prefix_bytes=1 << 20)
    prompt = tuple(range(10, 10 + 2 * CHUNK + 1))
    for name, calls in (("first", 3), ("second", 1)):
        counted.calls.clear()
        scheduler.submit(Request(name, prompt, steps=1, max_new_tokens=16))
        finish(scheduler)
        assert [kind for kind, _ in counted.calls] == ["extend"] * calls + ["denoise"]


class Places:
    """A store that knows which tokens it should hold."""

    def __init__(self, places):
        self.places, self.place_bytes = places, 10
        self.kept, self.slot = {}, ()

    def save(self, place, slot, tokens):
        self.kept[place] = self.slot

    def restore(self, slot, places):
        prefixes = [self.kept[place] for place in places]
        assert all(one == prefixes[-1][: len(one)] for one in prefixes)
        self.slot = prefixes[-1]


@pytest.mark.parametrize("places", [1, 3, 8])
def test_what_is_restored_is_the_prompts_beginning(places):
    """Any number of prompts, read in turns, over a store that is too small for them."""
    draw, store = random.Random(places), Places(places)
    prefixes, hits = Prefixes(store, 2), 0
    reading = []
    for _ in range(3000):
        if len(reading) < 3:
            prompt = np.array(draw.choices((1, 2), k=draw.randint(1, 9)), np.int32)
            store.slot = ()
            chain = prefixes.restore(0, prompt)
            assert store.slot == tuple(prompt[: 2 * len(chain)].tolist())
            assert 2 * len(chain) < len(prompt)
            hits += len(chain)
            reading.append((prompt, chain, 2 * len(chain)))
        prompt, chain, read = reading.pop(draw.randrange(len(reading)))
        if read + 2 <= len(prompt):
            store.slot = tuple(prompt[: read + 2].tolist())
            if len(chain) == read // 2:
                prefixes.save(0, chain, prompt[read : read + 2])
            reading.append((prompt, chain, read + 2))
        assert prefixes.used_bytes <= prefixes.total_bytes == 10 * places
    assert hits > 100
