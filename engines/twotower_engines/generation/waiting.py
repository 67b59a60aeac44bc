"""Requests that wait for a slot: bounded, by priority, callers in turn.

The next request is the oldest one of the caller who has the fewest slots; between callers with as
many, of the one who got a slot longest ago. Interactive requests come first, but each eighth slot
goes to a batch request, if one waits. A full queue makes room for a caller who has fewer requests
in it than another: the other's newest one is turned away.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping

from twotower_engines.generation.request import Request

BATCH_TURN = 8
"""One slot of so many goes to a batch request, while interactive ones wait as well."""


class WaitingRequests:
    """The queue of a scheduler.

    Args:
        most: Requests that may wait; None for any number.
    """

    def __init__(self, most: int | None = None) -> None:
        self._most = most
        self._queues: dict[tuple[str, str], deque[Request]] = {}  # by priority and tenant
        self._served: dict[str, int] = {}  # the turn of each tenant's last admission
        self._turns = 0

    def __len__(self) -> int:
        """Return how many wait."""
        return sum(map(len, self._queues.values()))

    def __iter__(self) -> Iterator[Request]:
        """Yield all, each queue oldest first."""
        for queue in self._queues.values():
            yield from queue

    def add(self, request: Request) -> Request | None:
        """Take a request; return the one that is turned away for it, which may be itself."""
        self._queues.setdefault((request.priority, request.tenant), deque()).append(request)
        if self._most is None or len(self) <= self._most:
            return None
        waiting = Counter(one.tenant for one in self)
        tenant = max(waiting, key=lambda name: (waiting[name], name == request.tenant))
        key = min(key for key in self._queues if key[1] == tenant)  # batch before interactive
        turned_away = self._queues[key][-1]
        self.remove(turned_away)
        return turned_away

    def remove(self, request: Request) -> None:
        """Take a request out."""
        key = (request.priority, request.tenant)
        self._queues[key].remove(request)
        if not self._queues[key]:
            del self._queues[key]

    def pop(self, holders: Mapping[str, int]) -> Request:
        """Take out the next request.

        Args:
            holders: Slots that each tenant has.
        """
        self._turns += 1
        priority = self._priority()
        tenant = min(
            (tenant for kind, tenant in self._queues if kind == priority),
            key=lambda name: (holders.get(name, 0), self._served.get(name, 0)),
        )
        self._served[tenant] = self._turns
        request = self._queues[priority, tenant][0]
        self.remove(request)
        self._forget()
        return request

    def in_order(self, holders: Mapping[str, int]) -> list[Request]:
        """Return all in the order in which they would get slots if none was given back."""
        copy, held = WaitingRequests(), Counter(holders)
        copy._queues = {key: deque(queue) for key, queue in self._queues.items()}
        copy._served, copy._turns = dict(self._served), self._turns
        order = []
        while copy:
            order.append(copy.pop(held))
            held[order[-1].tenant] += 1
        return order

    def _priority(self) -> str:
        kinds = {kind for kind, _ in self._queues}
        if len(kinds) == 1:
            return kinds.pop()
        return "batch" if self._turns % BATCH_TURN == 0 else "interactive"

    def _forget(self) -> None:
        """Forget callers who have nothing here: their number is not bounded."""
        here = {tenant for _, tenant in self._queues}
        if len(self._served) > 2 * len(here) + 64:
            self._served = {name: turn for name, turn in self._served.items() if name in here}
