"""The options of a request, each declared once: default, type on the wire, range, and help.

`RequestOptions` is the declaration. The options of `twotower run` and `twotower generate`, the
checks of the client and of the engines, and the server's reading of its input tensors follow from
it, and `twotower package` gives the served models their inputs from it.
"""

from __future__ import annotations

import difflib
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Annotated, Any, Literal, TypedDict, get_args, get_type_hints

from twotower_contract.policies import BOUND_POLICIES, POLICY_NAMES

Mode = Literal["mask_diffusion", "mock_ar", "ar"]
MODES: tuple[str, ...] = get_args(Mode)
DRAWING = ("ar", "mock_ar")  # they draw tokens on the host, one at a time
DIFFUSION = ("mask_diffusion",)

Priority = Literal["interactive", "batch"]
PRIORITIES: tuple[str, ...] = get_args(Priority)
StreamMode = Literal["block", "denoise"]
STREAM_MODES: tuple[str, ...] = get_args(StreamMode)

Wire = Literal["INT32", "UINT64", "FP32", "BYTES", "BOOL"]
"""Type of a tensor in Triton's protocol."""

INT32_MAX = 2**31 - 1
SEED_MAX = 2**64 - 1
FLOAT32_MAX = (2 - 2**-23) * 2.0**127  # graphs and the wire hold numbers as float32
FLOAT32_LEAST = 2.0**-149  # the least float32 above 0
TEMPERATURE_MIN = 2.0**-20  # 1e-6, also as float32; logits divided by less overflow
FREE = -1  # in a canvas: a position that the model fills
MOST_STOPS = 16
MOST_ENDS = 256  # a list is read for each request, which others wait for
MOST_BYTES = 256  # of a stop string, or of a tenant's name
MOST_TOP = 20

UNHELD_BY_DIFFUSION = (
    "a block is decided in parallel by the engine, which does not see the answer's earlier tokens"
)
IMPOSSIBLE: dict[str, str] = {
    **dict.fromkeys(
        ("beam_width", "num_beams", "best_of", "use_beam_search", "length_penalty"),
        "there is no beam search; draw several answers with different seeds",
    ),
    **dict.fromkeys(
        ("repetition_penalty", "presence_penalty", "frequency_penalty"),
        f"there are no penalties: {UNHELD_BY_DIFFUSION}; max_repetition_run ends an answer that "
        "repeats itself",
    ),
    **dict.fromkeys(
        ("logit_bias", "bad_words", "guided_decoding_guide", "response_format"),
        f"logits cannot be changed: {UNHELD_BY_DIFFUSION}; canvas fixes tokens in their places",
    ),
    "n": "a request has one answer; send it n times, with different seeds",
}
"""Options of other servers that cannot be had here, and why."""


@dataclass(frozen=True, slots=True)
class Option:
    """One option as it is declared.

    Attributes:
        wire: Type of its tensor.
        help: Text of `--help`.
        low: Least number; of a list, least id.
        high: Largest number; of a text, most bytes; of a list of ids, most of them.
        zero: Meaning of 0, where 0 is allowed beside the range.
        choices: Names that are allowed.
        modes: Modes that use the option.
        by_policy: Whether some policies allow any number above 0.
        joined: Whether a command line takes a list whole, with commas.
        name: Name of the option, in Python and on the wire.
        default: Value where it is not given.
    """

    wire: Wire
    help: str
    low: float = 1
    high: float = INT32_MAX
    zero: str = ""
    choices: tuple[str, ...] = ()
    modes: tuple[str, ...] = MODES
    by_policy: bool = False
    joined: bool = False
    name: str = ""
    default: Any = None

    @property
    def is_list(self) -> bool:
        """Whether the value is a list, of token ids or of texts."""
        return isinstance(self.default, tuple)

    def refusal(self, value: object, policy: str) -> str | None:
        """Return why a value is refused in a request with this policy, or None."""
        if self.wire == "BYTES":
            return self._text_refusal(value)
        if self.is_list:
            return ids_refusal(self.name, value, int(self.low), int(self.high))
        if self.wire == "BOOL":
            is_bool = type(value).__name__ in ("bool", "bool_")  # numpy's is another type
            return None if is_bool else f"{self.name} is {value!r:.80}; it must be true or false"
        kind, noun = (Real, "number") if self.wire == "FP32" else (Integral, "whole number")
        if not isinstance(value, kind) or isinstance(value, bool):
            return f"{self.name} is {value!r:.80}; it must be a {noun}"
        number: Any = _float32(value) if self.wire == "FP32" else value
        high = FLOAT32_MAX if self.by_policy and policy in BOUND_POLICIES else self.high
        if self.low <= number <= high or (self.zero and number == 0):
            return None
        low = "more than 0" if self.low == FLOAT32_LEAST else f"at least {self.low:.1g}"
        return (
            f"{self.name} is {value}; it must be {f'0 ({self.zero}), or ' if self.zero else ''}"
            f"{low} and at most {high if isinstance(high, int) else format(high, '.3g')}"
            f"{f' with policy {policy}' if self.by_policy else ''}"
        )

    def _text_refusal(self, value: object) -> str | None:
        """Return why a value is no text, or no list of texts, that the option takes, or None."""
        if self.is_list:
            if not isinstance(value, list | tuple) or len(value) > MOST_STOPS:
                return f"{self.name} is {value!r:.80}; it must be a list of at most {MOST_STOPS}"
            for one in value:
                if not one or not self._is_short(one):
                    return f"{self.name}: {one!r:.80} is no text of 1 to {self.high} bytes"
            return None
        if not self.choices:
            if self._is_short(value):
                return None
            return f"{self.name} is {value!r:.80}; it must be text of at most {self.high} bytes"
        if isinstance(value, str) and value in self.choices:
            return None
        return f"{self.name} is {value!r:.80}; it must be one of {', '.join(self.choices)}"

    def _is_short(self, value: object) -> bool:
        """Whether a value is text that can be sent, no longer than the option takes."""
        if not isinstance(value, str):
            return False
        try:
            return len(value.encode()) <= self.high
        except UnicodeEncodeError:
            return False


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOptions:
    """All options of a request, each declared here and nowhere else. Defaults are NVIDIA's."""

    mode: Annotated[
        Mode,
        Option(
            "BYTES",
            "mask_diffusion (both towers, block by block), ar (the context tower alone, token by "
            "token), or mock_ar (both towers, token by token).",
            choices=MODES,
        ),
    ] = "mask_diffusion"
    max_new_tokens: Annotated[
        int, Option("INT32", "Length of the answer in tokens, unless an end token comes before.")
    ] = 64
    block_size: Annotated[
        int,
        Option(
            "INT32",
            "Tokens that are denoised together, or sent together in the other modes; the engines "
            "limit it.",
        ),
    ] = 16
    steps: Annotated[int, Option("INT32", "Most denoiser calls per block.", modes=DIFFUSION)] = 16
    policy: Annotated[
        str,
        Option(
            "BYTES",
            f"Rule by which a step commits positions: {', '.join(POLICY_NAMES)}.",
            choices=POLICY_NAMES,
            modes=DIFFUSION,
        ),
    ] = "threshold"
    threshold: Annotated[
        float,
        Option(
            "FP32",
            "Confidence above which a position is committed; with policy factor the factor, with "
            "entropy the bound in nats.",
            low=FLOAT32_LEAST,
            high=1.0,
            by_policy=True,
            modes=DIFFUSION,
        ),
    ] = 0.9
    temperature: Annotated[
        float,
        Option(
            "FP32",
            "Temperature of the draws, at least 1e-6; 0 takes the most likely tokens (greedy).",
            low=TEMPERATURE_MIN,
            high=FLOAT32_MAX,
            zero="greedy",
        ),
    ] = 0.0
    top_k: Annotated[
        int,
        Option(
            "INT32",
            "Draw from the k most likely tokens; 0 keeps all.",
            zero="keeps all",
            modes=DRAWING,
        ),
    ] = 0
    top_p: Annotated[
        float,
        Option(
            "FP32",
            "Draw from the most likely tokens up to this probability mass; 1 keeps all.",
            low=FLOAT32_LEAST,
            high=1.0,
            modes=DRAWING,
        ),
    ] = 1.0
    seed: Annotated[
        int,
        Option("UINT64", "Random seed; the same seed gives the same answer.", low=0, high=SEED_MAX),
    ] = 0
    eos_ids: Annotated[
        tuple[int, ...],
        Option(
            "INT32",
            "Token id that ends the answer, beside the model's own end token. Repeatable.",
            low=0,
            high=MOST_ENDS,
        ),
    ] = ()
    ignore_eos: Annotated[
        bool, Option("BOOL", "Go on after the model's own end token; eos_ids still end.")
    ] = False
    stop: Annotated[
        tuple[str, ...],
        Option(
            "BYTES",
            "Text that ends the answer, and is left out of it; found across blocks. Repeatable.",
            high=MOST_BYTES,
        ),
    ] = ()
    min_new_tokens: Annotated[
        int,
        Option(
            "INT32",
            "Nothing ends the answer before this many tokens; ar and mock_ar choose no end token "
            "before.",
            low=0,
        ),
    ] = 0
    max_denoiser_calls: Annotated[
        int,
        Option(
            "INT32",
            "Most denoiser calls of the answer, whose last one fills its block; 0 for no bound.",
            zero="no bound",
            modes=("mask_diffusion", "mock_ar"),
        ),
    ] = 0
    max_repetition_run: Annotated[
        int,
        Option(
            "INT32",
            "End the answer once a token stands there more than this many times in a row; 0 for "
            "never.",
            zero="never",
        ),
    ] = 0
    canvas: Annotated[
        tuple[int, ...],
        Option(
            "INT32",
            "Tokens of the answer that are fixed in their places, -1 for those that the model "
            "fills.",
            low=FREE,
            modes=DIFFUSION,
            joined=True,
        ),
    ] = ()
    stream_mode: Annotated[
        StreamMode,
        Option(
            "BYTES",
            "block sends committed blocks; denoise also the block after each step, masks included.",
            choices=STREAM_MODES,
            modes=DIFFUSION,
        ),
    ] = "block"
    logprobs: Annotated[
        bool,
        Option(
            "BOOL",
            "Tell of each token its log-probability, and the step of its block that committed it.",
        ),
    ] = False
    top_logprobs: Annotated[
        int,
        Option(
            "INT32",
            "Tell of each token also this many of the most likely ones, with logprobs.",
            low=0,
            high=MOST_TOP,
            modes=DRAWING,
        ),
    ] = 0
    prefix_cache: Annotated[
        bool,
        Option(
            "BOOL",
            "Keep the states of this prompt for later ones that begin alike, and use those kept.",
        ),
    ] = True
    priority: Annotated[
        Priority,
        Option(
            "BYTES",
            "interactive requests get a slot before batch ones.",
            choices=PRIORITIES,
        ),
    ] = "interactive"
    tenant: Annotated[
        str,
        Option("BYTES", "Name of the caller: callers take turns.", high=MOST_BYTES),
    ] = ""


class Options(TypedDict, total=False):
    """Options as a caller names them; one that is left out or None is the server's choice.

    `RequestOptions` declares what each one means, its range, and the server's default.
    """

    mode: str | None
    max_new_tokens: int | None
    block_size: int | None
    steps: int | None
    policy: str | None
    threshold: float | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    seed: int | None
    eos_ids: Sequence[int] | None
    ignore_eos: bool | None
    stop: Sequence[str] | None
    min_new_tokens: int | None
    max_denoiser_calls: int | None
    max_repetition_run: int | None
    canvas: Sequence[int] | None
    stream_mode: str | None
    logprobs: bool | None
    top_logprobs: int | None
    prefix_cache: bool | None
    priority: str | None
    tenant: str | None


_HINTS = get_type_hints(RequestOptions, include_extras=True)

OPTIONS: dict[str, Option] = {
    one.name: replace(_HINTS[one.name].__metadata__[0], name=one.name, default=one.default)
    for one in fields(RequestOptions)
}
"""Every option by name, in the order of `--help`."""

DIRECT = ("logprobs", "top_logprobs", "stream_mode")
"""Options that ask to be told what the model `twotower` alone has outputs for."""

INPUTS: dict[str, tuple[Wire, int]] = {
    "text_input": ("BYTES", 1),
    "input_ids": ("INT32", -1),
    **{name: (option.wire, -1 if option.is_list else 1) for name, option in OPTIONS.items()},
    "timeout_seconds": ("FP32", 1),
    "queue_notice_seconds": ("FP32", 1),
    "cancel_request_id": ("BYTES", 1),
    "probe": ("INT32", 1),
}
"""Type and length (-1 for any) of every input tensor of the served model; all are optional."""


MOST_COMPARED = 64  # characters of an unknown name: a comparison takes time
NEAR = 0.7  # likeness of a mistyped name: `max_tokens` is near max_new_tokens, `stop` near no name


def unknown_name(given: Iterable[str], known: Iterable[str]) -> str | None:
    """Return the refusal of the first name that is not known, with the nearest that is, or None."""
    names = tuple(known)
    unknown = sorted(set(given) - set(names))
    if not unknown:
        return None
    impossible = next((name for name in unknown if name in IMPOSSIBLE), None)
    if impossible is not None:
        return f"{impossible} cannot be had: {IMPOSSIBLE[impossible]}"
    first = unknown[0][:MOST_COMPARED]
    near = difflib.get_close_matches(first, names, 1, NEAR)
    return (
        f"there is no option {first!r}{f' (the nearest is {near[0]})' if near else ''}; "
        f"the options are {', '.join(names)}"
    )


def refusal(given: Mapping[str, Any]) -> str | None:
    """Return why no engines can do what these options ask, or None.

    Limits of one engine set (largest block, context, vocabulary) are not looked at.

    Args:
        given: Values by name; the default stands for one that is left out.
    """
    values = {name: given.get(name, option.default) for name, option in OPTIONS.items()}
    for name, option in OPTIONS.items():
        if values[name] is option.default:  # always right: most options of most requests
            continue
        why = option.refusal(values[name], values["policy"])
        if why is not None:
            return why
    if values["mode"] == "mask_diffusion" and (values["top_k"] or values["top_p"] < 1):
        return (
            f"top_k is {values['top_k']} and top_p {values['top_p']}, but mask_diffusion draws "
            "from all tokens; leave them out, or use mode ar or mock_ar"
        )
    return _contradiction(values)


def _contradiction(values: Mapping[str, Any]) -> str | None:
    """Return which options contradict each other, or None; each is right by itself."""
    mode, most, canvas = values["mode"], values["max_new_tokens"], values["canvas"]
    if values["min_new_tokens"] > most:
        return f"min_new_tokens is {values['min_new_tokens']}, above max_new_tokens, {most}"
    if values["top_logprobs"] and not values["logprobs"]:
        return "top_logprobs is given without logprobs; set logprobs, too"
    if values["top_logprobs"] and mode in DIFFUSION:
        return (
            f"top_logprobs is {values['top_logprobs']}, but mask_diffusion's logits stay on the "
            "device; leave it out, or use mode ar or mock_ar"
        )
    if canvas and mode not in DIFFUSION:
        return f"canvas is given, but mode {mode} fixes no token; use mode mask_diffusion"
    if len(canvas) > most:
        return f"canvas has {len(canvas)} places, but max_new_tokens is {most}; raise it"
    last = last_pinned(canvas)
    end = next((token for token in canvas[:last] if token in values["eos_ids"]), None)
    if end is not None:
        return f"canvas has the end token {end} before its last fixed token; leave one of them out"
    return None


def last_pinned(canvas: Sequence[int]) -> int:
    """Return the last place of a canvas that is fixed; -1 where none is."""
    return max((place for place, token in enumerate(canvas) if token != FREE), default=-1)


def ids_refusal(name: str, ids: object, low: int = 0, most: int = INT32_MAX) -> str | None:
    """Return why a value is no list of at most so many token ids from `low` on, or None."""
    if not isinstance(ids, list | tuple):
        return f"{name} is {ids!r:.80}; it must be a list of token ids"
    if len(ids) > most:
        return f"{name} has {len(ids)} token ids; it must have at most {most}"
    for place, value in enumerate(ids):
        is_integer = isinstance(value, Integral) and not isinstance(value, bool)
        if not is_integer or not low <= value <= INT32_MAX:
            return (
                f"{name}: {value!r:.80} at place {place} is no token id; ids are whole numbers "
                f"from {low}"
            )
    return None


def _float32(value: Any) -> float:
    """Return the float32 nearest to a number; infinity where it is too large for one."""
    try:
        nearest: float = struct.unpack("<f", struct.pack("<f", float(value)))[0]
    except OverflowError:
        return math.inf if value > 0 else -math.inf
    return nearest
