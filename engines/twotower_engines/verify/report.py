"""The findings of a verification, and the sources that it compares with."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from twotower_contract.engine_set import EngineSet
from twotower_engines.verify.differences import Difference

LISTED_AT_MOST = 5


@dataclass(frozen=True, slots=True)
class Sources:
    """The references that engines are verified with; None where one was not named.

    Attributes:
        checkpoint: The checkpoint's folder, where it is not the one in the manifest.
        bundle: Bundle that the engines were built from.
        against: Engines of the CPU flavour of the same model.
    """

    checkpoint: Path | None = None
    bundle: Path | None = None
    against: EngineSet | None = None


@dataclass(slots=True)
class Verification:
    """The findings.

    Attributes:
        engines: Folder of the engine set.
        verified: Checks that passed, a sentence for each.
        problems: Checks that failed, a sentence for each.
        not_verified: Checks that could not be made here, each with the reason.
        differences: Outputs that were compared on the GPU.
    """

    engines: Path
    verified: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    not_verified: list[str] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether something was verified and nothing is wrong."""
        return bool(self.verified) and not self.problems

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "target": str(self.engines),
            "passed": self.passed,
            "verified": self.verified,
            "problems": self.problems,
            "notes": self.not_verified,
            "tensors": [asdict(one) for one in self.differences],
        }

    def take(self, what: str, found: list[str]) -> None:
        """Note that `what` is right, or what is wrong with it."""
        if not found:
            self.verified.append(what)
        shown = found[:LISTED_AT_MOST]
        if len(found) > len(shown):
            shown.append(f"{len(found) - len(shown)} more like these")
        self.problems += shown
