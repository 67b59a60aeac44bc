"""Many answers at a time, in the order of their prompts, with retries and over several servers."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from twotower_client.client import AnswerStream, TwoTowerClient
from twotower_client.errors import ClientError, RequestRefusedError
from twotower_client.response import cancelled
from twotower_client.result import Answer
from twotower_client.retry import Retry, Servers
from twotower_contract.options import Options
from twotower_contract.processes import next_of

Prompt = str | Sequence[int]
Progress = Callable[[int, int], None]
"""Is told how many answers are done, and how many of them failed."""


@dataclass(frozen=True, slots=True)
class Job:
    """One request of many.

    Attributes:
        prompt: Text or token ids to continue.
        options: Options of the request.
        timeout: Seconds for the whole answer; the client's where None.
    """

    prompt: Prompt
    options: Options
    timeout: float | None = None

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of a client's `stream`."""
        is_text = isinstance(self.prompt, str)
        return {
            "prompt": self.prompt if is_text else None,
            "prompt_ids": None if is_text else self.prompt,
            "timeout": self.timeout,
            **self.options,
        }


def check_concurrency(concurrency: int) -> None:
    """Refuse what is no number of requests.

    Raises:
        RequestRefusedError: The number is below 1.
    """
    if concurrency < 1:
        raise RequestRefusedError(f"concurrency is {concurrency}; it must be at least 1")


class Batch:
    """Threads that answer jobs, each as soon as a thread is free. Use it in a `with` statement.

    Args:
        servers: Clients to ask.
        concurrency: Requests under way at a time.
        retry: When to send a request again.
    """

    def __init__(self, servers: Servers[TwoTowerClient], concurrency: int, retry: Retry) -> None:
        check_concurrency(concurrency)
        self._servers = servers
        self._concurrency = concurrency
        self._retry = retry
        self._stopped = threading.Event()
        self._streams: set[AnswerStream] = set()
        self._lock = threading.Lock()

    def answers(self, jobs: Iterable[Job]) -> Iterator[tuple[int, Answer | ClientError]]:
        """Yield the number and the answer of each job, or its error, in the order of their ends.

        Jobs are taken one by one as threads become free, so they may be endless.
        """
        todo: queue.SimpleQueue[tuple[int, Job] | None] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[int, Answer | ClientError | BaseException]]
        done = queue.SimpleQueue()

        def work() -> None:
            while (item := todo.get()) is not None:
                try:
                    done.put((item[0], self.answer(item[1])))
                except BaseException as problem:  # a bug, or a wrong name among the options
                    done.put((item[0], problem))

        numbered, under_way = enumerate(jobs), 0
        threads: list[threading.Thread] = []
        try:
            while True:
                while under_way < self._concurrency and (item := next(numbered, None)):
                    if len(threads) == under_way:
                        threads.append(threading.Thread(target=work, daemon=True))
                        threads[-1].start()
                    todo.put(item)
                    under_way += 1
                if not under_way:
                    return
                number, outcome = next_of(done)
                under_way -= 1
                if not isinstance(outcome, Answer | ClientError):
                    raise outcome
                yield number, outcome
        finally:
            self.stop()
            for _ in threads:
                todo.put(None)
            for thread in threads:
                thread.join()

    def answer(self, job: Job) -> Answer | ClientError:
        """Return the answer of one job, or the error that its last attempt ended with."""
        waits = self._retry.waits()
        while True:
            number, client = self._servers.take()
            problem: ClientError | None = None
            try:
                return self._ask(client, job)
            except ClientError as error:
                problem = error
            finally:
                self._servers.give_back(number, problem)
            wait = self._servers.wait(problem, waits, client, job.timeout)
            if wait is None or self._stopped.wait(wait):
                return problem

    def stop(self) -> None:
        """Stop what is under way, on the servers too."""
        with self._lock:
            self._stopped.set()
            streams = list(self._streams)
        for stream in streams:
            stream.cancel()

    def _ask(self, client: TwoTowerClient, job: Job) -> Answer:
        with client.stream(**job.arguments()) as stream:
            with self._lock:
                if self._stopped.is_set():
                    raise cancelled()
                self._streams.add(stream)
            try:
                return stream.answer()
            finally:
                with self._lock:
                    self._streams.discard(stream)


class InOrder:
    """Outcomes that come in any order, handed on by their numbers.

    Args:
        progress: Told of each; None for nobody.
    """

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._early: dict[int, Answer | ClientError] = {}
        self._done = self._failed = self._following = 0

    def add(self, number: int, outcome: Answer | ClientError) -> Iterator[Answer | ClientError]:
        """Take an outcome, and yield those before which none is missing any more."""
        self._early[number] = outcome
        self._done, self._failed = self._done + 1, self._failed + isinstance(outcome, ClientError)
        if self._progress is not None:
            self._progress(self._done, self._failed)
        while self._following in self._early:
            self._following += 1
            yield self._early.pop(self._following - 1)


def generate_many(
    servers: Servers[TwoTowerClient],
    prompts: Iterable[Prompt],
    concurrency: int,
    timeout: float | None,
    retry: Retry,
    progress: Progress | None,
    options: Options,
) -> Iterator[Answer | ClientError]:
    """Yield the answer to each prompt, or its error, in the order of the prompts."""
    batch = Batch(servers, concurrency, retry)
    jobs = (Job(prompt, options, timeout) for prompt in prompts)
    ordered = InOrder(progress)
    return (one for ended in batch.answers(jobs) for one in ordered.add(*ended))
