"""Text to ids, and every check that can be made before work starts; and the model of that name.

`Preprocessor` is all of it but Triton's own objects. It reads the limits and the tokenizer of the
engine set; it loads no engine. Both doors use it: `twotower` in a thread of its own, and
`preprocessing` for the ensemble.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from twotower_contract.command_line import warn_of_mask
from twotower_contract.engine_set import EngineSet
from twotower_contract.errors import TwoTowerError, printable
from twotower_contract.options import DIRECT, INPUTS, OPTIONS, Option, unknown_name
from twotower_contract.statuses import text_of
from twotower_engines.artifacts.tokenizer import Tokenizer
from twotower_engines.errors import RequestError
from twotower_engines.generation.request import Request, RequestLimits
from twotower_engines.serving.settings import Settings
from twotower_engines.serving.wire import DURATIONS, Cancel, Job, Probe, encode

Tensors = Mapping[str, npt.NDArray[Any]]

# Longer text cannot fit: no tokenizer that we know has a longer token. It keeps megabytes from
# memory and from the tokenizer only to be refused. Of other inputs it leaves what anybody needs.
BYTES_PER_TOKEN = 256
# Text of more characters for each token that fits is judged by its beginning first.
LONG_CHARACTERS_PER_TOKEN = 16

MOST_NAME = 256  # characters of a caller's name of a request

PROMPTS = ("text_input", "input_ids")
ID_LISTS = ("input_ids", "canvas", "eos_ids")  # none needs more than the engines hold
# What is no request for an answer.
ALONE = {"cancel_request_id": "cancels another request", "probe": "asks for the engine's state"}

# Over HTTP, Triton passes the request's id on as a parameter, too.
TRITONS_OWN = {"id"}


class Preprocessor:
    """Checks and translates requests for one engine set.

    Args:
        engines: The engine set.
    """

    def __init__(self, engines: EngineSet) -> None:
        self._limits = RequestLimits.of_engines(engines)
        self._mask_token_id = engines.manifest.model.mask_token_id
        exists = Tokenizer.exists(engines.folder)
        self._tokenizer = Tokenizer(engines.folder) if exists else None

    def message(
        self, tensors: Tensors, request_id: str, parameters: Collection[str] = ()
    ) -> Job | Cancel | Probe:
        """Return what the engine's thread is to be told.

        Args:
            tensors: The inputs that were given, by name, as declared in config.pbtxt.
            request_id: The client's name of the request, for the log; may be empty.
            parameters: Names that came beside the inputs. Triton makes parameters of those members
                of a JSON body that are no inputs, and lets gRPC's pass.

        Raises:
            RequestError: The request cannot be done.
            TokenizerError: The text is not valid.
        """
        self.check_sizes(tensors)
        why = unknown_name(set(parameters) - TRITONS_OWN, INPUTS)
        if why is not None:
            raise RequestError(why)
        for alone, what in ALONE.items():
            beside = next((name for name in tensors if alone in tensors and name != alone), None)
            if beside is not None:
                raise RequestError(
                    f"{alone} and {beside} are both given; the first {what}: send it alone"
                )
        if "probe" in tensors:
            return Probe()
        if "cancel_request_id" in tensors:
            return Cancel(_text(tensors, "cancel_request_id"))
        request = Request(
            request_id=request_id,
            prompt_ids=self._prompt_ids(tensors),
            **{name: _value(tensors, one) for name, one in OPTIONS.items() if name in tensors},
        )
        request.check(self._limits)
        whose = f"the prompt of request {printable(request.request_id)}"
        warn_of_mask(request.prompt_ids, self._mask_token_id, whose)
        durations = {name: _number(tensors, name) for name in DURATIONS if name in tensors}
        job = Job(request, **durations)
        job.check_durations()
        return job

    def check_sizes(self, tensors: Tensors) -> None:
        """Refuse inputs that are larger than these engines take, at no cost.

        Raises:
            RequestError: Naming the input and its size.
        """
        context = self._limits.context
        for name, tensor in tensors.items():
            size, unit, most = bytes_of(tensors, name), "bytes", context * BYTES_PER_TOKEN
            if name in ID_LISTS:
                size, unit, most = tensor.size, "tokens", context
            if size > most:
                what = "the prompt" if name in PROMPTS else name
                raise RequestError(
                    f"{what} has {size} {unit}, but these engines hold {context} tokens: shorten it"
                )

    def _prompt_ids(self, tensors: Tensors) -> tuple[int, ...]:
        if sum(name in tensors for name in PROMPTS) != 1:
            raise RequestError("give either text_input or input_ids, and not both")
        if "input_ids" in tensors:
            return tuple(tensors["input_ids"].tolist())
        if self._tokenizer is None:
            raise RequestError("these engines have no tokenizer; give input_ids, not text_input")
        text = _text(tensors, "text_input")
        start = self._limits.context * LONG_CHARACTERS_PER_TOKEN
        least = self._tokenizer.least_count(text[:start]) if len(text) > start else 0
        if least > self._limits.context:
            raise RequestError(
                f"the prompt has more than {least} tokens; these engines hold "
                f"{self._limits.context}: shorten it"
            )
        return self._tokenizer.encode(text)


def check_outputs(tensors: Tensors) -> None:
    """Refuse what the ensemble could not tell.

    It waits for every tensor of a step, so an output for it would cost every response its time.

    Raises:
        RequestError: Naming it.
    """
    for name in DIRECT:
        if name in tensors and (value := _value(tensors, OPTIONS[name])) != OPTIONS[name].default:
            raise RequestError(
                f"{name} is {value}, but the model `ensemble` has no output for it; ask the model "
                "`twotower`, which takes the same inputs"
            )


def bytes_of(tensors: Tensors, name: str) -> int:
    """Return the size of an input in bytes; 0 where it was not given."""
    tensor = tensors.get(name)
    if tensor is None:
        return 0
    texts = map(len, tensor.reshape(-1)) if tensor.dtype == object else ()
    return max(tensor.nbytes, sum(texts))


def _value(tensors: Tensors, option: Option) -> Any:
    """Return the value of an option that was given."""
    name = option.name
    if option.wire == "BYTES":
        return _texts(tensors, name) if option.is_list else _text(tensors, name)
    if option.is_list:
        return tuple(tensors[name].tolist())
    if option.wire == "BOOL":
        return bool(_one(tensors, name))
    return _number(tensors, name) if option.wire == "FP32" else int(_one(tensors, name))


def _one(tensors: Tensors, name: str) -> Any:
    """Return the value of an input of one element."""
    return tensors[name].reshape(-1)[0]


def _number(tensors: Tensors, name: str) -> float:
    """Return a float32 as the decimal number that was meant: 0.9, not 0.89999998.

    Otherwise an answer would not be that of `twotower run`, which takes the number itself.
    """
    return float(str(np.float32(_one(tensors, name))))


def _text(tensors: Tensors, name: str) -> str:
    return _texts(tensors, name)[0]


def _texts(tensors: Tensors, name: str) -> tuple[str, ...]:
    try:
        return tuple(bytes(content).decode("utf-8") for content in tensors[name].reshape(-1))
    except UnicodeDecodeError as problem:
        raise RequestError(
            f"{name} is not valid UTF-8 at byte {problem.start}; send it as UTF-8"
        ) from problem


class TritonPythonModel:
    """The model `preprocessing`, which Triton loads."""

    def initialize(self, arguments: dict[str, str]) -> None:
        """Read the engine set that config.pbtxt names."""
        import triton_python_backend_utils as triton

        self._triton = triton
        self._preprocessor = Preprocessor(Settings.of_model(arguments).engines())

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request with one message for `twotower`, or with a refusal."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        triton = self._triton
        tensors, name, parameters = content_of(request)
        try:
            check_outputs(tensors)
            message = self._preprocessor.message(tensors, name, parameters)
        except TwoTowerError as problem:
            text = text_of("refused", str(problem))
            error = triton.TritonError(text, triton.TritonError.INVALID_ARG)
            return triton.InferenceResponse(error=error)
        output = triton.Tensor("request", np.array([encode(message)], dtype=np.object_))
        return triton.InferenceResponse([output])


def content_of(request: Any) -> tuple[dict[str, npt.NDArray[Any]], str, list[str]]:
    """Return the inputs, the id and the names of the parameters of one of Triton's requests.

    The inputs are copied: Triton frees its own when `execute` returns. The id is cut: it is for the
    log alone.
    """
    tensors = {tensor.name(): tensor.as_numpy().copy() for tensor in request.inputs()}
    return tensors, request.request_id()[:MOST_NAME], list(json.loads(request.parameters()))
