"""The parts that `twotower run` and `twotower generate` share: options, prompt, and output.

Click is imported when a command is made: importing this module loads the standard library only.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from twotower_contract.atomic import check_file
from twotower_contract.options import DIFFUSION, MODES, OPTIONS, Option

JSON_HELP = """With --json one object is printed at
the end: output_ids (the prompt included), text (of the new tokens), denoiser_calls, context_calls,
blocks (for each block, the positions still masked before each denoiser call), seconds,
finish_reason."""


OPENAI_PORT = 9000
"""Port of `twotower openai`, and of `twotower serve --openai`."""

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def together(*options: Decorator) -> Decorator:
    """Return what adds several options to a command, in their order."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def request_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of a request to a command, and `--json`."""
    import click

    types = {"INT32": int, "UINT64": int, "FP32": float, "BYTES": str, "BOOL": bool}
    added: list[Decorator] = []
    for name, option in OPTIONS.items():
        flag = name.replace("_", "-")
        if option.wire == "BOOL":
            added.append(click.option(f"--{flag}/--no-{flag}", default=None, help=_help(option)))
            continue
        is_repeated = option.is_list and not option.joined
        added.append(
            click.option(
                f"--{flag.removesuffix('s') if is_repeated else flag}",
                name,
                type=_whole_numbers if option.joined else types[option.wire],
                multiple=is_repeated,
                metavar="5,-1,7" if option.joined else None,
                help=_help(option),
            )
        )
    text = "Print one JSON object at the end."
    return together(*added, click.option("--json", "as_json", is_flag=True, help=text))(command)


def prompt_ids_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the option of a prompt of token ids to a command."""
    import click

    text = "Token ids to continue, instead of text."
    return click.option("--prompt-ids", metavar="5,6,7", help=text)(command)


def output_file(context: Any, parameter: Any, path: Path | None) -> Path | None:
    """Refuse an output file that could not be written now: click's callback of such an option."""
    return None if path is None else check_file(path)


def html_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the option of a page that replays an answer to a command."""
    import click

    return click.option(
        "--html",
        type=click.Path(path_type=Path, dir_okay=False),
        metavar="FILE",
        callback=output_file,
        help="Write a page to FILE that replays the denoising.",
    )(command)


def showing_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that show how an answer comes about."""
    import click

    text = "Show the block on the terminal as it resolves, coloured by confidence."
    return together(click.option("--live", is_flag=True, help=text), html_option)(command)


def check_showing(live: bool, as_json: bool, error: type[Exception]) -> None:
    """Refuse two uses of standard output at once.

    Args:
        live: Whether --live is given.
        as_json: Whether --json is given.
        error: Class of the error.
    """
    if live and as_json:
        raise error("--live and --json are both given; leave one of them out")


def showing(options: dict[str, Any], live: bool, html: Path | None) -> dict[str, Any]:
    """Return the options of a request with those that --live and --html need."""
    mode = options.get("mode", OPTIONS["mode"].default)
    shown = {"stream_mode": "denoise"} if live and mode in DIFFUSION else {}
    return {**options, **shown, **({"logprobs": True} if html is not None else {})}


def _whole_numbers(text: str) -> tuple[int, ...]:
    """Return the numbers of a list with commas; ValueError, which click reports, for others."""
    return tuple(int(part) for part in text.split(","))


def _help(option: Option) -> str:
    modes = "" if option.modes == MODES else f" Used by {' and '.join(option.modes)} only."
    has_default = not option.is_list and option.default != ""
    return option.help + modes + (f"  [default: {option.default}]" if has_default else "")


def given_options(values: dict[str, Any]) -> dict[str, Any]:
    """Return the options that the command line names, without those that it leaves out."""
    return {name: value for name, value in values.items() if value not in (None, ())}


def read_prompt(
    text: str | None, ids: str | None, name: str, error: type[Exception]
) -> tuple[str | None, tuple[int, ...] | None]:
    """Return the prompt as text or as ids, and None for the other; refuse one that is empty.

    Args:
        text: Text from the command line.
        ids: Value of `--prompt-ids`.
        name: Name of the parameter that gives the text.
        error: Class of the error for a prompt that is missing or malformed.
    """
    if text is None and ids is None:
        given = f"{name} TEXT" if name.startswith("-") else name
        raise error(f"there is no prompt; give {given} or --prompt-ids 5,6,7")
    if text is not None and ids is not None:
        raise error(f"{name} and --prompt-ids are both given; leave one of them out")
    if not (text or (ids or "").strip()):
        raise error("the prompt is empty; give at least one token")
    if ids is None:
        return _as_utf8(text or "", name, error), None
    try:
        return None, tuple(int(part) for part in ids.split(","))
    except ValueError:
        raise error(
            f"--prompt-ids is {ids!r}; give whole numbers with commas between them, as 5,6,7"
        ) from None


def _as_utf8(argument: str, name: str, error: type[Exception]) -> str:
    """Return what a terminal sent as the UTF-8 that it is, whatever the locale calls it.

    Python keeps the bytes of an argument that its locale (C, for one) cannot read as surrogates.
    """
    try:
        argument.encode()
    except UnicodeEncodeError:
        try:
            return os.fsencode(argument).decode()
        except UnicodeError as problem:
            raise error(f"{name} is not valid UTF-8 ({problem}); give it as UTF-8") from None
    return argument


def warn_of_mask(prompt_ids: Sequence[int], mask_id: int, whose: str = "the prompt") -> None:
    """Warn of a prompt that holds the mask token, as by the token's own text.

    It is harmless to the towers, which mask by position, but surely not what was meant.
    """
    if mask_id in prompt_ids:
        print(
            f"warning: {whose} holds the mask token (id {mask_id}) and is read as such: it stays "
            "in the context, and nothing is filled in there",
            file=sys.stderr,
            flush=True,
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """An answer as both verbs print it; the attributes are the fields of `--json`."""

    output_ids: tuple[int, ...]
    text: str | None
    denoiser_calls: int
    context_calls: int
    blocks: tuple[tuple[int, ...], ...]
    seconds: float
    finish_reason: str

    def as_json(self, **more: Any) -> str:
        """Return the answer as one JSON object, with what else there is to tell."""
        return json.dumps({**asdict(self), "seconds": round(self.seconds, 6), **more})

    def figures(self, prompt_length: int) -> str:
        """Return one line of figures for people.

        Args:
            prompt_length: Tokens of the prompt, which `output_ids` begins with.
        """
        count = len(self.output_ids) - prompt_length
        calls = _number(self.denoiser_calls, "denoiser call")
        if self.denoiser_calls:
            calls += f" ({count / self.denoiser_calls:.2f} tokens per call)"
        return (
            f"{_number(count, 'token')} in {self.seconds:.2f} s "
            f"({count / self.seconds:.1f} tokens/s), {calls}, "
            f"{_number(self.context_calls, 'context call')}, ended by {self.finish_reason}"
        )


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
