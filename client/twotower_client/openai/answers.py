"""Answers of the model as OpenAI writes them, whole or in pieces as they come."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from twotower_client.aio import AsyncTwoTowerClient
from twotower_client.errors import ClientError
from twotower_client.many import Job
from twotower_client.openai.fields import Wish
from twotower_client.openai.infill import Cutter
from twotower_client.openai.problems import ApiError, error_of
from twotower_client.result import Block, Canvas

# OpenAI knows two reasons: an answer was cut short, or it came to its end.
FINISH = {
    "length": "length",
    "calls": "length",
    "eos": "stop",
    "stop": "stop",
    "repetition": "stop",
    "cancelled": "stop",
}


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of one choice.

    Attributes:
        index: Number of the choice.
        block: The block that it adds; None where it only shows one that is not finished.
        canvas: The block for those who watch it, in the form of the page's board.
        prompt_tokens: Tokens of the prompt.
    """

    index: int
    block: Block | None
    canvas: dict[str, Any] | None
    prompt_tokens: int


class Picture:
    """The block that a choice is at, as the page's board takes it: text, call and confidence."""

    def __init__(self) -> None:
        self._number, self._calls = 0, 0
        self._tokens: list[list[Any] | None] = []

    def watch(self, canvas: Canvas) -> dict[str, Any]:
        """Take the block after a denoiser call."""
        self._calls += 1
        before = self._tokens or [None] * len(canvas.tokens)
        self._tokens = [
            known or (None if token is None else [token[0], self._calls, round(token[1], 4)])
            for known, token in zip(before, canvas.tokens, strict=True)
        ]
        return {"block": self._number, "tokens": self._tokens}

    def finish(self, block: Block) -> dict[str, Any]:
        """Take the finished block."""
        tokens = [
            [one.text, one.call, round(math.exp(one.logprob), 4)] for one in block.details
        ] or self._tokens[: len(block.ids)]
        finished = {"block": self._number, "tokens": tokens}
        self._number, self._calls, self._tokens = self._number + 1, 0, []
        return finished


class Answers:
    """The answers to one wish, and what they become in OpenAI's form.

    Args:
        client: Client of the server.
        wish: The request.
        model: Name of the model as callers know it.
    """

    def __init__(self, client: AsyncTwoTowerClient, wish: Wish, model: str) -> None:
        self._client, self._wish, self._model = client, wish, model
        prefix = "chatcmpl" if wish.is_chat else "cmpl"
        self.id = f"{prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self.prompt_tokens: dict[int, int] = {}
        self.completion_tokens = 0
        self.denoiser_calls: dict[int, int] = {}
        self.first_at: float | None = None  # on the monotonic clock
        self._lengths = [len(self._echoed(index)) for index in range(wish.count)]

    async def pieces(self) -> AsyncGenerator[Piece]:
        """Yield blocks of all choices as they come. Leaving stops all on the server.

        Raises:
            ApiError: A choice failed.
        """
        arrived: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()

        async def read(index: int, job: Job) -> None:
            picture = Picture() if self._wish.options.get("stream_mode") == "denoise" else None
            cutter = Cutter(self._wish.room)
            try:
                async with self._client.stream(**job.arguments()) as stream:
                    if picture is not None:
                        stream.on_canvas = lambda canvas: arrived.put_nowait(
                            Piece(index, None, picture.watch(canvas), 0)
                        )
                    async for block in stream:
                        canvas = picture.finish(block) if picture is not None else None
                        count = len(stream.prompt_ids)
                        arrived.put_nowait(Piece(index, cutter.cut(block), canvas, count))
                arrived.put_nowait(None)
            except Exception as problem:
                arrived.put_nowait(problem)

        requests = self._wish.requests()
        tasks = [
            asyncio.create_task(read(index, Job(prompt, options)))
            for index, (prompt, options) in enumerate(requests)
        ]
        try:
            under_way = len(tasks)
            while under_way:
                item = await arrived.get()
                if isinstance(item, ClientError):
                    raise error_of(item)
                if isinstance(item, Exception):  # a bug
                    raise item
                if item is None:
                    under_way -= 1
                else:
                    self._count(item)
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _count(self, piece: Piece) -> None:
        if piece.block is None:
            return
        self.first_at = self.first_at or time.monotonic()
        self.prompt_tokens[piece.index // self._wish.choices] = piece.prompt_tokens
        self.completion_tokens += len(piece.block.ids)
        self.denoiser_calls[piece.index] = piece.block.denoiser_calls

    async def whole(self) -> dict[str, Any]:
        """Return the whole answer."""
        blocks: list[list[Block]] = [[] for _ in range(self._wish.count)]
        async for piece in self.pieces():
            if piece.block is not None:
                blocks[piece.index].append(piece.block)
        choices = [self._choice(index, parts) for index, parts in enumerate(blocks)]
        return {
            **self._head("chat.completion" if self._wish.is_chat else "text_completion"),
            "choices": choices,
            "usage": self.usage(),
        }

    async def chunks(self) -> AsyncGenerator[dict[str, Any]]:
        """Yield the objects of a stream."""
        kind = "chat.completion.chunk" if self._wish.is_chat else "text_completion"
        head = self._head(kind)
        begun: set[int] = set()
        async for piece in self.pieces():
            shown = {} if piece.canvas is None else {"canvas": piece.canvas}
            if piece.block is None:
                choice = self._delta(piece.index, "", None, None, is_first=False)
            else:
                is_first = piece.index not in begun
                logprobs = self._logprobs([piece.block], self._lengths[piece.index])
                self._lengths[piece.index] += len(piece.block.text)
                text, reason = piece.block.text, piece.block.finish_reason
                choice = self._delta(piece.index, text, reason, logprobs, is_first)
                begun.add(piece.index)
            yield {**head, "choices": [{**choice, **shown}]}
        if self._wish.usage:
            yield {**head, "choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Return the counts of tokens so far."""
        prompt = sum(self.prompt_tokens.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.completion_tokens,
            "total_tokens": prompt + self.completion_tokens,
            "denoiser_calls": sum(self.denoiser_calls.values()),
        }

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self._created, "model": self._model}

    def _choice(self, index: int, blocks: Sequence[Block]) -> dict[str, Any]:
        text = "".join(block.text for block in blocks)
        reason = FINISH[blocks[-1].finish_reason or "length"]
        logprobs = self._logprobs(blocks, len(self._echoed(index)))
        common = {"index": index, "finish_reason": reason, "logprobs": logprobs}
        if self._wish.is_chat:
            return {**common, "message": {"role": "assistant", "content": text}}
        return {**common, "text": self._echoed(index) + text}

    def _delta(
        self,
        index: int,
        text: str,
        reason: str | None,
        logprobs: dict[str, Any] | None,
        is_first: bool,
    ) -> dict[str, Any]:
        finish = FINISH[reason] if reason else None
        common = {"index": index, "finish_reason": finish, "logprobs": logprobs}
        if self._wish.is_chat:
            role = {"role": "assistant"} if is_first else {}
            return {**common, "delta": {**role, "content": text}}
        return {**common, "text": (self._echoed(index) if is_first else "") + text}

    def _logprobs(self, blocks: Sequence[Block], offset: int) -> dict[str, Any] | None:
        """Return the log-probabilities of tokens, whose text begins at `offset`."""
        if self._wish.logprobs is None:
            return None
        details = [one for block in blocks for one in block.details]
        if self._wish.is_chat:
            chosen = [
                {"token": one.text, "logprob": one.logprob, "bytes": list(one.text.encode())}
                for one in details
            ]
            has_top = self._wish.logprobs > 0
            content = [{**one, "top_logprobs": [one] if has_top else []} for one in chosen]
            return {"content": content, "refusal": None}
        ends = itertools.accumulate((len(one.text) for one in details), initial=offset)
        return {
            "tokens": [one.text for one in details],
            "token_logprobs": [one.logprob for one in details],
            "top_logprobs": [{one.text: one.logprob} for one in details],
            "text_offset": list(ends)[:-1],
        }

    def _echoed(self, index: int) -> str:
        prompt = self._wish.prompts[index // self._wish.choices]
        return prompt if self._wish.echo and isinstance(prompt, str) else ""


def sse(data: str) -> bytes:
    """Return a server-sent event."""
    return f"data: {data}\n\n".encode()


def check_model(body: dict[str, Any], name: str) -> None:
    """Refuse a request for another model.

    Raises:
        ApiError: With the status 404, as OpenAI's.
    """
    asked = body.get("model")
    if asked != name:
        raise ApiError(
            404,
            f"there is no model {asked!r}; this server has {name!r}",
            param="model",
            code="model_not_found",
        )
