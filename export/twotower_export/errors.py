"""Errors of the exporter alone; those that the stages share are in `twotower_contract.errors`."""

from __future__ import annotations

from twotower_contract.errors import TwoTowerError


class HubError(TwoTowerError):
    """A checkpoint could not be fetched from the Hugging Face hub."""
