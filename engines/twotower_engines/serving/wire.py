"""What travels between the steps of the ensemble, as one JSON object.

`preprocess` checks a request once and passes it on whole; `generate` reads it. A second kind of
object stops a request that is under way.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from twotower_contract.options import OPTIONS, ids_refusal, refusal
from twotower_engines.errors import RequestError
from twotower_engines.generation.request import Request


@dataclass(frozen=True, slots=True)
class Job:
    """A request to answer.

    Attributes:
        request: As the engines take it.
        timeout_seconds: After this the server gives it up by itself; 0 for never.
    """

    request: Request
    timeout_seconds: float = 0.0

    def check_timeout(self) -> None:
        """Refuse a timeout that is no duration.

        Raises:
            RequestError: Naming it.
        """
        if not 0 <= self.timeout_seconds < math.inf:
            raise RequestError(
                f"timeout_seconds is {self.timeout_seconds}; it must be 0 (none) or a finite "
                "number above"
            )


@dataclass(frozen=True, slots=True)
class Stop:
    """A wish to stop the request of this id."""

    request_id: str


def encode(message: Job | Stop) -> bytes:
    """Return a message as JSON in UTF-8."""
    if isinstance(message, Stop):
        values: dict[str, Any] = {"stop": message.request_id}
    else:
        values = {**asdict(message.request), "timeout_seconds": message.timeout_seconds}
    return json.dumps(values).encode()


def decode(content: bytes) -> Job | Stop:
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
    if "stop" in values:
        return Stop(str(values["stop"]))
    timeout = values.pop("timeout_seconds", 0.0)
    if isinstance(timeout, bool) or not isinstance(timeout, int | float):
        raise RequestError(f"request: timeout_seconds should be a number, found {timeout!r:.80}")
    return Job(_request(values), float(timeout))


def _request(values: dict[str, Any]) -> Request:
    known = ("request_id", "prompt_ids", *OPTIONS)
    unknown = sorted(set(values) - set(known))
    missing = sorted(set(known[:2]) - set(values))
    if unknown or missing:
        what, names = ("unknown", unknown) if unknown else ("missing", missing)
        raise RequestError(f"request: {what} field `{names[0]}`; known: {', '.join(sorted(known))}")
    why = ids_refusal("prompt_ids", values["prompt_ids"]) or refusal(values)
    if not isinstance(values["request_id"], str):
        why = f"request_id is {values['request_id']!r}; it must be text"
    if why is not None:
        raise RequestError(f"request: {why}")
    lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return Request(**{**values, **lists})
