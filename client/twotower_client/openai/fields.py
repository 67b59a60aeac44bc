"""The fields of a request body: read, checked, and translated to options of the model."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from twotower_client.many import Prompt
from twotower_client.openai.problems import ApiError, refused
from twotower_contract.options import FREE, IMPOSSIBLE, OPTIONS, Options, refusal, unknown_name

MAX_TOKENS = 16  # OpenAI's own default for completions
MOST_CHOICES = 64
MOST_LOGPROBS = 20

# Fields of OpenAI's that are ours under another name.
TRANSLATED = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens", "user": "tenant"}
SAME = ("temperature", "top_p", "seed")
# Fields that change nothing here, and the values that ask for nothing.
NOTHING_ASKED: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "logit_bias": (None, {}),
    "best_of": (None, 1),
    "response_format": (None, {"type": "text"}),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "modalities": (None, ["text"]),
}
IGNORED = ("store", "metadata", "service_tier", "parallel_tool_calls", "safety_identifier")
OURS = tuple(name for name in OPTIONS if name not in ("stop", "logprobs", "top_logprobs", *SAME))
COMMON = ("model", "stream", "stream_options", "n", "stop", "logprobs")
COMPLETION_FIELDS = ("prompt", "echo", "suffix")
CHAT_FIELDS = ("messages", "max_completion_tokens", "top_logprobs")


@dataclass(frozen=True, slots=True)
class Wish:
    """One request, translated.

    Attributes:
        prompts: Prompts, each of which gets `choices` answers.
        choices: Answers per prompt.
        options: Options of every request; the seed grows by 1 from one choice to the next.
        stream: Whether pieces are sent as they come.
        usage: Whether the last piece of a stream counts the tokens.
        logprobs: Log-probabilities wanted for each token; None for none.
        echo: Whether the prompt is put before each answer.
        suffix: Text that comes after the answer.
        is_chat: Whether the answer is a message.
    """

    prompts: Sequence[Prompt]
    choices: int
    options: dict[str, Any]
    stream: bool = False
    usage: bool = False
    logprobs: int | None = None
    echo: bool = False
    suffix: str | None = None
    is_chat: bool = False

    @property
    def count(self) -> int:
        """Answers in all."""
        return len(self.prompts) * self.choices

    @property
    def room(self) -> int | None:
        """Tokens before the suffix; None where there is none."""
        canvas = self.options.get("canvas")
        if self.suffix is None or canvas is None:
            return None
        return next((at for at, token in enumerate(canvas) if token != FREE), len(canvas))

    def requests(self) -> list[tuple[Prompt, Options]]:
        """Return a prompt with its options for each choice, in the order of their indices."""
        seed = self.options.get("seed")
        options = dict(self.options)
        if seed is None and options.get("temperature"):
            seed = secrets.randbits(62)  # whoever names no seed expects another answer each time
        return [
            (prompt, cast(Options, options if seed is None else {**options, "seed": seed + choice}))
            for prompt in self.prompts
            for choice in range(self.choices)
        ]


def read_completion(body: Mapping[str, Any]) -> Wish:
    """Read the body of `/v1/completions`.

    Raises:
        ApiError: A field is wrong; the message names it.
    """
    _check_names(body, COMPLETION_FIELDS)
    logprobs = _whole(body, "logprobs", 0, MOST_LOGPROBS)
    echo = _flag(body, "echo")
    suffix = body.get("suffix")
    if suffix is not None and not isinstance(suffix, str):
        raise refused("suffix", "must be text")
    if suffix and "canvas" in body:
        raise refused("suffix", "and canvas are both given; leave one of them out")
    prompts = _prompts(body.get("prompt"))
    if echo and logprobs is not None:
        raise refused("echo", "with logprobs cannot be had: the prompt has no log-probabilities")
    if echo and not all(isinstance(prompt, str) for prompt in prompts):
        raise refused("echo", "needs a prompt of text; leave it out where the prompt is token ids")
    return _wish(
        body,
        prompts,
        body.get("max_tokens", MAX_TOKENS),
        logprobs,
        echo=echo,
        suffix=suffix or None,
    )


def read_chat(body: Mapping[str, Any], prompt: str) -> Wish:
    """Read the body of `/v1/chat/completions`, whose messages are already a prompt.

    Raises:
        ApiError: A field is wrong; the message names it.
    """
    _check_names(body, CHAT_FIELDS)
    top = _whole(body, "top_logprobs", 0, MOST_LOGPROBS)
    logprobs = (top or 0) if _flag(body, "logprobs") else None
    length = body.get("max_completion_tokens")
    return _wish(
        body, [prompt], body.get("max_tokens") if length is None else length, logprobs, is_chat=True
    )


def _wish(
    body: Mapping[str, Any],
    prompts: Sequence[Prompt],
    length: Any,
    logprobs: int | None,
    **more: Any,
) -> Wish:
    for name, values in NOTHING_ASKED.items():
        if body.get(name) not in values:
            reason = IMPOSSIBLE.get(name, "this model has no such thing; leave it out")
            raise refused(name, f"cannot be had: {reason}")
    options = {name: body[name] for name in (*OURS, *SAME) if body.get(name) is not None}
    for theirs, ours in TRANSLATED.items():
        value = length if theirs == "max_tokens" else body.get(theirs)
        if value is not None and ours not in options:
            options[ours] = value
    if (stop := body.get("stop")) is not None:
        options["stop"] = [stop] if isinstance(stop, str) else stop
    if logprobs is not None:
        options["logprobs"] = True
    why = refusal(options)
    if why is not None:
        raise ApiError(400, why, param=next((one for one in options if why.startswith(one)), None))
    stream = _flag(body, "stream")
    if options.get("stream_mode") == "denoise" and not stream:
        raise refused("stream_mode", "is denoise, which a stream alone can show; set stream, too")
    usage = body.get("stream_options") or {}
    if not isinstance(usage, dict):
        raise refused("stream_options", "must be an object")
    return Wish(
        prompts,
        _whole(body, "n", 1, MOST_CHOICES) or 1,
        options,
        stream=stream,
        usage=_flag(usage, "include_usage"),
        logprobs=logprobs,
        **more,
    )


def _check_names(body: Mapping[str, Any], own: Sequence[str]) -> None:
    known = (*own, *COMMON, *SAME, *TRANSLATED, *OURS, *NOTHING_ASKED, *IGNORED)
    why = unknown_name(body, known)
    if why is not None:
        raise ApiError(400, why, param=next(name for name in sorted(body) if name not in known))


def _prompts(value: Any) -> list[Prompt]:
    """Return the prompts: a text, a list of ids, or a list of either."""
    if isinstance(value, str):
        prompts: list[Any] = [value]
    elif isinstance(value, list) and value and all(_is_id(one) for one in value):
        prompts = [value]
    elif isinstance(value, list):
        prompts = value
    else:
        raise refused(
            "prompt",
            "is missing; give text, or a list of token ids"
            if value is None
            else "must be text, a list of token ids, or a list of either",
        )
    for prompt in prompts:
        is_ids = isinstance(prompt, list) and all(_is_id(one) for one in prompt)
        if not prompt or not (isinstance(prompt, str) or is_ids):
            raise refused(
                "prompt", "must be text, a list of token ids, or a list of either, and not empty"
            )
    if not prompts:
        raise refused("prompt", "is empty; give some text")
    return prompts


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _whole(body: Mapping[str, Any], name: str, low: int, high: int) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if not _is_id(value) or not low <= value <= high:
        raise refused(name, f"is {value!r:.80}; it must be a whole number from {low} to {high}")
    return cast(int, value)


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value not in (None, True, False) or (isinstance(value, int) and not isinstance(value, bool)):
        raise refused(name, f"is {value!r:.80}; it must be true or false")
    return bool(value)
