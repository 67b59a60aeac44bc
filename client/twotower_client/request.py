"""A request on the wire: checked, and turned into the message that Triton takes.

The names, types and shapes of the tensors are those of `triton_repo/twotower/config.pbtxt`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Any, TypedDict, cast

import numpy as np

from twotower_client.errors import RequestRefusedError

__all__ = ["MODEL", "Options", "check_options", "infer_request", "stop_request"]

MODEL = "twotower"
INT32_BOUND = 2**31
SEED_BOUND = 2**64
FLOAT32_MAX = float(np.finfo(np.float32).max)
TEMPERATURE_MIN = 2.0**-20  # 1e-6, also as float32; below it logits divided by it overflow
NUMBERS: dict[str, type[np.generic]] = {
    "max_new_tokens": np.int32,
    "block_size": np.int32,
    "steps": np.int32,
    "threshold": np.float32,
    "temperature": np.float32,
    "top_k": np.int32,
    "top_p": np.float32,
    "seed": np.uint64,
}


class Options(TypedDict, total=False):
    """How to generate. What is left out or None is the server's choice; its defaults are NVIDIA's.

    Attributes:
        max_new_tokens: Length of the answer, unless an end token comes before; 64.
        mode: `mask_diffusion`, `ar` or `mock_ar`; the first.
        block_size: Tokens that are denoised together; 16.
        steps: Denoiser calls per block at most; 16.
        threshold: Confidence above which a position is committed; 0.9. For policy `factor` the
            factor, for `entropy` the bound in nats.
        policy: `threshold`, `quota`, `factor`, `entropy` or `leftmost`; the first.
        temperature: 0 for the most likely tokens; 0.
        top_k: Restrict draws to the k most likely tokens; `ar` and `mock_ar` only.
        top_p: Restrict draws to this probability mass; `ar` and `mock_ar` only.
        seed: Of all that is drawn; 0.
        eos_ids: Tokens that end the answer; none.
    """

    max_new_tokens: int | None
    mode: str | None
    block_size: int | None
    steps: int | None
    threshold: float | None
    policy: str | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    seed: int | None
    eos_ids: Sequence[int] | None


def check_options(options: Options) -> None:
    """Refuse what no server can do. What one server cannot do is for it to say.

    Raises:
        RequestRefusedError: Naming the value and what it may be.
        TypeError: There is no such option.
    """
    unknown = sorted(set(options) - set(Options.__annotations__))
    if unknown:
        known = ", ".join(Options.__annotations__)
        raise TypeError(f"there is no option {unknown[0]!r}; the options are {known}")
    _check_integer("max_new_tokens", options.get("max_new_tokens"), 1)
    # A server refuses less than 1 itself, and says what its engines take.
    _check_integer("block_size", options.get("block_size"), -INT32_BOUND)
    _check_integer("steps", options.get("steps"), 1)
    _check_integer("top_k", options.get("top_k"), 0)
    _check_integer("seed", options.get("seed"), 0, SEED_BOUND)
    bound = FLOAT32_MAX if options.get("policy") in ("factor", "entropy") else 1.0
    _check_number("threshold", options.get("threshold"), bound)
    _check_number("temperature", options.get("temperature"), FLOAT32_MAX, zero=True)
    _check_temperature(options.get("temperature"))
    _check_number("top_p", options.get("top_p"), 1.0)
    for name in ("mode", "policy"):
        _check_name(name, options.get(name))
    _check_ids("eos_ids", _listed("eos_ids", options.get("eos_ids")))


def infer_request(
    prompt: str | None,
    prompt_ids: Sequence[int] | None,
    options: Options,
    request_id: str,
    timeout: float,
) -> Any:
    """Return the message of a request, after checking it.

    Args:
        prompt: Text, or None.
        prompt_ids: Token ids, or None. Exactly one of the two is given.
        options: How to generate.
        request_id: Under which the server knows it.
        timeout: Seconds after which the server gives it up by itself.

    Returns:
        A `tritonclient.grpc.service_pb2.ModelInferRequest`.

    Raises:
        RequestRefusedError: Something is missing or cannot be.
    """
    check_options(options)
    message = _Message(request_id)
    if prompt is None and prompt_ids is None:
        raise RequestRefusedError("there is no prompt; give a prompt or prompt_ids")
    if prompt is not None and prompt_ids is not None:
        raise RequestRefusedError("prompt and prompt_ids are both given; leave one of them out")
    if prompt is not None:
        message.text("text_input", _utf8(prompt))
    else:
        ids = _listed("prompt_ids", prompt_ids)
        if not ids:
            raise RequestRefusedError("the prompt is empty; give at least one token id")
        _check_ids("prompt_ids", ids)
        message.array("input_ids", ids, np.int32)
    for name, value in options.items():
        if value is None:
            continue
        if name == "eos_ids":
            message.array(name, _listed(name, value), np.int32)
        elif name in ("mode", "policy"):
            message.text(name, str(value).encode())
        else:
            message.array(name, [cast(float, value)], NUMBERS[name])
    message.array("timeout_seconds", [timeout], np.float32)
    return message.message


def stop_request(request_id: str) -> Any:
    """Return the message that stops another request."""
    message = _Message("")
    message.text("stop", request_id.encode())
    return message.message


class _Message:
    """A ModelInferRequest as it is put together."""

    def __init__(self, request_id: str) -> None:
        from tritonclient.grpc import service_pb2

        self.message = service_pb2.ModelInferRequest(model_name=MODEL, id=request_id)

    def array(self, name: str, values: Sequence[float], dtype: type[np.generic]) -> None:
        types = {np.int32: "INT32", np.uint64: "UINT64", np.float32: "FP32"}
        self._add(name, types[dtype], len(values), np.array(values, dtype=dtype).tobytes())

    def text(self, name: str, content: bytes) -> None:
        self._add(name, "BYTES", 1, struct.pack("<I", len(content)) + content)

    def _add(self, name: str, datatype: str, count: int, content: bytes) -> None:
        tensor = self.message.inputs.add()
        tensor.name, tensor.datatype = name, datatype
        tensor.shape.append(count)
        self.message.raw_input_contents.append(content)


def _utf8(prompt: str) -> bytes:
    if not isinstance(prompt, str):
        raise RequestRefusedError(f"the prompt is {type(prompt).__name__}; it must be text (str)")
    if not prompt:
        raise RequestRefusedError("the prompt is empty; give some text")
    try:
        return prompt.encode()
    except UnicodeEncodeError as problem:
        raise RequestRefusedError(
            f"the prompt is not valid Unicode at character {problem.start}; it cannot be sent "
            "as UTF-8"
        ) from problem


def _check_integer(name: str, value: object, low: int, bound: int = INT32_BOUND) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise RequestRefusedError(f"{name} is {value!r}; it must be a whole number")
    if not low <= value < bound:
        raise RequestRefusedError(f"{name} is {value}; it must be {low} to {bound - 1}")


def _check_number(name: str, value: object, high: float, zero: bool = False) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise RequestRefusedError(f"{name} is {value!r}; it must be a number")
    if not (0 < value <= high or (zero and value == 0)):
        low = "0 or more" if zero else "more than 0"
        raise RequestRefusedError(f"{name} is {value}; it must be {low} and at most {high:.3g}")


def _check_temperature(value: float | None) -> None:
    if value is not None and 0 < value < TEMPERATURE_MIN:
        raise RequestRefusedError(f"temperature is {value}: use 0 (greedy) or at least 1e-6")


def _check_name(name: str, value: object) -> None:
    """Refuse what is no word; which words there are is the server's to say."""
    if value is None:
        return
    if not isinstance(value, str) or not value.isascii():
        raise RequestRefusedError(f"{name} is {value!r}; it must be the name of a {name}")


def _listed(name: str, ids: object) -> list[int]:
    """Return ids that came as any iterable, an array for one; None has none."""
    if ids is None:
        return []
    if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
        raise RequestRefusedError(f"{name} is {ids!r}; it must be a list of token ids")
    try:
        return list(ids)
    except TypeError:  # an array without dimensions
        raise RequestRefusedError(f"{name} is {ids!r}; it must be a list of token ids") from None


def _check_ids(name: str, ids: Sequence[int]) -> None:
    for place, value in enumerate(ids):
        try:
            _check_integer(name, value, 0)
        except RequestRefusedError:
            raise RequestRefusedError(
                f"{name}: {value!r} at place {place} is no token id; ids are whole numbers from 0"
            ) from None
