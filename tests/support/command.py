"""The command line in this process: what a shell would see, without the start of a Python.

A start costs 0.2 s, and 3 s for a verb that imports torch. Whatever is about processes (signals,
standard streams, what is imported) runs `TWOTOWER` as a process.
"""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from tests.support import TWOTOWER
from twotower_client import cli


def twotower(
    *words: Any, cwd: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a verb; a bug's exception leaves this function.

    Args:
        *words: Arguments, as text or as what has a text.
        cwd: Folder to run in.
        **variables: More variables of the environment.
    """
    arguments = [str(word) for word in words]
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["twotower", *arguments]),
        mock.patch.dict(os.environ, variables),
        mock.patch.multiple(cli, open_closed=mock.DEFAULT, interruptible=mock.DEFAULT),
        contextlib.chdir(cwd or Path.cwd()),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.main()
            code = 0
        except SystemExit as ended:
            code = ended.code or 0
    return subprocess.CompletedProcess(
        [*TWOTOWER, *arguments], code, out.getvalue(), err.getvalue()
    )
