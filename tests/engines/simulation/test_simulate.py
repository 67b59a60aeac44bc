"""The simulator against a real run, and what it says of loads whose answer is known."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from click.testing import CliRunner

from twotower_contract.engine_set import Limits
from twotower_contract.errors import TwoTowerError
from twotower_engines.cli.simulate import simulate as simulate_verb
from twotower_engines.generation.costs import LinearCosts
from twotower_engines.generation.request import Request
from twotower_engines.generation.sampling import row_seed
from twotower_engines.generation.scheduler import Scheduler
from twotower_engines.simulation.engines import SimulatedRuntime, burst_commits
from twotower_engines.simulation.simulate import simulate
from twotower_engines.simulation.workload import Arrival, Kind, at_concurrency, at_rate, read_trace

COSTS = LinearCosts(call=5e-3, token=1e-3)  # chunks of 32 tokens


@dataclass(slots=True)
class TimedRuntime(SimulatedRuntime):
    """The real engines on the simulator's clock."""

    real: Any = None
    masked: dict[str, list[tuple[int, ...]]] = field(default_factory=dict)

    def reset(self, slot):
        SimulatedRuntime.reset(self, slot)
        self.real.reset(slot)

    def extend(self, rows):
        SimulatedRuntime.extend(self, rows)
        return self.real.extend(rows)

    def denoise(self, rows):
        SimulatedRuntime.denoise(self, rows)
        return self.real.denoise(rows)

    def predict(self, rows):
        SimulatedRuntime.predict(self, rows)
        return self.real.predict(rows)

    def state_store(self, size, tokens):
        return self.real.state_store(size, tokens)


class Watched(Scheduler):
    """A scheduler that keeps the masked counts of its blocks."""

    def __init__(self, runtime, **options):
        super().__init__(runtime, costs=runtime.costs, clock=runtime.clock, **options)
        self.blocks = {}

    def turn(self):
        events = super().turn()
        for event in events:
            if event.masked_counts:
                self.blocks.setdefault(event.request_id, []).append(event.masked_counts)
        return events


def real_requests(count):
    draw = random.Random(7)
    stem = tuple(draw.choices(range(4, 250), k=70))
    for number in range(count):
        yield Request(
            str(number),
            (*stem[: draw.choice([0, 70])], *draw.choices(range(4, 250), k=draw.randint(1, 60))),
            mode=draw.choice(["mask_diffusion"] * 4 + ["ar", "mock_ar"]),
            max_new_tokens=draw.randint(1, 70),
            threshold=draw.choice([0.05, 0.3, 0.9]),
            seed=number,
            ignore_eos=True,
            tenant=draw.choice("ab"),
            priority=draw.choice(["interactive", "batch"]),
        )


def recorded_commits(blocks):
    """The rule that repeats recorded answers.

    For each request `blocks` has its seed, the tokens of its prompt, and the masked positions
    before each denoiser call of each of its blocks of 16. No two have seed and length in common.
    """
    known = {}
    for seed, start, counts in blocks:
        for number, block in enumerate(counts):
            for step, (masked, left) in enumerate(zip(block, (*block[1:], 0), strict=True)):
                known[row_seed(seed, start + number * block[0], step)] = masked - left
    return lambda row, masked: known[row.seed]


@pytest.mark.parametrize("prefix_bytes", [0, 1 << 20])
def test_the_calls_are_those_of_a_real_run(random_engines, prefix_bytes):
    """The same calls in the same order, of as many rows and tokens, and so the same times."""
    real = random_engines("MEM*E", seed=3).runtime
    draw, now, arrivals = random.Random(1), 0.0, []
    for request in real_requests(20):
        now += draw.expovariate(4)
        arrivals.append(Arrival(request, now))
    place = real.state_store(1 << 20, 32).place_bytes
    sizes = {"limits": real.limits, "costs": COSTS, "records": True}
    timed = TimedRuntime(
        commits=lambda row, masked: masked, real=real, mask_token_id=real.mask_token_id, **sizes
    )
    ran = Watched(timed, prefix_bytes=prefix_bytes)
    measured = simulate(timed, ran, arrivals)
    blocks = [
        (one.request.seed, len(one.request.prompt_ids), ran.blocks.get(one.request.request_id, []))
        for one in arrivals
    ]
    simulated = SimulatedRuntime(
        commits=recorded_commits(blocks), place_bytes=lambda tokens: place, **sizes
    )
    scheduler = Watched(simulated, prefix_bytes=prefix_bytes)
    expected = simulate(simulated, scheduler, arrivals)
    assert simulated.calls == timed.calls
    assert scheduler.counters == ran.counters
    assert expected == measured
    kinds = {kind for kind, *_ in timed.calls}
    assert kinds == {"prefill", "denoise", "commit", "predict"}
    assert max(rows for _, rows, _ in timed.calls) == 4
    assert (ran.counters.reused_tokens > 0) is (prefix_bytes > 0)


def of_gpu(slots=16, **changes):
    limits = Limits(slots, 8192, 256, 64)
    costs = LinearCosts(call=8e-3, token=5e-6)
    return SimulatedRuntime(limits, costs, burst_commits("open"), **changes)


def outcome(arrivals, runtime=None, **options):
    runtime = runtime or of_gpu()
    scheduler = Scheduler(runtime, costs=runtime.costs, clock=runtime.clock, **options)
    return simulate(runtime, scheduler, arrivals)


KIND = Kind(prompt=200, shared=0, new=128, threshold=0.8)


def test_the_shares_are_all_of_the_time():
    found = outcome(at_rate(KIND, 60, 5.0))
    assert sum(found.row_share.values()) == pytest.approx(1)
    assert sum(found.busy_share.values()) == pytest.approx(1)
    assert min(found.row_share.values()) >= 0
    assert found.requests == 60


def test_one_caller_at_a_time_waits_for_nobody():
    found = outcome(at_concurrency(KIND, 20, 1))
    assert found.rows_per_denoiser_call == 1
    assert [share for cause, share in found.row_share.items() if "others" in cause] == [0, 0, 0]
    assert found.row_share["without a request"] == pytest.approx(15 / 16)


def test_shared_calls_give_more_tokens():
    arrivals = at_concurrency(KIND, 64, 16)
    at_once = outcome(arrivals, groups_calls=False)
    assert outcome(arrivals).tokens_per_second > 1.08 * at_once.tokens_per_second


def mixed(count, tenants):
    """Many requests of one caller at once, and one of another a second later."""
    many = [Arrival(replace(one, tenant=tenants[0]), 0.0) for one in KIND.requests(count)]
    single = replace(next(replace(KIND, seed=9).requests(1)), request_id="single")
    return [*many, Arrival(replace(single, tenant=tenants[1]), 1.0)]


def first_block(arrivals, name, **options):
    """When a request got its first block."""
    runtime, times = of_gpu(), {}

    class Told(Scheduler):
        def turn(self):
            events = super().turn()
            for event in events:
                times.setdefault(event.request_id, runtime.clock.now)
            return events

    simulate(runtime, Told(runtime, costs=runtime.costs, clock=runtime.clock, **options), arrivals)
    return times[name]


def test_many_requests_of_one_caller_do_not_hold_up_anothers():
    fair = first_block(mixed(100, "ab"), "single") - 1.0
    unfair = first_block(mixed(100, "aa"), "single") - 1.0
    assert fair < unfair / 5
    assert fair < 1.5  # until a slot is free, which no request holds for longer


def test_batch_requests_make_room_for_interactive_ones():
    many = [
        replace(one, request=replace(one.request, priority="batch"))
        for one in at_concurrency(KIND, 60, 32)
    ]
    single = replace(next(replace(KIND, seed=9).requests(1)), request_id="single", tenant="b")
    found = outcome([*many, Arrival(single, 1.0)])
    first = found.first_block_of
    assert set(first) == {"batch", "interactive b"}
    assert first["interactive b"][50] < first["batch"][50] / 2


def test_long_prompts_delay_running_rows_by_their_budget():
    """Fifteen prompts of 3,000 tokens come while one request runs."""
    long = Kind(prompt=3000, shared=0, new=16, threshold=0.8)
    running = Arrival(replace(next(KIND.requests(1)), request_id="r", max_new_tokens=400), 0.0)
    arrivals = [running, *(Arrival(one, 0.5) for one in long.requests(15))]

    def longest_gap(budget):
        runtime, at = of_gpu(), [0.0]

        class Told(Scheduler):
            def turn(self):
                events = super().turn()
                at.extend(runtime.clock.now for event in events if event.request_id == "r")
                return events

        scheduler = Told(runtime, costs=runtime.costs, prefill_seconds=budget, clock=runtime.clock)
        simulate(runtime, scheduler, arrivals)
        gaps = [after - before for before, after in itertools.pairwise(at[1:])]
        return max(gaps)

    step, chunk = 8e-3 + 16 * 16 * 5e-6, 8e-3 + 256 * 5e-6
    alone = max(outcome([running]).block_gap.values())
    # a block takes at most 16 steps, each with one chunk of one prompt before it
    assert alone < longest_gap(0.0) < 16 * (2 * step + chunk)
    assert longest_gap(10.0) > longest_gap(0.0)


def test_a_shared_beginning_is_read_once():
    arrivals = [Arrival(one, 3.0 * number) for number, one in enumerate(
        replace(KIND, shared=2000, prompt=50).requests(6)
    )]  # fmt: skip
    runtime = of_gpu(place_bytes=lambda tokens: 1000)
    found = outcome(arrivals, runtime, prefix_bytes=50_000)
    assert found.counters.reused_tokens == 5 * (2000 // 256) * 256
    without = outcome(arrivals)
    assert without.counters.context_calls - found.counters.context_calls == 5 * 7
    assert found.first_block[99] < without.first_block[99] - 6 * 8e-3


def test_a_full_queue_turns_away():
    found = outcome([Arrival(one, 0.0) for one in KIND.requests(60)], most_waiting=20)
    assert (found.requests, found.refused) == (16 + 20, 24)


def test_a_trace_is_read(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text(
        '{"at": 1.5, "prompt_tokens": 30, "max_new_tokens": 20, "priority": "batch"}\n\n'
        '{"at": 0.5, "shared_tokens": 100, "prompt_tokens": 7}\n'
        '{"at": 0.7, "shared_tokens": 90}\n'
    )
    first, second, third = read_trace(path, KIND)
    assert [one.at for one in (first, second, third)] == [0.5, 0.7, 1.5]
    assert first.request.prompt_ids[:90] == second.request.prompt_ids[:90]
    assert len(first.request.prompt_ids) == 107
    assert (third.request.max_new_tokens, third.request.priority) == (20, "batch")
    assert len(third.request.prompt_ids) == 30


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 1 is no JSON"),
        ("[]", "line 1 has no `at`"),
        ('{"at": -1}', "line 1: at is -1"),
        ('{"at": 1, "prompt_tokens": 1.5}', "line 1: prompt_tokens is 1.5"),
        ('{"at": 1, "tokens": 1}', "line 1 has 'tokens'; known are at, prompt_tokens"),
        ("", "holds no request"),
    ],
)
def test_a_trace_that_is_wrong_is_refused(tmp_path, line, said):
    (tmp_path / "trace").write_text(line)
    with pytest.raises(TwoTowerError, match=said):
        read_trace(tmp_path / "trace", KIND)


def run(*words):
    return CliRunner().invoke(simulate_verb, ["--sku", "h200", *words])


def test_the_verb_prints_tables_and_json():
    small = ["--requests", "8", "--new-tokens", "40", "--concurrency", "1,4"]
    shown = run(*small)
    assert shown.exit_code == 0, shown.output
    assert "NVIDIA H200, bf16, 16 slots x 8192 tokens; open, threshold 0.8" in shown.output
    assert shown.output.count(" callers") == 6
    assert "# denoising" in shown.output
    values = json.loads(run(*small, "--json").stdout)
    one, four = values["loads"]
    assert (one["load"], four["load"]) == ("1 callers", "4 callers")
    assert one["tokens"] == four["tokens"] > 8 * 15
    assert one["tokens_per_second"] < four["tokens_per_second"]
    assert json.loads(run(*small, "--json").stdout) == values


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give one of --rate, --concurrency and --trace"),
        (["--rate", "1", "--concurrency", "1"], "give one of"),
        (["--rate", "0"], "--rate is '0'; give numbers above 0"),
        (["--concurrency", "a,1"], "--concurrency is 'a,1'"),
        (["--rate", "1", "--slots", "200", "--context", "200000"], "this does not fit"),
        (["--rate", "1", "--trace", "nowhere"], "give one of"),
        (["--trace", "nowhere"], "nowhere: cannot be read"),
    ],
)
def test_what_cannot_be_simulated_is_refused(words, said):
    problem = run(*words).exception
    assert isinstance(problem, TwoTowerError)
    assert said in str(problem)
