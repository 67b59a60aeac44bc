"""Several servers of the same model as if they were one: the least busy is asked, failed ones rest.

```python
with ClientPool(["gpu1:8001", "gpu2:8001"]) as pool:
    for answer in pool.generate_many(prompts, concurrency=64, max_new_tokens=128):
        print(answer if isinstance(answer, ClientError) else answer.text)
```
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from typing import Any, Self, Unpack

from twotower_client import aio, aio_many, client, many
from twotower_client.aio import AsyncTwoTowerClient
from twotower_client.client import TwoTowerClient
from twotower_client.errors import ClientError
from twotower_client.many import Batch, Job, Progress, Prompt
from twotower_client.result import Answer
from twotower_client.retry import Retry, Servers
from twotower_contract.options import Options

CONCURRENCY = 16


class ClientPool:
    """Clients of one or more servers, with retries. Any number of threads may use it.

    Args:
        urls: `host:port` of each server's gRPC endpoint.
        retry: When a request is sent again, to the same server or another.
        **settings: As for `TwoTowerClient`: timeouts and credentials.

    Raises:
        RequestRefusedError: There is no address, or a value is wrong.
    """

    def __init__(self, urls: Sequence[str], *, retry: Retry | None = None, **settings: Any) -> None:
        self._servers = Servers([TwoTowerClient(url, **settings) for url in urls])
        self._retry = retry or Retry()

    def generate(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[Options]
    ) -> Answer:
        """Return a whole answer.

        Args:
            prompt: Text or token ids to continue.
            timeout: Seconds for one attempt.
            **options: Options of the request; see `Options`.

        Raises:
            ClientError: The error of the last attempt.
        """
        outcome = Batch(self._servers, 1, self._retry).answer(Job(prompt, options, timeout))
        if isinstance(outcome, ClientError):
            raise outcome
        return outcome

    def generate_many(
        self,
        prompts: Iterable[Prompt],
        *,
        concurrency: int = CONCURRENCY,
        timeout: float | None = None,
        progress: Progress | None = None,
        **options: Unpack[Options],
    ) -> Iterator[Answer | ClientError]:
        """Return an iterator over the answers, in the order of the prompts.

        An error takes the place of its answer, and the others go on. Prompts are read as requests
        become free to be sent. Closing the iterator stops what is under way.

        Args:
            prompts: Texts or lists of token ids.
            concurrency: Requests under way at a time.
            timeout: Seconds for one attempt at one answer.
            progress: Called with the number of answers, and of failed ones among them.
            **options: Options of every request; see `Options`.
        """
        return many.generate_many(
            self._servers, prompts, concurrency, timeout, self._retry, progress, options
        )

    def close(self) -> None:
        """Close all connections."""
        client.close_clients(self._servers.clients)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        client.close_clients(self._servers.clients, kind)


class AsyncClientPool:
    """The same for asyncio; arguments and errors are those of `ClientPool`."""

    def __init__(self, urls: Sequence[str], *, retry: Retry | None = None, **settings: Any) -> None:
        self._servers = Servers([AsyncTwoTowerClient(url, **settings) for url in urls])
        self._retry = retry or Retry()

    async def generate(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[Options]
    ) -> Answer:
        """Return a whole answer. Cancelling the task stops the request on its server."""
        outcome = await aio_many.answer(self._servers, Job(prompt, options, timeout), self._retry)
        if isinstance(outcome, ClientError):
            raise outcome
        return outcome

    def generate_many(
        self,
        prompts: Iterable[Prompt],
        *,
        concurrency: int = CONCURRENCY,
        timeout: float | None = None,
        progress: Progress | None = None,
        **options: Unpack[Options],
    ) -> AsyncIterator[Answer | ClientError]:
        """Return an async iterator over the answers, or errors, in the order of the prompts."""
        return aio_many.generate_many(
            self._servers, prompts, concurrency, timeout, self._retry, progress, options
        )

    async def close(self) -> None:
        """Close all connections."""
        await aio.close_clients(self._servers.clients)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        await aio.close_clients(self._servers.clients, kind)
