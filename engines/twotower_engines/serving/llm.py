"""The model `llm`: requests with the names of TensorRT-LLM's and vLLM's Triton backends.

It translates, and asks `twotower`. Each request has a thread, which waits for the blocks and looks
after each whether the caller is still there.
"""

from __future__ import annotations

import json
import secrets
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from twotower_contract.options import DIRECT, IMPOSSIBLE, INPUTS, OPTIONS, unknown_name
from twotower_contract.statuses import STATUSES, text_of
from twotower_engines.errors import RequestError

ENGINE = "twotower"
NOTICE_SECONDS = 1.0  # between two looks whether the caller of a waiting request is there
DTYPES = {"INT32": np.int32, "UINT64": np.uint64, "FP32": np.float32, "BOOL": np.bool_}
CODES = {"INVALID_ARGUMENT": "INVALID_ARG", "UNAVAILABLE": "UNAVAILABLE", "INTERNAL": "INTERNAL"}
OUTPUTS = ("text_output", "output_ids", "prompt_ids", "finish_reason", "request_id")

# Their name to ours.
TRANSLATED = {
    "max_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "stop_words": "stop",
    "stop": "stop",
    "end_id": "eos_ids",
    "stop_token_ids": "eos_ids",
    **{name: name for name in ("temperature", "top_k", "top_p", "seed", "ignore_eos")},
}
# Values of those that ask for nothing, which are left out.
NOTHING = {"top_k": (0, -1), "top_p": (0.0, 1.0), "end_id": (-1,)}
# What cannot be had, and the values that ask for nothing.
REFUSED: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (0, 1),
    "beam_width": (1,),
    "n": (1,),
    "best_of": (1,),
    "min_p": (0,),
    "logit_bias": ({},),
    "bad_words": ([], [""]),
    "guided_decoding_guide": ("",),
    **{name: (OPTIONS[name].default,) for name in DIRECT},
}
WITHOUT_EFFECT = ("pad_id", "guided_decoding_guide_type", "skip_special_tokens", "detokenize")


@dataclass(frozen=True, slots=True)
class Wish:
    """A request as `twotower` takes it.

    Attributes:
        prompt: Text to continue.
        options: Options by our names.
        stream: Whether each block is a response.
        echo: Whether the prompt goes before the answer.
    """

    prompt: str
    options: dict[str, Any]
    stream: bool
    echo: bool


def read_wish(tensors: Mapping[str, npt.NDArray[Any]]) -> Wish:
    """Translate the inputs of a request.

    Raises:
        RequestError: Something cannot be had, or is wrong.
    """
    given = {name: _value(name, tensor) for name, tensor in tensors.items()}
    prompt = given.pop("text_input")
    stream = bool(given.pop("stream", False))
    echo = not given.pop("exclude_input_in_output", True)
    try:
        more = json.loads(given.pop("sampling_parameters", "") or "{}")
    except ValueError as problem:
        raise RequestError(f"sampling_parameters is no JSON ({problem})") from problem
    if not isinstance(more, dict):
        raise RequestError("sampling_parameters is no JSON object")
    values = {name: value for name, value in {**given, **more}.items() if value is not None}
    return Wish(prompt, _options(values), stream, echo)


def _options(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return our options for theirs, checked as far as the names go."""
    known = (*TRANSLATED, *REFUSED, *WITHOUT_EFFECT, *OPTIONS)
    wrong = unknown_name((name for name in values if not name.startswith("return_")), known)
    if wrong is not None:
        raise RequestError(wrong)
    options: dict[str, Any] = {}
    for name, value in values.items():
        if name in REFUSED and value not in REFUSED[name]:
            nowhere = "this model has no such thing"
            why = IMPOSSIBLE.get(name, "ask the model `twotower`" if name in OPTIONS else nowhere)
            raise RequestError(f"{name} is {value!r:.80}, which cannot be had: {why}")
        if name in TRANSLATED and value not in NOTHING.get(name, ()):
            options[TRANSLATED[name]] = value
        elif name in OPTIONS and name not in TRANSLATED:
            options[name] = value
    if options.get("top_k") == 1:  # their word for greedy
        del options["top_k"]
        options["temperature"] = 0.0
    for name in ("stop", "eos_ids"):
        if name in options and not isinstance(options[name], list):
            options[name] = [options[name]]
    options["stop"] = [one for one in options.get("stop", ()) if one]
    if options.get("temperature") and "seed" not in options:
        options["seed"] = secrets.randbits(63)  # another answer each time, as theirs
    return options


def _value(name: str, tensor: npt.NDArray[Any]) -> Any:
    """Return the value of an input: a list for those of any length."""
    values = tensor.reshape(-1).tolist()
    try:
        values = [one.decode() if isinstance(one, bytes) else one for one in values]
    except UnicodeDecodeError as problem:
        raise RequestError(f"{name} is not valid UTF-8 at byte {problem.start}") from problem
    return values if name in ("stop_words", "bad_words") else values[0]


class TritonPythonModel:
    """The model class that Triton loads."""

    def initialize(self, arguments: dict[str, str]) -> None:
        """Remember Triton's module."""
        import triton_python_backend_utils as triton

        self._triton = triton
        self._threads: set[threading.Thread] = set()

    def execute(self, requests: list[Any]) -> None:
        """Give each request a thread. Inputs are copied: Triton frees them."""
        for request in requests:
            tensors = {one.name(): one.as_numpy().copy() for one in request.inputs()}
            arguments = (tensors, request.get_response_sender())
            thread = threading.Thread(target=self._run, args=arguments, daemon=True)
            self._threads.add(thread)
            thread.start()

    def finalize(self) -> None:
        """Wait for the answers under way, which `twotower` ends when it ends."""
        for thread in list(self._threads):
            thread.join()

    def _run(self, tensors: Mapping[str, npt.NDArray[Any]], sender: Any) -> None:
        try:
            self._answer(read_wish(tensors), sender)
        except RequestError as problem:
            self._fail(sender, text_of("refused", str(problem)))
        except Exception as problem:
            traceback.print_exc(file=sys.stderr)
            self._fail(sender, text_of("failed", f"{type(problem).__name__}: {problem}"))
        finally:
            self._threads.discard(threading.current_thread())

    def _answer(self, wish: Wish, sender: Any) -> None:
        """Ask `twotower`, and send its blocks, or all of them as one."""
        text, count, prompt_count, name = wish.prompt if wish.echo else "", 0, 0, ""
        reason = ""
        for outputs in self._ask(wish):
            if isinstance(outputs, str):
                self._fail(sender, outputs)
                return
            name = name or _first(outputs, "request_id")
            if sender.is_cancelled() and name:
                self._cancel(name)
                name = ""
            prompt_count = prompt_count or len(outputs.get("prompt_ids", ()))
            text += _first(outputs, "text_output")
            count += len(outputs.get("output_ids", ()))
            reason = _first(outputs, "finish_reason")
            if wish.stream and count and not reason:
                self._send(sender, text, prompt_count, count, "")
                text, count = "", 0
        self._send(sender, text, prompt_count, count, reason, is_last=True)

    def _ask(self, wish: Wish) -> Iterator[dict[str, npt.NDArray[Any]] | str]:
        """Yield the outputs of each response of `twotower`, or the text of an error."""
        values = {"text_input": wish.prompt, "queue_notice_seconds": NOTICE_SECONDS, **wish.options}
        for response in self._call(values):
            if response.has_error():
                yield response.error().message()
                return
            yield {one.name(): one.as_numpy() for one in response.output_tensors()}

    def _cancel(self, name: str) -> None:
        """Let `twotower` stop a request whose caller is gone."""
        for _ in self._call({"cancel_request_id": name}):
            pass

    def _call(self, values: Mapping[str, Any]) -> Iterator[Any]:
        """Call `twotower`."""
        triton = self._triton
        inputs = [triton.Tensor(name, _tensor(name, value)) for name, value in values.items()]
        request = triton.InferenceRequest(
            model_name=ENGINE, requested_output_names=list(OUTPUTS), inputs=inputs
        )
        yield from request.exec(decoupled=True)

    def _send(
        self, sender: Any, text: str, prompt: int, count: int, reason: str, is_last: bool = False
    ) -> None:
        triton = self._triton
        words = "" if not reason else "length" if reason in ("length", "calls") else "stop"
        tensors = [
            triton.Tensor("text_output", np.array([[text.encode()]], object)),
            triton.Tensor("num_input_tokens", np.array([[prompt]], np.int32)),
            triton.Tensor("num_output_tokens", np.array([[count]], np.int32)),
            triton.Tensor("finish_reason", np.array([[words.encode()]], object)),
        ]
        flags = triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL if is_last else 0
        sender.send(triton.InferenceResponse(tensors), flags=flags)

    def _fail(self, sender: Any, message: str) -> None:
        """End an answer with an error, with the code that its text names."""
        triton = self._triton
        status = next((one for one in STATUSES.values() if one in message), "INTERNAL")
        code = getattr(triton.TritonError, CODES.get(status, "CANCELLED"))
        response = triton.InferenceResponse(error=triton.TritonError(message, code))
        sender.send(response, flags=triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def _tensor(name: str, value: Any) -> npt.NDArray[Any]:
    """Return an input of `twotower`.

    Raises:
        RequestError: The value has another type.
    """
    wire, _ = INPUTS[name]
    values = value if isinstance(value, list) else [value]
    if wire == "BYTES":
        if not all(isinstance(one, str) for one in values):
            raise RequestError(f"{name} is {value!r:.80}; it must be text")
        return np.array([one.encode() for one in values], object)
    try:
        return np.array(values, DTYPES[wire])
    except (ValueError, TypeError, OverflowError) as problem:
        raise RequestError(f"{name} is {value!r:.80}: {problem}") from problem


def _first(outputs: Mapping[str, npt.NDArray[Any]], name: str) -> str:
    """Return the text of an output; empty where there is none."""
    values = outputs.get(name)
    return "" if values is None or not values.size else bytes(values.reshape(-1)[0]).decode()
