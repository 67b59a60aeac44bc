"""The verb `twotower generate`: asks a running server for an answer."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from twotower_client.access_cli import ACCESS, access_options, connect
from twotower_client.errors import RequestRefusedError
from twotower_contract.command_line import (
    JSON_HELP,
    Outcome,
    given_options,
    read_prompt,
    request_options,
    warn_of_mask,
)

MASK_ID = 3  # of the released model; a server does not say which it is

EPILOG = f"""\b
Examples:
  twotower generate "Mia the fox lived by the river." --url localhost:8001
  twotower generate "Mia the fox" --stream --threshold 0.8 --max-new-tokens 128
  twotower generate --prompt-ids 5,6,7 --mode ar --temperature 0.7 --top-p 0.9 --json

The answer goes to standard output, figures to standard error. {JSON_HELP} With --json and --stream,
one object for each block comes before it, on a line each. An option that is left out is the
server's choice; the defaults above are those of a server of this version.
"""


@click.command(epilog=EPILOG)
@click.argument("prompt", required=False)
@access_options
@click.option("--stream", "streamed", is_flag=True, help="Print each block when it is committed.")
@request_options
@click.option(
    "--timeout",
    type=float,
    default=300,
    show_default=True,
    help="Seconds that the whole answer may take.",
)
@click.option(
    "--inactivity-timeout",
    type=float,
    default=60,
    show_default=True,
    help="Seconds without anything new after which the answer is given up.",
)
def generate(
    prompt: str | None,
    prompt_ids: str | None,
    streamed: bool,
    as_json: bool,
    timeout: float,
    inactivity_timeout: float,
    **options: Any,
) -> None:
    """Continue PROMPT with the model of a running server."""
    access = {name: options.pop(name) for name in ACCESS}
    text, ids = read_prompt(prompt, prompt_ids, "PROMPT", RequestRefusedError)
    with (
        connect(**access, timeout=timeout, inactivity_timeout=inactivity_timeout) as client,
        client.stream(text, prompt_ids=ids, **given_options(options)) as stream,
    ):
        for block in stream:
            if as_json and streamed:
                values = {"text": block.text, "ids": block.ids, "masked": block.masked_counts}
                print(json.dumps({"event": "block", **values}), flush=True)
            elif streamed:
                print(block.text, end="", flush=True)
        answer = stream.answer()
    warn_of_mask(answer.prompt_ids, MASK_ID)
    outcome = Outcome(
        output_ids=answer.output_ids,
        text=answer.text,
        denoiser_calls=answer.denoiser_calls,
        context_calls=answer.context_calls,
        blocks=tuple(block.masked_counts for block in answer.blocks if block.masked_counts),
        seconds=answer.seconds,
        finish_reason=answer.finish_reason,
    )
    if as_json:
        print(outcome.as_json())
    else:
        print("" if streamed else answer.text)
        print(outcome.figures(len(answer.prompt_ids)), file=sys.stderr)
