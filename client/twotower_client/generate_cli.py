"""The verb `twotower generate`: asks a running server for an answer."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import click

from twotower_client.access_cli import ACCESS, access_options, connect
from twotower_client.errors import ClientError, RequestRefusedError
from twotower_client.result import Answer, details_as_json
from twotower_contract.command_line import (
    JSON_HELP,
    Outcome,
    check_showing,
    given_options,
    output_file,
    prompt_ids_option,
    read_prompt,
    request_options,
    showing,
    showing_options,
    warn_of_mask,
)
from twotower_contract.live import LiveView
from twotower_contract.replay import Replay, Token, tokens_of

MASK_ID = 3  # of the released model; a server does not say which it is

EPILOG = f"""\b
Examples:
  twotower generate "Mia the fox lived by the river." --url localhost:8001
  twotower generate "Mia the fox" --stream --threshold 0.8 --max-new-tokens 128
  twotower generate --prompt-ids 5,6,7 --mode ar --temperature 0.7 --top-p 0.9 --json
  twotower generate "Mia the fox" --live --html replay.html
  twotower generate --input prompts.jsonl --output answers.jsonl --concurrency 32

The answer goes to standard output, figures to standard error. {JSON_HELP} With --json and --stream,
one object for each block comes before it, on a line each. An option that is left out is the
server's choice; the defaults above are those of a server of this version.
"""


class AnswersFailedError(ClientError):
    """Some prompts of a file have no answer."""

    exit_code = 1


@click.command(epilog=EPILOG)
@click.argument("prompt", required=False)
@access_options
@click.option(
    "--input",
    "source",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Answer every prompt of FILE: a text a line, or .jsonl objects with prompt or prompt_ids "
    "and options of their own.",
)
@click.option(
    "--output",
    "target",
    type=click.Path(path_type=Path, dir_okay=False),
    callback=output_file,
    help="File of the answers to --input, one JSON object a line. A run that was ended goes on.",
)
@click.option(
    "--concurrency",
    type=click.IntRange(min=1),
    default=16,
    help="Requests of --input under way at a time.",
)
@click.option(
    "--attempts",
    type=click.IntRange(min=1),
    default=5,
    help="Most times that a request of --input is sent, where a server is busy or away.",
)
@click.option("--stream", "streamed", is_flag=True, help="Print each block when it is committed.")
@prompt_ids_option
@request_options
@showing_options
@click.option("--timeout", type=float, default=300, help="Seconds that the whole answer may take.")
@click.option(
    "--inactivity-timeout",
    type=float,
    default=60,
    help="Seconds without anything new after which the answer is given up.",
)
def generate(
    prompt: str | None,
    prompt_ids: str | None,
    source: Path | None,
    target: Path | None,
    concurrency: int,
    attempts: int,
    streamed: bool,
    as_json: bool,
    live: bool,
    html: Path | None,
    timeout: float,
    inactivity_timeout: float,
    **options: Any,
) -> None:
    """Continue PROMPT with the model of a running server."""
    access = {name: options.pop(name) for name in ACCESS}
    limits = {"timeout": timeout, "inactivity_timeout": inactivity_timeout}
    if source is not None or target is not None:
        if prompt is not None or prompt_ids is not None or source is None or target is None:
            raise RequestRefusedError("give --input and --output together, and no other prompt")
        _answer_file(access, limits, source, target, concurrency, attempts, given_options(options))
        return
    check_showing(live, as_json, RequestRefusedError)
    text, ids = read_prompt(prompt, prompt_ids, "PROMPT", RequestRefusedError)
    options = showing(given_options(options), live, html)
    view = LiveView(sys.stdout, live) if (streamed or live) and not as_json else None
    with (
        connect(access, **limits) as client,
        client.stream(text, prompt_ids=ids, **options) as stream,
    ):
        if view is not None:
            stream.on_canvas = lambda canvas: view.canvas(canvas.tokens)
        for block in stream:
            if as_json and streamed:
                values = {"text": block.text, "ids": block.ids, "masked": block.masked_counts}
                print(json.dumps({"event": "block", **values}), flush=True)
            elif view is not None:
                view.commit(block.text)
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
    figures = outcome.figures(len(answer.prompt_ids))
    if html is not None:
        prompt = text or " ".join(map(str, answer.prompt_ids))
        Replay(prompt, replay_blocks(answer), figures).write(html)
    if as_json:
        told = details_as_json(answer.details)
        print(outcome.as_json(reused_tokens=answer.reused_tokens, **told))
        return
    if view is not None:
        view.finish()
    else:
        print(answer.text)
    print(figures, file=sys.stderr)


def replay_blocks(answer: Answer) -> list[tuple[Token, ...]]:
    """Return the tokens of an answer whose request asked for logprobs, block by block."""
    return [
        tokens_of(
            [one.text for one in block.details],
            [one.call - 1 for one in block.details],
            [one.logprob for one in block.details],
            is_denoised=bool(block.masked_counts),
        )
        for block in answer.blocks
    ]


def _answer_file(
    access: dict[str, Any],
    limits: dict[str, float],
    source: Path,
    target: Path,
    concurrency: int,
    attempts: int,
    options: dict[str, Any],
) -> None:
    """Answer every prompt of a file.

    Args:
        access: As for `connect`; the address may be several, with commas between.
        limits: Timeouts of the clients.
        source: File of prompts.
        target: File of answers.
        concurrency: Requests under way at a time.
        attempts: Most times that a request is sent.
        options: Options of every request.

    Raises:
        AnswersFailedError: Some failed; the file says why.
    """
    from twotower_client.batch_file import answer_file
    from twotower_client.many import Batch
    from twotower_client.retry import Retry, Servers

    with contextlib.ExitStack() as stack:
        clients = [connect({**access, "url": url}, **limits) for url in access["url"].split(",")]
        for client in clients:
            stack.enter_context(client)
        batch = Batch(Servers(clients), concurrency, Retry(attempts=attempts))
        counts = answer_file(batch, source, target, options)
    before = f", {counts.before} of them before" if counts.before else ""
    print(f"{counts.prompts - counts.failed} answered{before}: {target}", file=sys.stderr)
    if counts.failed:
        raise AnswersFailedError(
            f"{counts.failed} of {counts.prompts} prompts have no answer; {target} says why, and "
            "the same call asks for them again"
        )
