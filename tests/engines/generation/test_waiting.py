"""Who gets the next slot, and who is turned away."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

from twotower_engines.generation.request import Request
from twotower_engines.generation.waiting import BATCH_TURN, WaitingRequests


def request(name, tenant="", priority="interactive"):
    return Request(name, (5,), tenant=tenant, priority=priority)


def popped(queue, holders=()):
    order, held = [], Counter(holders)
    while queue:
        order.append(queue.pop(held))
        held[order[-1].tenant] += 1
    return [one.request_id for one in order]


def test_callers_take_turns():
    queue = WaitingRequests()
    for number in range(5):
        queue.add(request(f"a{number}", "a"))
    queue.add(request("b0", "b"))
    queue.add(request("c0", "c"))
    assert popped(queue) == ["a0", "b0", "c0", "a1", "a2", "a3", "a4"]


def test_who_holds_fewer_slots_comes_first():
    queue = WaitingRequests()
    for name in ("a0", "a1", "b0", "b1"):
        queue.add(request(name, name[0]))
    assert popped(queue, {"a": 2}) == ["b0", "b1", "a0", "a1"]


def test_batch_requests_wait_but_do_not_starve():
    queue = WaitingRequests()
    for number in range(3):
        queue.add(request(f"batch{number}", priority="batch"))
    for number in range(20):
        queue.add(request(f"now{number}"))
    order = popped(queue)
    assert [order.index(f"batch{number}") for number in range(3)] == [
        BATCH_TURN - 1, 2 * BATCH_TURN - 1, 22,
    ]  # fmt: skip


def test_the_order_is_told_without_changing_it():
    draw = random.Random(3)
    for _ in range(200):
        queue = WaitingRequests()
        tenants = draw.choice(["abc", "abcdefghij"])
        for number in range(draw.randint(1, 40)):
            queue.add(
                request(str(number), draw.choice(tenants), draw.choice(["batch", "interactive"]))
            )
        held = {"a": draw.randint(0, 3)}
        for _ in range(draw.randint(0, len(queue) - 1)):
            held[queue.pop(held).tenant] = draw.randint(0, 3)
        told = [one.request_id for one in queue.in_order(held)]
        assert len(queue) == len(told)
        assert popped(queue, held) == told


def turned_away(queue, one):
    return [away.request_id for away in queue.add(one)]


def test_a_full_queue_makes_room_for_who_has_less_in_it():
    queue = WaitingRequests(most=4)
    for number in range(4):
        assert turned_away(queue, request(f"a{number}", "a")) == []
    assert turned_away(queue, request("a4", "a")) == ["a4"]
    assert turned_away(queue, request("b0", "b")) == ["a3"]
    assert turned_away(queue, request("b1", "b")) == ["a2"]
    assert turned_away(queue, request("b2", "b")) == ["b2"]
    assert popped(queue) == ["a0", "b0", "a1", "b1"]


def test_long_prompts_fill_a_queue_too():
    queue = WaitingRequests(most=100, most_tokens=50)

    def long(name, tokens):
        return replace(request(name, name[0]), prompt_ids=(5,) * tokens)

    for name in ("a0", "a1", "b0"):
        assert turned_away(queue, long(name, 15)) == []
    assert turned_away(queue, long("b1", 20)) == ["b1"]
    assert turned_away(queue, long("c0", 25)) == ["c0"]
    assert turned_away(queue, long("c1", 20)) == ["a1"]
    assert popped(queue) == ["a0", "b0", "c1"]
