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

Wire = Literal["INT32", "UINT64", "FP32", "BYTES"]
"""Type of a tensor in Triton's protocol."""

INT32_MAX = 2**31 - 1
SEED_MAX = 2**64 - 1
FLOAT32_MAX = (2 - 2**-23) * 2.0**127  # graphs and the wire hold numbers as float32
FLOAT32_LEAST = 2.0**-149  # the least float32 above 0
TEMPERATURE_MIN = 2.0**-20  # 1e-6, also as float32; logits divided by less overflow


@dataclass(frozen=True, slots=True)
class Option:
    """One option as it is declared.

    Attributes:
        wire: Type of its tensor.
        help: Text of `--help`.
        low: Least number.
        high: Largest number.
        zero: Meaning of 0, where 0 is allowed beside the range.
        choices: Names that are allowed.
        modes: Modes that use the option.
        by_policy: Whether some policies allow any number above 0.
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
    name: str = ""
    default: Any = None

    @property
    def is_list(self) -> bool:
        """Whether the value is a list of token ids."""
        return isinstance(self.default, tuple)

    def refusal(self, value: object, policy: str) -> str | None:
        """Return why a value is refused in a request with this policy, or None."""
        if self.is_list:
            return ids_refusal(self.name, value)
        if self.wire == "BYTES":
            if isinstance(value, str) and value in self.choices:
                return None
            return f"{self.name} is {value!r}; it must be one of {', '.join(self.choices)}"
        kind, noun = (Real, "number") if self.wire == "FP32" else (Integral, "whole number")
        if not isinstance(value, kind) or isinstance(value, bool):
            return f"{self.name} is {value!r}; it must be a {noun}"
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
            "INT32", "Token id that ends the answer; a denoised block is kept whole. Repeatable."
        ),
    ] = ()


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


_HINTS = get_type_hints(RequestOptions, include_extras=True)

OPTIONS: dict[str, Option] = {
    one.name: replace(_HINTS[one.name].__metadata__[0], name=one.name, default=one.default)
    for one in fields(RequestOptions)
}
"""Every option by name, in the order of `--help`."""

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


NEAR = 0.7  # likeness of a mistyped name: `max_tokens` is near max_new_tokens, `stop` near no name


def unknown_name(given: Iterable[str], known: Iterable[str]) -> str | None:
    """Return the refusal of the first name that is not known, with the nearest that is, or None."""
    names = tuple(known)
    unknown = sorted(set(given) - set(names))
    if not unknown:
        return None
    near = difflib.get_close_matches(unknown[0], names, 1, NEAR)
    return (
        f"there is no option {unknown[0]!r}{f' (the nearest is {near[0]})' if near else ''}; "
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
        why = option.refusal(values[name], values["policy"])
        if why is not None:
            return why
    if values["mode"] == "mask_diffusion" and (values["top_k"] or values["top_p"] < 1):
        return (
            f"top_k is {values['top_k']} and top_p {values['top_p']}, but mask_diffusion draws "
            "from all tokens; leave them out, or use mode ar or mock_ar"
        )
    return None


def ids_refusal(name: str, ids: object) -> str | None:
    """Return why a value is no list of token ids, or None."""
    if not isinstance(ids, list | tuple):
        return f"{name} is {ids!r}; it must be a list of token ids"
    for place, value in enumerate(ids):
        is_integer = isinstance(value, Integral) and not isinstance(value, bool)
        if not is_integer or not 0 <= value <= INT32_MAX:
            return (
                f"{name}: {value!r} at place {place} is no token id; ids are whole numbers from 0"
            )
    return None


def _float32(value: Any) -> float:
    """Return the float32 nearest to a number; infinity where it is too large for one."""
    try:
        nearest: float = struct.unpack("<f", struct.pack("<f", float(value)))[0]
    except OverflowError:
        return math.inf if value > 0 else -math.inf
    return nearest
