"""Messages that Triton takes: a checked request, and the wish to cancel one."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from twotower_client.errors import RequestRefusedError
from twotower_contract.options import (
    INPUTS,
    OPTIONS,
    Options,
    Wire,
    ids_refusal,
    refusal,
    unknown_name,
)

MODEL = "twotower"
DTYPES: dict[Wire, str] = {
    "INT32": "int32",
    "UINT64": "uint64",
    "FP32": "float32",
    "BOOL": "bool",
}


def check_options(options: Options) -> dict[str, Any]:
    """Return the options that are given, checked; the server's own limits are for it to tell.

    Raises:
        RequestRefusedError: A value is wrong; the message names it and the values that are allowed.
        TypeError: There is no such option.
    """
    unknown = unknown_name(options, OPTIONS)
    if unknown is not None:
        raise TypeError(unknown)
    given = {
        name: _listed(value) if OPTIONS[name].is_list else value
        for name, value in options.items()
        if value is not None
    }
    _require(refusal(given))
    return given


def infer_request(
    prompt: str | None,
    prompt_ids: Sequence[int] | None,
    options: Options,
    timeout: float,
    queue_notice: float | None = None,
) -> Any:
    """Return the message of a request, after checking it.

    Args:
        prompt: Text, or None.
        prompt_ids: Token ids, or None; exactly one of the two is given.
        options: Options of the request.
        timeout: Seconds after which the server gives the request up by itself.
        queue_notice: Seconds between two notices that the request still waits for a slot; None for
            no notices.

    Returns:
        A `tritonclient.grpc.service_pb2.ModelInferRequest`.

    Raises:
        RequestRefusedError: Something is missing or wrong.
    """
    given = check_options(options)
    message = Message()
    if prompt is None and prompt_ids is None:
        raise RequestRefusedError("there is no prompt; give a prompt or prompt_ids")
    if prompt is not None and prompt_ids is not None:
        raise RequestRefusedError("prompt and prompt_ids are both given; leave one of them out")
    if prompt is not None:
        message.add("text_input", _checked(prompt))
    else:
        ids = _listed(prompt_ids)
        _require(ids_refusal("prompt_ids", ids))
        if not ids:
            raise RequestRefusedError("the prompt is empty; give at least one token id")
        message.add("input_ids", ids)
    for name, value in given.items():
        message.add(name, value)
    message.add("timeout_seconds", timeout)
    if queue_notice is not None:
        message.add("queue_notice_seconds", queue_notice)
    return message.message


def cancel_request(request_id: str) -> Any:
    """Return the message that cancels another request."""
    message = Message()
    message.add("cancel_request_id", request_id)
    return message.message


def probe_request() -> Any:
    """Return the message that asks for the state of the engine."""
    message = Message()
    message.add("probe", 1)
    return message.message


def ready_request() -> Any:
    """Return the message that asks whether the model is ready."""
    from tritonclient.grpc import service_pb2

    return service_pb2.ModelReadyRequest(name=MODEL)


class Message:
    """A ModelInferRequest to which input tensors are added one by one.

    Attributes:
        message: The `tritonclient.grpc.service_pb2.ModelInferRequest`.
    """

    def __init__(self) -> None:
        from tritonclient.grpc import service_pb2

        self.message = service_pb2.ModelInferRequest(model_name=MODEL)

    def add(self, name: str, value: Any) -> None:
        """Add an input of the served model: a text, a number, or a list of either."""
        wire, _ = INPUTS[name]
        if wire == "BYTES":
            texts = [value] if isinstance(value, str | bytes) else value
            contents = [text.encode() if isinstance(text, str) else text for text in texts]
            packed = b"".join(struct.pack("<I", len(one)) + one for one in contents)
            self.add_tensor(name, wire, len(contents), packed)
        else:
            import numpy as np

            values = np.array(value, dtype=DTYPES[wire]).reshape(-1)
            self.add_tensor(name, wire, len(values), values.tobytes())

    def add_tensor(self, name: str, wire: str, count: int, content: bytes) -> None:
        """Add a tensor of one dimension as its bytes."""
        tensor = self.message.inputs.add()
        tensor.name, tensor.datatype = name, wire
        tensor.shape.append(count)
        self.message.raw_input_contents.append(content)


def _require(why: str | None) -> None:
    """Raise what a check found, if anything."""
    if why is not None:
        raise RequestRefusedError(why)


def _checked(prompt: str) -> str:
    """Return a prompt of text, if it can be sent."""
    if not isinstance(prompt, str):
        raise RequestRefusedError(f"the prompt is {type(prompt).__name__}; it must be text (str)")
    if not prompt:
        raise RequestRefusedError("the prompt is empty; give some text")
    try:
        prompt.encode()
    except UnicodeEncodeError as problem:
        raise RequestRefusedError(
            f"the prompt is not valid Unicode at character {problem.start}; it cannot be sent "
            "as UTF-8"
        ) from problem
    return prompt


def _listed(ids: object) -> object:
    """Return ids of any iterable, such as an array, as a list; anything else as it is."""
    if isinstance(ids, Iterable) and not isinstance(ids, str | bytes | Mapping):
        with suppress(TypeError):  # an array without dimensions
            return list(ids)
    return ids
