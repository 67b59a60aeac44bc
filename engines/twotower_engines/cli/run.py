"""The verb `twotower run`: generation without a server."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from twotower_contract.command_line import (
    JSON_HELP,
    Outcome,
    given_options,
    read_prompt,
    request_options,
    warn_of_mask,
)
from twotower_contract.errors import EngineSetError
from twotower_engines.errors import RequestError, TokenizerError

if TYPE_CHECKING:
    from twotower_contract.engine_set import EngineSet
    from twotower_engines.artifacts.tokenizer import Tokenizer
    from twotower_engines.generation.request import Request

EPILOG = f"""\b
Examples:
  twotower run checkpoint --prompt "Mia the fox lived by the river."
  twotower run engines --prompt "Mia the fox" --threshold 0.8 --max-new-tokens 128
  twotower run engines --prompt-ids 5,6,7 --mode ar --temperature 0.7 --top-p 0.9 --json

The answer goes to standard output as it is made, figures to standard error. {JSON_HELP}
"""


@click.command(epilog=EPILOG)
@click.argument("source", metavar="CHECKPOINT|ENGINES")
@click.option("--prompt", help="Text to continue.")
@request_options
@click.option("--sku", help="SKU of the engines, where ENGINES holds several.")
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="Folder of the checkpoint, if it was moved after the export.",
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [one per core]")
def run(
    source: str,
    prompt: str | None,
    prompt_ids: str | None,
    sku: str | None,
    checkpoint: Path | None,
    threads: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Continue a prompt on this machine.

    A CHECKPOINT (folder or hub id) is exported and built for the CPU first, into a cache.
    """
    from twotower_engines.generation.request import Request

    options = given_options(options)
    text, ids = read_prompt(prompt, prompt_ids, "--prompt", RequestError)
    # What no engines take is refused before a checkpoint is exported and built for it.
    Request("run", (), **options).check_options()
    engines, checkpoint = _engines_of(source, sku, checkpoint)
    request, tokenizer = _request(engines, text, ids or (), options)
    outcome = _answer(engines, request, tokenizer, checkpoint, threads, echo=not as_json)
    if as_json:
        print(outcome.as_json())
    else:
        print(outcome.figures(len(request.prompt_ids)), file=sys.stderr)


def _engines_of(
    source: str, sku: str | None, checkpoint: Path | None
) -> tuple[EngineSet, Path | None]:
    """Open the engines that SOURCE names, making them first where it is a checkpoint."""
    from twotower_contract.engine_set import BUILD_FILE, open_engine_set
    from twotower_contract.manifest import MANIFEST_FILE
    from twotower_engines.building.checkpoint_engines import cached_engines, is_hub_id

    path = Path(source)
    if (path / BUILD_FILE).is_file() or any(path.glob(f"*/{BUILD_FILE}")):
        return open_engine_set(path, sku), checkpoint
    if (path / MANIFEST_FILE).is_file():
        raise EngineSetError(
            f"{path}: is a bundle; build it first with `twotower build {path} --sku cpu ENGINES`"
        )
    if not path.is_dir() and not is_hub_id(source):
        raise EngineSetError(f"{path}: no such folder; name a checkpoint or an engine set")
    engines = open_engine_set(cached_engines(source))
    # the cache may have been filled from a copy that is gone
    return engines, checkpoint or (path.resolve() if path.is_dir() else None)


def _request(
    engines: EngineSet, prompt: str | None, ids: tuple[int, ...], options: dict[str, Any]
) -> tuple[Request, Tokenizer | None]:
    """Make and check the request before anything heavy is loaded."""
    from twotower_engines.generation.request import Request, RequestLimits

    tokenizer = _tokenizer(engines, is_needed=prompt is not None)
    if prompt is not None:
        assert tokenizer is not None, "one that is needed is there, or refused"
        ids = tokenizer.encode(prompt)
    request = Request("run", ids, **options)
    request.check(RequestLimits.of_engines(engines))
    warn_of_mask(ids, engines.manifest.model.mask_token_id)
    return request, tokenizer


def _tokenizer(engines: EngineSet, is_needed: bool) -> Tokenizer | None:
    """Return the tokenizer; None where ids are given and there is none that can be read."""
    from twotower_engines.artifacts.tokenizer import Tokenizer

    if not is_needed and not Tokenizer.exists(engines.folder):
        return None
    try:
        return Tokenizer(engines.folder)
    except TokenizerError as problem:
        if is_needed:
            raise
        print(f"warning: the answer has no text: {problem}", file=sys.stderr)
        return None


def _answer(
    engines: EngineSet,
    request: Request,
    tokenizer: Tokenizer | None,
    checkpoint: Path | None,
    threads: int | None,
    echo: bool,
) -> Outcome:
    """Generate; with `echo`, print each piece as it comes."""
    import time

    from twotower_engines.artifacts.tokenizer import TextStream
    from twotower_engines.generation.generator import Generator, result_of
    from twotower_engines.runtime.progress import ByteMeter

    stream = TextStream(tokenizer) if tokenizer is not None else None
    events, pieces = [], []
    meter = ByteMeter("binding weights")
    with Generator(engines, checkpoint, threads, meter, tokenizer) as generator:
        start = time.perf_counter()
        for event in generator.stream(request):
            events.append(event)
            if event.text is not None:
                piece = event.text
                pieces.append(piece)
            elif stream is not None:
                piece = stream.push(event.ids) + (stream.finish() if event.is_last else "")
                pieces.append(piece)
            else:
                piece = "".join(f"{token} " for token in event.ids)
            if echo:
                print(piece, end="", flush=True)
        seconds = time.perf_counter() - start
    if echo:
        print()
    result = result_of(request, events, seconds)
    return Outcome(text="".join(pieces) if stream is not None else None, **asdict(result))
