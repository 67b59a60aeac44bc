"""The verb `twotower run`: generation without a server."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from twotower_contract.errors import EngineSetError
from twotower_engines.errors import RequestError, TokenizerError

if TYPE_CHECKING:
    from twotower_contract.engine_set import EngineSet
    from twotower_engines.artifacts.tokenizer import Tokenizer
    from twotower_engines.generation.generator import Result
    from twotower_engines.generation.request import Request

EPILOG = """\b
Examples:
  twotower run checkpoint --prompt "Mia the fox lived by the river."
  twotower run engines --prompt "Mia the fox" --threshold 0.8 --max-new-tokens 128
  twotower run engines --prompt-ids 5,6,7 --mode ar --temperature 0.7 --top-p 0.9 --json

The answer goes to standard output as it is made, figures to standard error. With --json one object
is printed at the end: output_ids (the prompt included), text (of the new tokens), denoiser_calls,
context_calls, blocks (for each block, the positions still masked before each denoiser call),
seconds, finish_reason.
"""


@click.command(epilog=EPILOG)
@click.argument("source", metavar="CHECKPOINT|ENGINES")
@click.option("--prompt", help="Text to continue.")
@click.option("--prompt-ids", metavar="5,6,7", help="Token ids to continue.")
@click.option(
    "--mode",
    default="mask_diffusion",
    show_default=True,
    help="mask_diffusion, ar (context tower alone), or mock_ar (both, token by token).",
)
@click.option("--max-new-tokens", type=int, default=64, show_default=True)
@click.option("--block-size", type=int, default=16, show_default=True, help="Denoised together.")
@click.option("--steps", type=int, default=16, show_default=True, help="Most calls per block.")
@click.option(
    "--threshold", type=float, default=0.9, show_default=True, help="Commit above this confidence."
)
@click.option(
    "--policy",
    default="threshold",
    show_default=True,
    help="What a step commits: threshold, quota, factor, entropy, or leftmost.",
)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", type=int, default=0, show_default=True, help="ar, mock_ar; 0 keeps all.")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="ar, mock_ar.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--eos-id", "eos_ids", type=int, multiple=True, help="Ends the answer. Repeatable.")
@click.option("--sku", help="Which engines, where ENGINES holds several.")
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="Where the checkpoint is now, if it was moved after the export.",
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [one per core]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end.")
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
    prompt, ids = _prompt(prompt, prompt_ids)
    _check_options(options)
    engines, checkpoint = _engines_of(source, sku, checkpoint)
    request, tokenizer = _request(engines, prompt, ids, options)
    result, text = _answer(engines, request, tokenizer, checkpoint, threads, echo=not as_json)
    if as_json:
        print(json.dumps(_as_json(result, text)))
    else:
        print(_summary(request, result), file=sys.stderr)


def _prompt(text: str | None, ids: str | None) -> tuple[str | None, tuple[int, ...]]:
    """Return the prompt as text, or else as ids; refuse one that is empty before any work."""
    if text is None and ids is None:
        raise RequestError("there is no prompt; give --prompt TEXT or --prompt-ids 5,6,7")
    if text is not None and ids is not None:
        raise RequestError("--prompt and --prompt-ids are both given; leave one of them out")
    if not (text or (ids or "").strip()):
        raise RequestError("the prompt is empty; give at least one token")
    return (None, _parse_ids(ids)) if ids is not None else (_as_utf8(text or ""), ())


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
            raise RequestError(
                f"--prompt is not valid UTF-8 ({problem}); give it as UTF-8"
            ) from None
    return argument


def _check_options(options: dict[str, Any]) -> None:
    """Refuse options that no engines take, before a checkpoint is exported and built for them."""
    from twotower_engines.generation.request import Request

    Request("run", (), **options).check_options()


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
    if engines.manifest.model.mask_token_id in ids:
        # harmless to the towers, which mask by position, but surely not what was meant
        print("warning: the prompt holds the mask token and is read as such", file=sys.stderr)
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


def _parse_ids(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",")) if text.strip() else ()
    except ValueError:
        raise RequestError(
            f"--prompt-ids is {text!r}; give whole numbers with commas between them, as 5,6,7"
        ) from None


def _answer(
    engines: EngineSet,
    request: Request,
    tokenizer: Tokenizer | None,
    checkpoint: Path | None,
    threads: int | None,
    echo: bool,
) -> tuple[Result, str | None]:
    """Generate; with `echo`, print each piece as it comes."""
    import time

    from twotower_engines.artifacts.tokenizer import TextStream
    from twotower_engines.generation.generator import Generator, result_of
    from twotower_engines.runtime.progress import ByteMeter

    stream = TextStream(tokenizer) if tokenizer is not None else None
    events, pieces = [], []
    with Generator(engines, checkpoint, threads, ByteMeter("binding weights")) as generator:
        start = time.perf_counter()
        for event in generator.stream(request):
            events.append(event)
            if stream is not None:
                piece = stream.push(event.ids) + (stream.finish() if event.is_last else "")
                pieces.append(piece)
            else:
                piece = "".join(f"{token} " for token in event.ids)
            if echo:
                print(piece, end="", flush=True)
        seconds = time.perf_counter() - start
    if echo:
        print()
    return result_of(request, events, seconds), "".join(pieces) if stream is not None else None


def _as_json(result: Result, text: str | None) -> dict[str, object]:
    return {
        "output_ids": result.output_ids,
        "text": text,
        "denoiser_calls": result.denoiser_calls,
        "context_calls": result.context_calls,
        "blocks": result.blocks,
        "seconds": round(result.seconds, 6),
        "finish_reason": result.finish_reason,
    }


def _summary(request: Request, result: Result) -> str:
    """Return one line of figures for people."""
    count = len(result.output_ids) - len(request.prompt_ids)
    parts = [
        f"{_number(count, 'token')} in {result.seconds:.2f} s "
        f"({count / result.seconds:.1f} tokens/s)",
        _number(result.denoiser_calls, "denoiser call"),
        _number(result.context_calls, "context call"),
        f"ended by {result.finish_reason}",
    ]
    if result.denoiser_calls:
        parts[1] += f" ({count / result.denoiser_calls:.2f} tokens per call)"
    return ", ".join(parts)


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
