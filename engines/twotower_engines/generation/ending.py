"""Where an answer ends: end tokens, stop strings, repetition, and its length.

Every rule is asked token by token, however many tokens come at once, so an answer ends at the same
token in every mode and block size. Stop strings are matched on text, across the borders of tokens
and blocks; what may yet become a match is held back.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Literal

from twotower_contract.options import last_pinned
from twotower_engines.artifacts.tokenizer import TextStream, Tokenizer
from twotower_engines.generation.request import Request

EndReason = Literal["length", "eos", "stop", "calls", "repetition"]


@dataclass(frozen=True, slots=True)
class Piece:
    """The tokens of a piece that belong to the answer.

    Attributes:
        count: Tokens that are kept, from the first.
        reason: Why the answer ends with them, or None.
        text: Text that may go out; None for a request without stop strings, whose text nobody here
            needs.
    """

    count: int
    reason: EndReason | None
    text: str | None


class StopMatcher:
    """Finds the first stop string in text that comes in pieces; the pieces change nothing.

    The first is the one that is complete first; of several that end together, the longest.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.matched = False

    def push(self, text: str) -> str:
        """Take text, and return what may go out: up to a match, or what can begin none."""
        if self.matched:
            return ""
        text = self._held + text
        matches = [
            (begin + len(stop), begin) for stop in self._stops if (begin := text.find(stop)) >= 0
        ]
        if matches:
            self.matched, self._held = True, ""
            return text[: min(matches)[1]]
        held = max(map(self._overlap, [text] * len(self._stops), self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """Return what was held back: no more text comes, so it is no match."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Return the length of the longest end of `text` that begins `stop`."""
        longest = min(len(text), len(stop) - 1)
        return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)


class Ending:
    """The end of one answer.

    Args:
        request: The request.
        end_ids: The model's own end tokens.
        tokenizer: For stop strings; not used without them.
    """

    def __init__(
        self, request: Request, end_ids: Sequence[int], tokenizer: Tokenizer | None
    ) -> None:
        own = () if request.ignore_eos else end_ids
        self.ids = frozenset((*request.eos_ids, *own))
        self.least = max(request.min_new_tokens, last_pinned(request.canvas) + 1)
        self._most = request.max_new_tokens
        self._longest_run = request.max_repetition_run
        self._count = 0
        self._run = (-1, 0)  # a token, and how often it stands at the end of the answer
        self._text: tuple[TextStream, StopMatcher] | None = None
        if request.stop:
            assert tokenizer is not None, "a request with stop strings is refused without one"
            self._text = TextStream(tokenizer), StopMatcher(request.stop)

    @property
    def count(self) -> int:
        """Tokens of the answer so far."""
        return self._count

    def take(self, ids: Sequence[int], is_last: bool = False) -> Piece:
        """Take the next tokens, and tell which of them belong to the answer.

        Args:
            ids: New tokens, as many as were decided.
            is_last: Whether the answer ends with them in any case, for want of calls.
        """
        count, reason = self._by_ids(ids)
        if reason is None and is_last:
            reason = "calls"
        if self._text is None:
            return self._taken(count, reason, None)
        start = self._copied()
        text = self._push(ids[:count])
        if self._matcher.matched:
            # the block went in whole; its tokens one by one tell which completed the match
            self._text = start
            text, count, reason = "", 0, "stop"
            while not self._matcher.matched and count < len(ids):
                text += self._push(ids[count : count + 1], count)
                count += 1
        elif reason is not None:
            text += self.rest()
        return self._taken(count, reason, text)

    def rest(self) -> str:
        """Return the text that was held back, for an answer that ends here."""
        if self._text is None:
            return ""
        stream, matcher = self._text
        return matcher.push(stream.finish()) + matcher.finish()

    @property
    def _matcher(self) -> StopMatcher:
        assert self._text is not None, "asked for requests with stop strings only"
        return self._text[1]

    def _copied(self) -> tuple[TextStream, StopMatcher]:
        assert self._text is not None, "asked for requests with stop strings only"
        stream, matcher = self._text
        return copy(stream), copy(matcher)

    def _taken(self, count: int, reason: EndReason | None, text: str | None) -> Piece:
        self._count += count
        return Piece(count, reason, text)

    def _by_ids(self, ids: Sequence[int]) -> tuple[int, EndReason | None]:
        """Return how many tokens there are up to the first that ends the answer, and why."""
        for place, token in enumerate(ids, 1):
            last, times = self._run
            self._run = (token, times + 1 if token == last else 1)
            total = self._count + place
            if total >= self.least:
                if token in self.ids:
                    return place, "eos"
                if 0 < self._longest_run < self._run[1]:
                    return place, "repetition"
            if total >= self._most:
                return place, "length"
        return len(ids), None

    def _push(self, ids: Sequence[int], taken: int = 0) -> str:
        """Return the text that some tokens let out; those before `least` can begin no match."""
        assert self._text is not None, "asked for requests with stop strings only"
        stream, matcher = self._text
        exempt = max(0, self.least - self._count - taken)
        free = stream.push(ids[:exempt]) if exempt else ""
        return free + (matcher.push(stream.push(ids[exempt:])) if ids[exempt:] else "")
