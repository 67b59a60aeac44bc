"""A file of prompts in, a file of answers out: `twotower generate --input FILE --output FILE`.

Answers are appended to `OUTPUT.partial` as they come, and a run that was ended goes on from there.
When all are done, OUTPUT is written at once, in the order of the prompts. Lines that failed are in
it with their error; the same call again asks for those alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, cast

from twotower_client.errors import ClientError, RequestRefusedError
from twotower_client.many import Batch, Job
from twotower_client.prompts import Prompt, read_prompts
from twotower_client.request import check_options
from twotower_client.result import Answer, details_as_json
from twotower_contract.atomic import write_text
from twotower_contract.options import OPTIONS, Options
from twotower_contract.progress import StatusLine

LINE, KEY, ERROR = "line", "key", "error"


@dataclass(frozen=True, slots=True)
class Counts:
    """How many prompts a file has, how many were answered before, and how many failed."""

    prompts: int
    before: int
    failed: int


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt of the file with its options, and the key that tells it from any other."""

    prompt: Prompt
    options: dict[str, Any]
    key: str


def answer_file(batch: Batch, source: Path, target: Path, options: Mapping[str, Any]) -> Counts:
    """Answer every prompt of a file.

    Args:
        batch: Threads to answer with.
        source: File of prompts; see `read_prompts`. Options of an object's own go before `options`.
        target: File of the answers, one JSON object a line.
        options: Options of every request.

    Raises:
        RequestRefusedError: A line or option is wrong, or `target` holds something else; nothing
            was sent.
        OSError: A file cannot be read or written.
    """
    if target.exists() and not target.is_file():
        raise RequestRefusedError(
            f"{target}: is no ordinary file, which a run that was ended could go on from; name one"
        )
    requests = [_request(source, one, options) for one in read_prompts(source, tuple(OPTIONS))]
    partial = target.with_name(f"{target.name}.partial")
    known = {**_read(target), **_read(partial)}
    done = {
        request.prompt.line: known[request.prompt.line]
        for request in requests
        if known.get(request.prompt.line, {}).get(KEY) == request.key
        and ERROR not in known[request.prompt.line]
    }
    todo = [request for request in requests if request.prompt.line not in done]
    counts = len(requests), len(done)
    write_text(partial, _text(done.values()))  # without what failed or was cut
    with partial.open("a", encoding="utf-8") as out:
        for line in _answers(batch, todo, out):
            done[line[LINE]] = line
    lines = [done[request.prompt.line] for request in requests]
    write_text(target, _text(lines))
    partial.unlink()
    return Counts(*counts, failed=sum(ERROR in line for line in lines))


def _answers(batch: Batch, todo: list[Request], out: TextIO) -> Iterator[dict[str, Any]]:
    """Ask for each answer, append it to the file, and yield its line; show the progress."""
    jobs = [
        Job(one.prompt.ids or one.prompt.text or "", cast(Options, one.options)) for one in todo
    ]
    progress = StatusLine(10.0)
    failed = 0
    for count, (number, outcome) in enumerate(batch.answers(jobs), 1):
        line = _line(todo[number], outcome)
        print(_text([line]), end="", file=out, flush=True)
        failed += ERROR in line
        if progress.is_due(is_last=count == len(todo)):
            progress.draw(f"{count} of {len(todo)} answered, {failed} of them failed")
        yield line
    progress.clear()


def _request(source: Path, prompt: Prompt, options: Mapping[str, Any]) -> Request:
    given = {**options, **prompt.options}
    try:
        check_options(cast(Options, given))
    except RequestRefusedError as problem:
        raise RequestRefusedError(f"{source}, line {prompt.line}: {problem}") from None
    values = json.dumps([prompt.text, prompt.ids, given], sort_keys=True)
    return Request(prompt, given, hashlib.sha256(values.encode()).hexdigest()[:16])


def _line(request: Request, outcome: Answer | ClientError) -> dict[str, Any]:
    """Return the line of an answer: what its prompt's line holds, and then what came of it."""
    prompt = request.prompt
    given = {"prompt": prompt.text} if prompt.text is not None else {"prompt_ids": prompt.ids}
    line = {**prompt.rest, LINE: prompt.line, KEY: request.key, **given}
    if isinstance(outcome, ClientError):
        return {**line, ERROR: {"kind": type(outcome).__name__, "message": str(outcome)}}
    return {
        **line,
        "text": outcome.text,
        "ids": outcome.ids,
        "finish_reason": outcome.finish_reason,
        "denoiser_calls": outcome.denoiser_calls,
        "seconds": round(outcome.seconds, 6),
        **details_as_json(outcome.details),
    }


def _text(lines: Iterable[dict[str, Any]]) -> str:
    return "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines)


def _read(path: Path) -> dict[int, dict[str, Any]]:
    """Return the lines of an earlier run by their numbers; none where there is no file.

    Raises:
        RequestRefusedError: The file holds something else.
    """
    if not path.exists():
        return {}
    lines = {}
    content = path.read_text(encoding="utf-8").split("\n")
    for number, text in enumerate(content[:-1], 1):  # the last is empty, or was cut by the end
        try:
            line = json.loads(text)
            lines[int(line[LINE])] = line
            line[KEY]
        except (ValueError, TypeError, KeyError):
            raise RequestRefusedError(
                f"{path}, line {number}: was not written by `twotower generate --output`; name "
                "another file"
            ) from None
    return lines
