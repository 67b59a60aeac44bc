"""The message between the steps of the ensemble, as one JSON object.

`preprocess` checks a request once and passes it on whole; `generate` reads it. A second kind of
object cancels a request that is under way.
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
    """A wish to cancel the request of this id."""

    request_id: str


def encode(message: Job | Cancel) -> bytes:
    """Return a message as JSON in UTF-8."""
    if isinstance(message, Cancel):
        values: dict[str, Any] = {"cancel_request_id": message.request_id}
    else:
        durations = {name: getattr(message, name) for name in DURATIONS}
        values = {**asdict(message.request), **durations}
    return json.dumps(values).encode()


def decode(content: bytes) -> Job | Cancel:
    """Read a message.

    Raises:
        RequestError: It is no JSON object of this kind. Only a caller that speaks to `generate`
            directly can send one.
    """
    try:
        values = json.loads(content)
    except ValueError as problem:
        raise RequestError(f"request: is not valid JSON ({problem}); call `twotower`") from problem
    if not isinstance(values, dict):
        raise RequestError("request: should be a JSON object; call the model `twotower` instead")
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
        why = f"request_id is {values['request_id']!r}; it must be text"
    if why is not None:
        raise RequestError(f"request: {why}")
    lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return Request(**{**values, **lists})
