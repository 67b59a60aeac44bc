"""Errors of the engines alone; those that the stages share are in `twotower_contract.errors`."""

from twotower_contract.errors import TwoTowerError


class RequestError(TwoTowerError):
    """A generation request was refused before any work started."""


class GenerationError(TwoTowerError):
    """A request that had started could not be finished."""

    exit_code = 1


class RuntimeLoadError(TwoTowerError):
    """An engine set cannot be loaded on this machine."""


class TokenizerError(TwoTowerError):
    """Text was given or asked for, and the tokenizer is missing or cannot handle it."""


class PlanError(TwoTowerError):
    """The planner was asked for something that does not exist or does not fit."""


class BuildError(TwoTowerError):
    """Engines could not be built."""


class ServingError(TwoTowerError):
    """A model repository could not be written, or a server could not be run."""
