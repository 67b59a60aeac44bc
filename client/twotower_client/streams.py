"""The standard streams of the command line: closed ones, full ones, quiet ones, and the log."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import click

from twotower_contract.logfile import FILE_VARIABLE, VERBOSE_VARIABLE, log

REDRAWN = re.compile(r"\r(\x1b\[K)?")


def open_closed() -> None:
    """Open what the caller closed (`2>&-`), so that no file that is opened later takes its place.

    Letters that the terminal lacks are written as escapes: an answer may hold them.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(
                sys, name, io.TextIOWrapper(io.FileIO(os.devnull, "r" if name == "stdin" else "w"))
            )
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def flush_output() -> str | None:
    """Write what is still to be written; returns why that failed, or None."""
    try:
        sys.stdout.flush()
    except OSError as problem:
        with contextlib.suppress(OSError):  # or Python would try again, and say so
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return problem.strerror
    return None


def say_last(text: str) -> None:
    """Say why the command ends, `--quiet` or not."""
    stream = sys.stderr.stream if isinstance(sys.stderr, _Told) else sys.stderr
    log("twotower", text)
    with contextlib.suppress(OSError):  # nobody can be told
        print(text, file=stream, flush=True)


def add_options(command: click.Command) -> click.Command:
    """Give a verb the options that all have; its own come first."""
    own = {name for parameter in command.params for name in parameter.opts}
    if "--quiet" in own:
        return command
    added = [
        _option(_be_verbose, "-v", "--verbose", "Show the traceback of errors, too; log details."),
        _option(_be_quiet, "-q", "--quiet", "Print the result and errors alone."),
    ]
    if "--log" not in own:
        help_ = "Append all messages to FILE, and what libraries say."
        log_type = click.Path(dir_okay=False, resolve_path=True)
        added.append(_option(_keep_log, "--log", help=help_, metavar="FILE", type=log_type))
    command.params += added
    return command


def _option(act: Callable[..., None], *names_and_help: str, **settings: Any) -> click.Option:
    names = [name for name in names_and_help if name.startswith("-")]
    if "type" not in settings:
        settings |= {"is_flag": True, "help": names_and_help[-1]}
    return click.Option(names, expose_value=False, is_eager=True, callback=act, **settings)


def _be_verbose(ctx: click.Context, parameter: click.Parameter, is_given: bool) -> None:
    if is_given:
        os.environ[VERBOSE_VARIABLE] = "1"


def _be_quiet(ctx: click.Context, parameter: click.Parameter, is_given: bool) -> None:
    if is_given:
        _tell().is_quiet = True


def _keep_log(ctx: click.Context, parameter: click.Parameter, path: str | None) -> None:
    if path is not None:
        with Path(path).open("a"):  # one that cannot be written is refused now
            os.environ[FILE_VARIABLE] = path
    if os.environ.get(FILE_VARIABLE):
        _tell()


def _tell() -> _Told:
    """Return our standard error, put in the place of Python's the first time."""
    if not isinstance(sys.stderr, _Told):
        sys.stderr = _Told(sys.stderr)
    return sys.stderr


class _Told(io.TextIOBase):
    """Standard error that can be quiet and that the log has a copy of."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.is_quiet = stream, False

    def write(self, text: str) -> int:
        if not self.is_quiet:
            self.stream.write(text)
        log("twotower", REDRAWN.sub("\n", text))
        return len(text)

    def flush(self) -> None:
        self.stream.flush()

    def isatty(self) -> bool:
        return self.stream.isatty() and not self.is_quiet

    def fileno(self) -> int:
        return self.stream.fileno()
