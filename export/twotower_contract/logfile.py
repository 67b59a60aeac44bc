"""The log that `--log FILE` asks for: all that is said on standard error, and what libraries say.

The options are handed to every process of a command by variables of its environment, so that its
children and their workers write into the same file, a line at a time.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from pathlib import Path

FILE_VARIABLE = "TWOTOWER_LOG"
VERBOSE_VARIABLE = "TWOTOWER_VERBOSE"


def is_verbose() -> bool:
    """Whether `-v` asks for details."""
    return bool(os.environ.get(VERBOSE_VARIABLE))


def log(source: str, text: str) -> None:
    """Append lines to the log, each with the time and its source; nothing where there is no log.

    A log that cannot be written any more (a full disk) disturbs no work.
    """
    path = os.environ.get(FILE_VARIABLE)
    if not path:
        return
    now = datetime.datetime.now().astimezone().isoformat(timespec="milliseconds")
    lines = "".join(f"{now} {source}: {line}\n" for line in text.splitlines() if line.strip())
    with contextlib.suppress(OSError), Path(path).open("a", encoding="utf-8") as file:
        file.write(lines)
