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
    check_showing,
    given_options,
    prompt_ids_option,
    read_prompt,
    request_options,
    showing,
    showing_options,
    warn_of_mask,
)
from twotower_contract.errors import EngineSetError
from twotower_contract.live import LiveView
from twotower_contract.options import DIFFUSION
from twotower_contract.replay import Replay, Token, tokens_of
from twotower_engines.cli.options import opening_options
from twotower_engines.errors import RequestError, TokenizerError

if TYPE_CHECKING:
    from twotower_contract.engine_set import EngineSet
    from twotower_engines.artifacts.tokenizer import Tokenizer
    from twotower_engines.generation.request import BlockEvent, Request

EPILOG = f"""\b
Examples:
  twotower run checkpoint --prompt "Mia the fox lived by the river."
  twotower run engines --prompt "Mia the fox" --threshold 0.8 --max-new-tokens 128
  twotower run engines --prompt-ids 5,6,7 --mode ar --temperature 0.7 --top-p 0.9 --json
  twotower run engines --prompt "Mia the fox" --live --html replay.html

The answer goes to standard output as it is made, figures to standard error. {JSON_HELP}
"""


@click.command(epilog=EPILOG)
@click.argument("source", metavar="CHECKPOINT|ENGINES")
@click.option("--prompt", help="Text to continue.")
@prompt_ids_option
@request_options
@showing_options
@opening_options
@click.option("--int8", is_flag=True, help="Multiply in 8 bits on the CPU: faster, less exact.")
def run(
    source: str,
    prompt: str | None,
    prompt_ids: str | None,
    sku: str | None,
    checkpoint: Path | None,
    threads: int | None,
    int8: bool,
    as_json: bool,
    live: bool,
    html: Path | None,
    **options: Any,
) -> None:
    """Continue a prompt on this machine.

    A CHECKPOINT (folder or hub id) is exported and built for the CPU first, into a cache.
    """
    from twotower_engines.generation.request import Request

    options = showing(given_options(options), live, html)
    check_showing(live, as_json, RequestError)
    text, ids = read_prompt(prompt, prompt_ids, "--prompt", RequestError)
    # What no engines take is refused before a checkpoint is exported and built for it.
    Request("run", (), **options).check_options()
    engines, checkpoint = _engines_of(source, sku, checkpoint)
    request, tokenizer = _request(engines, text, ids or (), options)
    view = None if as_json else LiveView(sys.stdout, live)
    outcome, blocks, told = _answer(engines, request, tokenizer, checkpoint, threads, int8, view)
    figures = outcome.figures(len(request.prompt_ids))
    if html is not None:
        Replay(text or " ".join(map(str, request.prompt_ids)), blocks, figures).write(html)
    if as_json:
        print(outcome.as_json(**told))
    else:
        print(figures, file=sys.stderr)


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
    int8: bool,
    view: LiveView | None,
) -> tuple[Outcome, list[tuple[Token, ...]], dict[str, list[Any]]]:
    """Generate, and show each piece as it comes.

    Returns:
        The answer; where the request asks to be told of its tokens, these by blocks, and what is
        told of them by the names of a server's outputs.
    """
    import time

    from twotower_engines.generation.generator import Generator, result_of
    from twotower_engines.generation.request import token_outputs
    from twotower_engines.runtime.progress import ByteMeter

    words = _Words(tokenizer, engines.manifest.model.mask_token_id)
    events, pieces, blocks = [], [], []
    meter = ByteMeter("binding weights")
    with Generator(engines, checkpoint, threads, meter, tokenizer, int8) as generator:
        start = time.perf_counter()
        for event in generator.stream(request):
            if event.canvas:
                if view is not None:
                    view.canvas(words.canvas(event))
                continue
            events.append(event)
            blocks.append(words.tokens(event, request))
            pieces.append(words.piece(event))
            if view is not None:
                view.commit(pieces[-1])
        seconds = time.perf_counter() - start
    if view is not None:
        view.finish()
    result = result_of(request, events, seconds)
    text = "".join(pieces) if tokenizer is not None else None
    told = token_outputs([one for event in events for one in event.details])
    if tokenizer is not None:
        told["token_texts"] = [token.text for block in blocks for token in block]
    told = {name: values for name, values in told.items() if values}
    return Outcome(text=text, **asdict(result)), blocks, told


class _Words:
    """Ids of one answer as words, in their order; the ids themselves where there is no tokenizer.

    Args:
        tokenizer: The engines' tokenizer, if any.
        mask_id: The mask token.
    """

    def __init__(self, tokenizer: Tokenizer | None, mask_id: int) -> None:
        from twotower_engines.artifacts.tokenizer import TextStream

        self._tokenizer, self._mask_id = tokenizer, mask_id
        self._stream = TextStream(tokenizer) if tokenizer is not None else None
        self._ids: tuple[int, ...] = ()

    def piece(self, event: BlockEvent) -> str:
        """Return the text that a block adds."""
        self._ids += event.ids
        if event.text is not None:
            return event.text
        if self._stream is None:
            return "".join(f"{token} " for token in event.ids)
        return self._stream.push(event.ids) + (self._stream.finish() if event.is_last else "")

    def tokens(self, event: BlockEvent, request: Request) -> tuple[Token, ...]:
        """Return the tokens that a block adds, where the request asks to be told of them."""
        from twotower_engines.artifacts.tokenizer import token_texts

        if self._tokenizer is None:
            texts = [f"{token} " for token in event.ids]
        else:
            texts = token_texts(self._tokenizer, self._ids, event.ids, event.is_last)
        details = event.details
        steps, logprobs = [one.step for one in details], [one.logprob for one in details]
        is_denoised = request.mode in DIFFUSION
        return tokens_of(texts, steps, logprobs, is_denoised) if details else ()

    def canvas(self, event: BlockEvent) -> list[tuple[str, float | None] | None]:
        """Return what a block shows that is not finished."""
        from twotower_engines.artifacts.tokenizer import canvas_texts

        if self._tokenizer is None:
            texts = [None if one == self._mask_id else f"{one} " for one in event.canvas]
        else:
            texts = canvas_texts(self._tokenizer, event.canvas, self._mask_id)
        pairs = zip(texts, event.canvas_confidence, strict=True)
        return [None if text is None else (text, confidence) for text, confidence in pairs]
