"""Errors that a user can cause and repair: what was wrong, with which value, and what to do.

The command line prints the message without a traceback and exits with `exit_code`. Every package
derives its own errors from `TwoTowerError`; anything else that escapes is a bug and keeps its
traceback.
"""

from __future__ import annotations

from collections.abc import Sequence

LISTED_AT_MOST = 10


class TwoTowerError(Exception):
    """Base of every error that a user can repair.

    Attributes:
        exit_code: Exit status of the command line when the error ends it.
    """

    exit_code: int = 2

    def __str__(self) -> str:
        """Return the message; what a file's author put into a name cannot steer a terminal."""
        return "\n".join(map(printable, super().__str__().split("\n")))


class DryRunEndsError(TwoTowerError):
    """Everything was checked, and nothing is written, as `--dry-run` asks; not a failure."""

    exit_code = 0


class ConfigError(TwoTowerError):
    """`config.json` is unreadable or describes a model that the towers do not implement."""


class CheckpointError(TwoTowerError):
    """A checkpoint is missing, broken, or not the one that was asked for."""


class BundleError(TwoTowerError):
    """A bundle could not be written or read, or does not belong to a checkpoint."""


class EngineSetError(TwoTowerError):
    """A folder is no engine set, or its files do not match its build record."""


def listed(problems: Sequence[str]) -> str:
    """Return at most ten of the problems, and how many there are in all."""
    shown = "; ".join(problems[:LISTED_AT_MOST])
    if len(problems) <= LISTED_AT_MOST:
        return shown
    return f"{shown}; and {len(problems) - LISTED_AT_MOST} more ({len(problems)} in all)"


def printable(text: str) -> str:
    """Return a text with control characters, and letters that turn its direction, as escapes."""
    return "".join(
        one if one == " " or one.isprintable() else one.encode("unicode_escape").decode()
        for one in text
    )
