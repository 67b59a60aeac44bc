"""Requests that wait for a slot: bounded, by priority, callers in turn.

The next request is the oldest one of the caller who has the fewest slots; between callers with as
many, of the one who got a slot longest ago. Interactive requests come first, but each eighth slot
goes to a batch request, if one waits. A full queue makes room for a caller who has less in it than
another: the other's newest request is turned away. Full is a number of requests, and of their
prompts' tokens, which take memory.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping
from heapq import heapify, heappop, heapreplace

from twotower_engines.generation.request import Request

MOST_TOKENS = 1 << 22
"""Tokens of all prompts that wait: some 150 MB."""

BATCH_TURN = 8
"""One slot of so many goes to a batch request, while interactive ones wait as well."""


class WaitingRequests:
    """The queue of a scheduler.

    Args:
        most: Requests that may wait; None for any number.
        most_tokens: Tokens that their prompts may have together.
    """

    def __init__(self, most: int | None = None, most_tokens: int = MOST_TOKENS) -> None:
        self._most, self._most_tokens = most, most_tokens
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

    def add(self, request: Request, free: int = 0) -> list[Request]:
        """Take a request; return those that are turned away for it, it itself perhaps.

        Args:
            request: Comes last of its caller.
            free: Slots that are free, whose next holders only seem to wait.
        """
        self._queues.setdefault((request.priority, request.tenant), deque()).append(request)
        turned_away = []
        while (weigh := self._overflow(free)) is not None:
            weights: Counter[str] = Counter()
            for one in self:
                weights[one.tenant] += weigh(one)
            tenant = max(weights, key=lambda name: (weights[name], name == request.tenant))
            key = min(key for key in self._queues if key[1] == tenant)  # batch before interactive
            turned_away.append(self._queues[key][-1])
            self.remove(turned_away[-1])
        if request in turned_away:  # then nobody else needs to go
            for one in reversed(turned_away[:-1]):
                self._queues.setdefault((one.priority, one.tenant), deque()).append(one)
            return [request]
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
        priority = _priority({kind for kind, _ in self._queues}, self._turns)
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
        """Return all in the order in which they would get slots if none was given back.

        As `pop` would, but in time that grows with the number of requests, not with its square.
        """
        queues = {key: deque(queue) for key, queue in self._queues.items()}
        held, served, turn = Counter(holders), dict(self._served), self._turns

        def place(tenant: str, number: int) -> tuple[int, int, int, str]:
            return held[tenant], served.get(tenant, 0), number, tenant

        heaps: dict[str, list[tuple[int, int, int, str]]] = {}
        for number, (kind, tenant) in enumerate(queues):
            heaps.setdefault(kind, []).append(place(tenant, number))
        for heap in heaps.values():
            heapify(heap)
        order = []
        while heaps:
            turn += 1
            kind = _priority(heaps, turn)
            heap = heaps[kind]
            # A slot of the other priority puts a tenant back here, too.
            while heap[0] != (now := place(heap[0][3], heap[0][2])):
                heapreplace(heap, now)
            *_, number, tenant = heap[0]
            order.append(queues[kind, tenant].popleft())
            held[tenant] += 1
            served[tenant] = turn
            if queues[kind, tenant]:
                heapreplace(heap, place(tenant, number))
            elif len(heap) > 1:
                heappop(heap)
            else:
                del heaps[kind]
        return order

    def _overflow(self, free: int) -> Callable[[Request], int] | None:
        """Return the weight of a request in that of which there is too much, or None."""
        if self._most is not None and len(self) > self._most + free:
            return lambda request: 1
        tokens = sum(len(one.prompt_ids) for one in self)
        return (lambda one: len(one.prompt_ids)) if tokens > self._most_tokens else None

    def _forget(self) -> None:
        """Forget callers who have nothing here: their number is not bounded."""
        here = {tenant for _, tenant in self._queues}
        if len(self._served) > 2 * len(here) + 64:
            self._served = {name: turn for name, turn in self._served.items() if name in here}


def _priority(kinds: Collection[str], turn: int) -> str:
    """Return the priority whose turn it is, of those that wait."""
    if len(kinds) == 1:
        return next(iter(kinds))
    return "batch" if turn % BATCH_TURN == 0 else "interactive"
