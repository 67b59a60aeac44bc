"""Errors that a user can act on: what was wrong, with which value, and what to do."""

from __future__ import annotations


class ExportError(Exception):
    """Base of all errors of this package that are not bugs.

    Attributes:
        exit_code: exit status of the command line when the error ends it.
    """

    exit_code: int = 2


class ConfigError(ExportError):
    """`config.json` is unreadable or describes a model that the towers do not implement."""


class CheckpointError(ExportError):
    """A checkpoint is missing, broken, or not the one that was asked for."""


class HubError(ExportError):
    """A checkpoint could not be fetched from the Hugging Face hub."""


class BundleError(ExportError):
    """A bundle could not be written or read, or does not belong to a checkpoint."""
