"""Errors that a user of the engines can cause and repair.

The message of each says what was wrong, with what value, and what to do. The command line prints
it without a traceback and exits with `exit_code`. Anything else that escapes is a bug of ours and
keeps its traceback.
"""

__all__ = [
    "BuildError",
    "BundleError",
    "CheckpointError",
    "EngineSetError",
    "EnginesError",
    "GenerationError",
    "PlanError",
    "RequestError",
    "RuntimeLoadError",
    "ServingError",
    "TokenizerError",
]


class EnginesError(Exception):
    """Base of every error that the user can repair."""

    exit_code: int = 2


class BundleError(EnginesError):
    """A bundle's manifest is missing, malformed, of an unknown version, or contradicts itself."""


class CheckpointError(EnginesError):
    """The checkpoint that a bundle names is missing, was moved, or was changed since export."""


class EngineSetError(EnginesError):
    """A folder is no engine set, or its files do not match its build record."""


class RequestError(EnginesError):
    """A generation request was refused before any work started."""


class GenerationError(EnginesError):
    """A request that had started could not be finished."""

    exit_code = 1


class RuntimeLoadError(EnginesError):
    """An engine set cannot be loaded on this machine."""


class TokenizerError(EnginesError):
    """Text was given or asked for, and the tokenizer is missing or cannot handle it."""


class PlanError(EnginesError):
    """The planner was asked for something that does not exist or does not fit."""


class BuildError(EnginesError):
    """Engines could not be built."""


class ServingError(EnginesError):
    """A model repository could not be written, or a server could not be run."""
