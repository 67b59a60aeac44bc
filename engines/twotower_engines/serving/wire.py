"""What the engine's thread can be told, and how it travels between the steps of the ensemble.

`preprocessing` checks a request once and passes it on whole, as one JSON object; `twotower` reads
it. Other kinds of object cancel a request that is under way, or ask whether the engine turns.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from twotower_contract.options import OPTIONS, ids_refusal, refusal, unknown_name
from twotower_engines.errors import RequestError
from twotower_engines.generation.request import Request

DURATIONS = ("timeout_seconds", "queue_notice_seconds")
REMEDY = "give text_input or input_ids instead: `request` is what `preprocessing` made of them"


@dataclass(frozen=True, slots=True)
class Job:
    """A request to answer.

    Attributes:
        request: As the engines take it.
        timeout_seconds: Seconds after which the server gives it up by itself; 0 for never.
        queue_notice_seconds: Seconds between two notices that it still waits for a slot; 0 for no
            notices.
    """

    request: Request
    timeout_seconds: float = 0.0
    queue_notice_seconds: float = 0.0

    def check_durations(self) -> None:
        """Refuse what is no duration.

        Raises:
            RequestError: Naming it.
        """
        for name in DURATIONS:
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise RequestError(
                    f"{name} is {value}; it must be 0 (none) or a finite number above"
                )


@dataclass(frozen=True, slots=True)
class Cancel:
    """A wish to cancel the request that the server gave this id."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Probe:
    """A question to the engine's thread, which answers between two turns, before all who wait."""


def encode(message: Job | Cancel | Probe) -> bytes:
    """Return a message as JSON in UTF-8."""
    values: dict[str, Any]
    if isinstance(message, Cancel):
        values = {"cancel_request_id": message.request_id}
    elif isinstance(message, Probe):
        values = {"probe": 1}
    else:
        durations = {name: getattr(message, name) for name in DURATIONS}
        values = {**asdict(message.request), **durations}
    return json.dumps(values).encode()


def decode(content: bytes) -> Job | Cancel | Probe:
    """Read a message.

    Raises:
        RequestError: It is no JSON object of this kind. Only a caller that gives `request` to
            `twotower` by itself can send one.
    """
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as problem:
        raise RequestError(f"request: is not valid JSON ({problem}); {REMEDY}") from problem
    if not isinstance(values, dict):
        raise RequestError(f"request: should be a JSON object; {REMEDY}")
    if "probe" in values:
        return Probe()
    if "cancel_request_id" in values:
        return Cancel(str(values["cancel_request_id"]))
    durations = {name: values.pop(name, 0.0) for name in DURATIONS}
    for name, value in durations.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise RequestError(f"request: {name} should be a number, found {value!r:.80}")
    return Job(_request(values), *map(float, durations.values()))


def _request(values: dict[str, Any]) -> Request:
    known = ("request_id", "prompt_ids", *OPTIONS)
    missing = sorted(set(known[:2]) - set(values))
    if missing:
        raise RequestError(f"request: there is no {missing[0]!r}; give it")
    why = (
        unknown_name(values, known)
        or ids_refusal("prompt_ids", values["prompt_ids"])
        or refusal(values)
    )
    if not isinstance(values["request_id"], str):
        why = f"request_id is {values['request_id']!r:.80}; it must be text"
    if why is not None:
        raise RequestError(f"request: {why}")
    lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return Request(**{**values, **lists})
