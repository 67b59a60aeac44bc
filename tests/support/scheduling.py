"""Requests drawn at random, and schedulers turned until they are idle."""

from __future__ import annotations

from twotower_contract.policies import POLICIES
from twotower_engines.generation.request import Request
from twotower_engines.generation.scheduler import Scheduler


class CountedRuntime:
    """The real runtime, with its calls written down."""

    def __init__(self, runtime):
        self.runtime = runtime
        self.calls = []

    def __getattr__(self, name):
        value = getattr(self.runtime, name)
        if name not in ("extend", "denoise", "predict"):
            return value

        def counted(rows):
            self.calls.append((name, [row.slot for row in rows]))
            return value(rows)

        return counted


def finish(scheduler, events=None):
    """Turn until nothing is left; events by request."""
    answers = events if events is not None else {}
    turns = 0
    while not scheduler.idle:
        for event in scheduler.turn():
            answers.setdefault(event.request_id, []).append(event)
        turns += 1
        assert turns < 5000, "the scheduler does not come to an end"
    return answers


def alone(runtime, request):
    scheduler = Scheduler(runtime, slots=1)
    scheduler.submit(request)
    return finish(scheduler)[request.request_id]


def drawn(draw, name):
    """A request of any kind: modes, policies, lengths, ends, a canvas, callers."""
    mode = draw.choice(["mask_diffusion", "mask_diffusion", "mask_diffusion", "ar", "mock_ar"])
    length = draw.randint(1, 36)
    canvas = [draw.choice([-1, -1, draw.randrange(4, 70)]) for _ in range(draw.randint(0, length))]
    return Request(
        name,
        tuple(draw.randrange(4, 70) for _ in range(draw.randint(1, 30))),
        mode=mode,
        max_new_tokens=length,
        block_size=draw.choice([2, 8, 16]),
        steps=draw.choice([1, 4, 16]),
        threshold=draw.choice([0.1, 0.5, 0.9]),
        policy=draw.choice(list(POLICIES)),
        temperature=draw.choice([0.0, 0.0, 0.7]),
        seed=draw.randrange(2**64),
        eos_ids=tuple(draw.sample(range(70, 300), draw.choice([0, 8]))),
        ignore_eos=draw.choice([True, False]),
        min_new_tokens=draw.choice([0, draw.randint(0, length)]),
        max_denoiser_calls=draw.choice([0, 0, draw.randint(1, 20)]),
        max_repetition_run=draw.choice([0, 0, 1]),
        canvas=tuple(canvas) if mode == "mask_diffusion" and draw.random() < 0.3 else (),
        priority=draw.choice(["interactive", "batch"]),
        tenant=draw.choice(["", "a", "b"]),
    )
