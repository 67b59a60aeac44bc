"""Which rows extend in a turn: nobody waits long, and calls are shared where that pays."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.support.scheduling import CountedRuntime, alone, drawn, finish
from twotower_contract.engine_set import Limits
from twotower_engines.generation.costs import LinearCosts
from twotower_engines.generation.request import Request
from twotower_engines.generation.scheduler import Scheduler
from twotower_engines.generation.turns import chunk_tokens
from twotower_engines.simulation.engines import SimulatedRuntime

LIMITS = Limits(slots=4, context=512, max_tokens_per_call=256, block_size_max=64)
DEAR_CALLS = LinearCosts(call=1.0, token=1e-6)  # as on a GPU: the tokens hardly matter


@pytest.fixture(scope="module")
def runtime(random_engines):
    return random_engines("MEM*E", seed=3).runtime


@pytest.mark.parametrize(
    ("costs", "expected"),
    [
        (LinearCosts(call=1.0, token=1e-6), 256),
        (LinearCosts(call=1e-4, token=1e-4), 32),
        (LinearCosts(call=1e-3, token=1e-4), 64),
    ],
)
def test_chunks_are_as_short_as_is_cheap(costs, expected):
    assert chunk_tokens(costs, LIMITS) == expected
    assert chunk_tokens(costs, replace(LIMITS, max_tokens_per_call=7)) == 7


def requests(draw_seed, count):
    import random

    draw = random.Random(draw_seed)
    return draw, [drawn(draw, str(number)) for number in range(count)]


def test_shared_calls_change_no_answer(runtime):
    draw, some = requests(1, 14)
    scheduler, answers = Scheduler(runtime, costs=DEAR_CALLS), {}
    for one in some:
        scheduler.submit(one)
        for _ in range(draw.choice([0, 1, 4])):
            for event in scheduler.turn():
                answers.setdefault(event.request_id, []).append(event)
    finish(scheduler, answers)
    for one in some:
        assert answers[one.request_id] == alone(runtime, one), one


def calls_of(runtime, costs, groups_calls=True):
    counted = CountedRuntime(runtime)
    scheduler = Scheduler(counted, costs=costs, groups_calls=groups_calls)
    for number in range(4):
        one = Request(str(number), (5, 6, 7 + number), max_new_tokens=96, ignore_eos=True)
        scheduler.submit(one)
    finish(scheduler)
    kinds = [kind for kind, _ in counted.calls]
    return kinds.count("extend"), kinds.count("denoise")


def test_dear_calls_are_shared(runtime):
    grouped, steps = calls_of(runtime, DEAR_CALLS)
    alone_calls, alone_steps = calls_of(runtime, DEAR_CALLS, groups_calls=False)
    assert grouped < 0.8 * alone_calls
    assert steps >= alone_steps
    cheap = LinearCosts(call=1e-9, token=1e-3)
    assert calls_of(runtime, cheap) == (alone_calls, alone_steps)


def test_a_single_request_never_waits(runtime):
    one = Request("r", (5, 6, 7), max_new_tokens=64, ignore_eos=True)
    counted = CountedRuntime(runtime)
    scheduler = Scheduler(counted, costs=DEAR_CALLS)
    scheduler.submit(one)
    turns = 0
    while not scheduler.idle:
        scheduler.turn()
        turns += 1
    kinds = [kind for kind, _ in counted.calls]
    assert turns == kinds.count("denoise")


SHARED = LinearCosts(call=0.024, token=2.5e-4)  # chunks of one, two, three rows: 32, 40, 48 ms
APART = LinearCosts(call=1e-9, token=1e-3)  # each 32 ms


def chunks_per_turn(budget, slower=1.0, costs=SHARED):
    """Rows that read a chunk of 32 tokens in each turn, while another request denoises."""
    limits = Limits(slots=4, context=8192, max_tokens_per_call=32, block_size_max=16)
    real = LinearCosts(slower * costs.call, slower * costs.token)
    runtime = SimulatedRuntime(limits, real, lambda row, masked: 1, records=True)
    scheduler = Scheduler(runtime, costs=costs, prefill_seconds=budget, clock=runtime.clock)
    scheduler.submit(Request("r", (5, 6), max_new_tokens=6000))
    scheduler.turn()
    for number in range(3):
        scheduler.submit(Request(f"p{number}", tuple(range(10, 10 + 20 * 32)), max_new_tokens=16))
    runtime.calls.clear()
    for _ in range(15):
        scheduler.turn()
    return [rows for kind, rows, tokens in runtime.calls if kind == "prefill" and tokens == 32]


def test_prompts_have_a_budget_in_each_turn():
    assert chunks_per_turn(0.0) == [1] * 15
    assert chunks_per_turn(0.045) == [2] * 15
    assert chunks_per_turn(1.0) == [3] * 15


def test_prompts_that_gain_nothing_by_a_shared_call_take_no_longer_than_a_step():
    assert chunks_per_turn(1.0, costs=APART) == [1] * 15


def test_the_budget_is_of_measured_time():
    counts = chunks_per_turn(0.045, slower=2.0)
    assert counts[0] == 2
    assert counts[-5:] == [1] * 5
    assert chunks_per_turn(0.045, slower=0.5)[-5:] == [3] * 5


@pytest.mark.parametrize(("costs", "expected"), [(SHARED, [[0, 1]]), (APART, [[1], [0]])])
def test_rows_of_different_sizes_share_a_call_where_padding_costs_less(costs, expected):
    runtime = SimulatedRuntime(LIMITS, costs, lambda row, masked: masked)
    scheduler = Scheduler(runtime, costs=costs, groups_calls=False)
    for name, tokens in (("commits", 5), ("comes", 24)):
        scheduler.submit(Request(name, tuple(range(10, 10 + tokens)), max_new_tokens=64))
        counted = scheduler._runtime = CountedRuntime(runtime)
        scheduler.turn()
    assert [slots for kind, slots in counted.calls if kind == "extend"] == expected


def test_prompts_do_not_wait_where_nobody_runs(runtime):
    counted = CountedRuntime(runtime)
    scheduler = Scheduler(counted, costs=LinearCosts(0.0, 1e-3), prefill_seconds=0.0)
    for number in range(3):
        scheduler.submit(Request(str(number), tuple(range(10, 170)), max_new_tokens=16))
    scheduler.turn()
    assert counted.calls == [("extend", [0, 1, 2])]
