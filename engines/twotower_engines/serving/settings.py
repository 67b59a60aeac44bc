"""The parameters that the packager writes into config.pbtxt and the models read back."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from twotower_contract.engine_set import EngineSet, open_engine_set
from twotower_engines.errors import ServingError
from twotower_engines.planning.plan import PREFILL_MS

MAX_WAITING = 256
Number = TypeVar("Number", int, float)


@dataclass(frozen=True, slots=True)
class Settings:
    """A model's settings on the machine that it runs on.

    Attributes:
        engine_set: Folder of the engine set.
        checkpoint: Folder of the checkpoint, where it is not the one in the manifest.
        slots: Requests that are generated at once; None for all that the engines have.
        max_waiting: Requests that may wait for a slot before others are refused.
        threads: CPU threads of the engines; None for one per core.
        prefix_mib: Memory for the states of prompts' beginnings, in MiB; 0 for none.
        prefill_ms: Milliseconds that prompts may take from running rows in a turn.
    """

    engine_set: Path
    checkpoint: Path | None = None
    slots: int | None = None
    max_waiting: int = MAX_WAITING
    threads: int | None = None
    prefix_mib: int = 0
    prefill_ms: float = PREFILL_MS

    def parameters(self) -> dict[str, str]:
        """Return them as config.pbtxt holds them: strings, those that are None left out."""
        values = {
            "engine_set": self.engine_set,
            "checkpoint": self.checkpoint,
            "slots": self.slots,
            "max_waiting": self.max_waiting,
            "threads": self.threads,
            "prefix_mib": self.prefix_mib,
            "prefill_ms": self.prefill_ms,
        }
        return {name: str(value) for name, value in values.items() if value is not None}

    @classmethod
    def of_parameters(cls, values: dict[str, str]) -> Settings:
        """Read what `parameters` returned.

        Raises:
            ServingError: A parameter is missing or no number.
        """
        if "engine_set" not in values:
            raise ServingError(
                "config.pbtxt has no parameter `engine_set`; write the model repository with "
                "`twotower package ENGINES REPO`"
            )

        def number(name: str, kind: type[Number], noun: str) -> Number | None:
            try:
                return kind(values[name]) if name in values else None
            except ValueError:
                raise ServingError(
                    f"config.pbtxt: parameter `{name}` is {values[name]!r}, not a {noun}"
                ) from None

        def integer(name: str) -> int | None:
            return number(name, int, "whole number")

        max_waiting, prefill_ms = integer("max_waiting"), number("prefill_ms", float, "number")
        return cls(
            engine_set=Path(values["engine_set"]),
            checkpoint=Path(values["checkpoint"]) if "checkpoint" in values else None,
            slots=integer("slots"),
            max_waiting=MAX_WAITING if max_waiting is None else max_waiting,
            threads=integer("threads"),
            prefix_mib=integer("prefix_mib") or 0,
            prefill_ms=PREFILL_MS if prefill_ms is None else prefill_ms,
        )

    @classmethod
    def of_model(cls, arguments: dict[str, str]) -> Settings:
        """Read the parameters of the model that Triton is loading."""
        config: dict[str, Any] = json.loads(arguments["model_config"])
        parameters = config.get("parameters", {})
        return cls.of_parameters(
            {name: value["string_value"] for name, value in parameters.items()}
        )

    def engines(self) -> EngineSet:
        """Open the engine set.

        Raises:
            TwoTowerError: It is missing or broken.
        """
        return open_engine_set(self.engine_set)
