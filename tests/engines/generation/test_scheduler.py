"""Rows that share calls: the answer of each is the one that it gets alone."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from tests.support.scheduling import CountedRuntime, alone, drawn, finish
from twotower_contract.engine_set import Limits
from twotower_engines.errors import RequestError
from twotower_engines.generation.request import Request
from twotower_engines.generation.scheduler import Scheduler
from twotower_engines.runtime.onnxruntime import OnnxRuntime

POISON = 77


@pytest.fixture(scope="module")
def engines(random_engines):
    return random_engines("MEM*E", seed=3, poison=POISON).engines


def opened(engines, slots, tokens):
    limits = Limits(slots, context=512, max_tokens_per_call=tokens, block_size_max=64)
    return OnnxRuntime(replace(engines, build=replace(engines.build, limits=limits)), threads=1)


@pytest.fixture(scope="module")
def short_calls(engines):
    """A runtime that takes 7 tokens of a row in one context call: prompts come in chunks."""
    runtime = opened(engines, slots=4, tokens=7)
    yield runtime
    runtime.close()


@pytest.fixture(scope="module")
def runtime(engines):
    runtime = OnnxRuntime(engines, threads=1)
    yield runtime
    runtime.close()


def check_that_a_batch_changes_no_answer(runtime, seed, count, turns):
    """Requests of all kinds join at random turns; every event is the one that they give alone."""
    draw = random.Random(seed)
    requests = [drawn(draw, str(number)) for number in range(count)]
    scheduler, answers, most = Scheduler(runtime), {}, 0
    for one in requests:
        scheduler.submit(one)
        for _ in range(draw.choice(turns)):
            for event in scheduler.turn():
                answers.setdefault(event.request_id, []).append(event)
            most = max(most, scheduler.active)
    finish(scheduler, answers)
    for one in requests:
        assert answers[one.request_id] == alone(runtime, one), one
    assert most == runtime.limits.slots


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("which", ["runtime", "short_calls"])
def test_a_batch_changes_no_answer(request, which, seed):
    check_that_a_batch_changes_no_answer(request.getfixturevalue(which), seed, 12, [0, 0, 1, 5])


@pytest.mark.slow
def test_200_requests_answer_alone_as_among_32(engines):
    """Through the scheduler, over 32 slots: all modes, policies, canvases, callers, priorities."""
    runtime = opened(engines, slots=32, tokens=7)
    check_that_a_batch_changes_no_answer(runtime, seed=5, count=200, turns=[0, 0, 0, 1])
    runtime.close()


def test_chunks_give_the_answer_of_one_call(runtime, short_calls):
    for mode in ("mask_diffusion", "ar", "mock_ar"):
        for length in (6, 7, 8, 15, 30):
            one = Request("r", tuple(range(10, 10 + length)), mode=mode, max_new_tokens=12)
            whole, parts = alone(runtime, one), alone(short_calls, one)
            assert [event.ids for event in whole] == [event.ids for event in parts]
            in_parts = -(-(length - 1) // 7) + 1 if mode == "mock_ar" else -(-length // 7)
            steps = 0 if mode == "mask_diffusion" else 11
            assert parts[-1].context_calls == in_parts + steps


def test_a_turn_makes_one_denoiser_call_for_all(runtime):
    counted = CountedRuntime(runtime)
    scheduler = Scheduler(counted)
    for number, steps in enumerate((3, 5, 16, 16)):
        scheduler.submit(Request(str(number), (5, 6, 7 + number), steps=steps, max_new_tokens=32))
    scheduler.turn()
    assert counted.calls == [("extend", [0, 1, 2, 3]), ("denoise", [0, 1, 2, 3])]
    while not scheduler.idle:
        counted.calls.clear()
        scheduler.turn()
        kinds = [kind for kind, _ in counted.calls]
        assert kinds.count("denoise") <= 1
        assert kinds.count("extend") <= 1
        assert kinds == sorted(kinds, reverse=True)  # extensions come first


def test_rows_that_finish_together_are_committed_together(runtime):
    counted = CountedRuntime(runtime)
    scheduler = Scheduler(counted)
    for number in range(3):
        scheduler.submit(Request(str(number), (5, 6, 7 + number), steps=1, max_new_tokens=32))
    finish(scheduler)
    assert counted.calls == [("extend", [0, 1, 2]), ("denoise", [0, 1, 2])] * 2


def test_the_last_block_is_not_committed(runtime):
    counted = CountedRuntime(runtime)
    scheduler = Scheduler(counted)
    scheduler.submit(Request("r", (5, 6), steps=1, max_new_tokens=16))
    scheduler.turn()
    assert scheduler.idle
    assert counted.calls == [("extend", [0]), ("denoise", [0])]


def test_who_comes_first_is_served_first(runtime):
    scheduler = Scheduler(runtime, slots=2)
    for number in range(5):
        scheduler.submit(Request(str(number), (5, 6), steps=1, max_new_tokens=16))
    assert (len(scheduler.waiting_ids), scheduler.active) == (5, 0)
    order = []
    while not scheduler.idle:
        order.append(sorted(event.request_id for event in scheduler.turn()))
    assert order == [["0", "1"], ["2", "3"], ["4"]]


def test_a_full_queue_tells_when_to_try_again(runtime):
    now = iter(range(10**6))  # a second from each look at the clock to the next
    scheduler = Scheduler(runtime, slots=1, most_waiting=3, clock=lambda: float(next(now)))
    for number in range(5):
        scheduler.submit(Request(str(number), (5, 6), steps=1, max_new_tokens=16))
    events = scheduler.turn() + scheduler.turn()
    told = [(event.request_id, event.retry_after) for event in events]
    assert told == [("4", 0.5), ("0", None), ("1", None)]  # the free slot is room, too
    assert events[0].error == "4 requests wait already; try again in 0.5 s"
    for number in (5, 6, 7):
        scheduler.submit(Request(str(number), (5, 6), steps=1, max_new_tokens=16))
    (turned_away, _) = scheduler.turn()
    # an end each 5 s, an eighth of which counts; four wait
    assert (turned_away.request_id, turned_away.retry_after) == ("7", round(5 / 8 * 4 / 2, 1))


def test_a_free_slot_is_taken_in_the_next_turn(runtime):
    scheduler = Scheduler(runtime, slots=2)
    scheduler.submit(Request("long", (5, 6), steps=16, threshold=1.0, max_new_tokens=64))
    scheduler.submit(Request("short", (5, 6), steps=1, max_new_tokens=16))
    scheduler.submit(Request("next", (5, 6), steps=1, max_new_tokens=16))
    assert [event.request_id for event in scheduler.turn()] == ["short"]
    assert [event.request_id for event in scheduler.turn()] == ["next"]
    assert scheduler.active == 1


@pytest.mark.parametrize("mode", ["mask_diffusion", "ar", "mock_ar"])
def test_a_cancelled_request_frees_its_slot(runtime, mode):
    scheduler = Scheduler(runtime, slots=1)
    scheduler.submit(Request("a", (5, 6, 7), mode=mode, max_new_tokens=400))
    scheduler.submit(Request("b", (8, 9), mode=mode, max_new_tokens=20))
    for _ in range(5):
        assert scheduler.turn() == []
    assert scheduler.cancel("a")
    last, *rest = scheduler.turn()
    assert rest == []
    assert (last.request_id, last.finish_reason, last.error) == ("a", "cancelled", None)
    # tokens that were chosen already are given; a block that is half masked is not;
    # the prompt of a mock_ar request takes a turn more
    assert len(last.ids) == {"mask_diffusion": 0, "ar": 5, "mock_ar": 4}[mode]
    assert finish(scheduler)["b"] == alone(
        runtime, Request("b", (8, 9), mode=mode, max_new_tokens=20)
    )
    assert not scheduler.cancel("a")


def test_a_waiting_request_is_cancelled_without_any_work(runtime):
    counted = CountedRuntime(runtime)
    scheduler = Scheduler(counted, slots=1)
    scheduler.submit(Request("a", (5, 6), steps=1, max_new_tokens=16))
    scheduler.submit(Request("b", (5, 6)))
    assert scheduler.cancel("b")
    answers = finish(scheduler)
    assert [event.finish_reason for event in answers["b"]] == ["cancelled"]
    assert answers["b"][0].context_calls == 0
    assert len(counted.calls) == 2


def test_a_row_of_nan_fails_alone(runtime):
    """A token whose embedding is NaN makes its own request fail, and nobody else's."""
    scheduler = Scheduler(runtime, slots=3)
    good = [Request(str(number), (5, 6, 7 + number), max_new_tokens=40) for number in range(3)]
    bad = [
        Request(f"bad {mode}", (5, POISON, 6), mode=mode)
        for mode in ("mask_diffusion", "ar", "mock_ar")
    ]
    for pair in zip(good, bad, strict=True):
        for one in pair:
            scheduler.submit(one)
    answers = finish(scheduler)
    for one in bad:
        (event,) = answers[one.request_id]
        assert "NaN" in event.error
        assert event.is_last
        assert event.finish_reason is None
        assert event.ids == ()
    for one in good:
        assert answers[one.request_id] == alone(runtime, one)


@pytest.mark.parametrize("prompt", [(5,), tuple(range(100, 150))], ids=["shorter", "as long"])
def test_a_slot_keeps_nothing_of_who_had_it_before(runtime, prompt):
    first = Request("first", tuple(range(10, 60)), max_new_tokens=16)
    second = Request("second", prompt, max_new_tokens=32)
    fresh = alone(runtime, second)
    scheduler = Scheduler(runtime, slots=1)
    scheduler.submit(first)
    scheduler.submit(second)
    assert finish(scheduler)["second"] == fresh


def test_masked_counts_tell_the_steps(runtime):
    (event,) = alone(runtime, Request("r", (5,), steps=4, threshold=1.0, max_new_tokens=16))
    assert event.masked_counts == (16, 12, 8, 4)
    assert event.denoiser_calls == 4


def test_submission_refuses(runtime):
    scheduler = Scheduler(runtime)
    with pytest.raises(RequestError, match="prompt is empty"):
        scheduler.submit(Request("a", ()))
    assert scheduler.idle
    scheduler.submit(Request("a", (5,)))
    with pytest.raises(RequestError, match="'a' is in use"):
        scheduler.submit(Request("a", (6,)))
    scheduler.turn()
    with pytest.raises(RequestError, match="'a' is in use"):
        scheduler.submit(Request("a", (6,)))
    scheduler.cancel("a")
    scheduler.turn()
    scheduler.submit(Request("a", (6,)))
    for count in (0, 5):
        with pytest.raises(RequestError, match=f"slots is {count}; these engines have 1 to 4"):
            Scheduler(runtime, slots=count)
