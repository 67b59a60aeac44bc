"""The verb `twotower generate`: asks a running server for an answer."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Any

import click

from twotower_client.errors import RequestRefusedError

if TYPE_CHECKING:
    from twotower_client.result import Answer

__all__ = ["generate"]

MASK_ID = 3  # of the released model; a server does not say which it is

EPILOG = """\b
Examples:
  twotower generate "Mia the fox lived by the river." --url localhost:8001
  twotower generate "Mia the fox" --stream --threshold 0.8 --max-new-tokens 128
  twotower generate --prompt-ids 5,6,7 --mode ar --temperature 0.7 --top-p 0.9 --json

The answer goes to standard output, figures to standard error. With --json one object is printed at
the end: output_ids (the prompt included), text (of the new tokens), denoiser_calls, context_calls,
blocks (for each block, the positions still masked before each denoiser call), seconds,
finish_reason. With --json and --stream, one object for each block comes before it, on a line each.
What is left out is the server's choice: its defaults are those of `twotower run`.
"""


@click.command(epilog=EPILOG)
@click.argument("prompt", required=False)
@click.option("--prompt-ids", metavar="5,6,7", help="Token ids to continue, instead of PROMPT.")
@click.option("--url", default="localhost:8001", show_default=True, help="The server's gRPC port.")
@click.option("--stream", "streamed", is_flag=True, help="Print each block when it is committed.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end.")
@click.option("--max-new-tokens", type=int, help="Length of the answer.")
@click.option("--mode", help="mask_diffusion, ar (context tower alone), or mock_ar.")
@click.option("--block-size", type=int, help="Tokens that are denoised together.")
@click.option("--steps", type=int, help="Most denoiser calls per block.")
@click.option("--threshold", type=float, help="Commit above this confidence.")
@click.option("--policy", help="threshold, quota, factor, entropy, or leftmost.")
@click.option("--temperature", type=float, help="0 is greedy.")
@click.option("--top-k", type=int, help="ar, mock_ar; 0 keeps all.")
@click.option("--top-p", type=float, help="ar, mock_ar.")
@click.option("--seed", type=int, help="Of all that is drawn.")
@click.option("--eos-id", "eos_ids", type=int, multiple=True, help="Ends the answer. Repeatable.")
@click.option(
    "--timeout", type=float, default=300, show_default=True, help="Seconds for the whole answer."
)
@click.option(
    "--inactivity-timeout",
    type=float,
    default=60,
    show_default=True,
    help="Seconds without anything new.",
)
def generate(
    prompt: str | None,
    prompt_ids: str | None,
    url: str,
    streamed: bool,
    as_json: bool,
    timeout: float,
    inactivity_timeout: float,
    **given: Any,
) -> None:
    """Continue PROMPT with the model of a running server."""
    from twotower_client.client import TwoTowerClient

    options = {name: value for name, value in given.items() if value not in (None, ())}
    prompt, ids = _prompt(prompt, prompt_ids)
    with (
        TwoTowerClient(url, timeout=timeout, inactivity_timeout=inactivity_timeout) as client,
        client.stream(prompt, prompt_ids=ids, **options) as stream,
    ):
        for block in stream:
            if as_json and streamed:
                values = {"text": block.text, "ids": block.ids, "masked": block.masked_counts}
                print(json.dumps({"event": "block", **values}), flush=True)
            elif streamed:
                print(block.text, end="", flush=True)
        answer = stream.answer()
    if MASK_ID in answer.prompt_ids:
        # harmless to the towers, which mask by position, but surely not what was meant
        print("warning: the prompt holds the mask token and is read as such", file=sys.stderr)
    if as_json:
        print(json.dumps(_as_json(answer)))
    else:
        print("" if streamed else answer.text)
        print(_summary(answer), file=sys.stderr)


def _prompt(text: str | None, ids: str | None) -> tuple[str | None, list[int] | None]:
    """Return the prompt as text or as ids, whichever was given."""
    if text is None and ids is None:
        raise RequestRefusedError("there is no prompt; give PROMPT or --prompt-ids 5,6,7")
    if text is not None and ids is not None:
        raise RequestRefusedError("PROMPT and --prompt-ids are both given; leave one of them out")
    return (None, _parse_ids(ids)) if ids is not None else (_as_utf8(text or ""), None)


def _as_utf8(argument: str) -> str:
    """Return what a terminal sent as the UTF-8 that it is, whatever the locale calls it.

    Python keeps the bytes of an argument that its locale (C, for one) cannot read as surrogates.
    """
    try:
        argument.encode()
    except UnicodeEncodeError:
        try:
            return os.fsencode(argument).decode()
        except UnicodeError as problem:
            raise RequestRefusedError(
                f"PROMPT is not valid UTF-8 ({problem}); give it as UTF-8"
            ) from None
    return argument


def _parse_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")] if text.strip() else []
    except ValueError:
        raise RequestRefusedError(
            f"--prompt-ids is {text!r}; give whole numbers with commas between them, as 5,6,7"
        ) from None


def _as_json(answer: Answer) -> dict[str, object]:
    return {
        "output_ids": answer.output_ids,
        "text": answer.text,
        "denoiser_calls": answer.denoiser_calls,
        "context_calls": answer.context_calls,
        "blocks": [block.masked_counts for block in answer.blocks if block.masked_counts],
        "seconds": round(answer.seconds, 6),
        "finish_reason": answer.finish_reason,
    }


def _summary(answer: Answer) -> str:
    """Return one line of figures for people."""
    count = len(answer.ids)
    parts = [
        f"{_number(count, 'token')} in {answer.seconds:.2f} s "
        f"({count / answer.seconds:.1f} tokens/s)",
        _number(answer.denoiser_calls, "denoiser call"),
        _number(answer.context_calls, "context call"),
        f"ended by {answer.finish_reason}",
    ]
    rate = answer.tokens_per_denoiser_call
    if rate is not None:
        parts[1] += f" ({rate:.2f} tokens per call)"
    return ", ".join(parts)


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
