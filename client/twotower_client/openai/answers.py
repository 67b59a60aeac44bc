"""Answers of the model as OpenAI writes them, whole or in pieces as they come."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from twotower_client.aio import AsyncTwoTowerClient
from twotower_client.errors import ClientError
from twotower_client.many import Job
from twotower_client.openai.fields import Wish
from twotower_client.openai.problems import ApiError, error_of
from twotower_client.result import Block

FINISH = {"length": "length", "eos": "stop", "stop": "stop", "cancelled": "stop"}


@dataclass(frozen=True, slots=True)
class Piece:
    """A block of one choice, or the error that ended all of them.

    Attributes:
        index: Number of the choice.
        block: The block.
        prompt_tokens: Tokens of the prompt.
    """

    index: int
    block: Block
    prompt_tokens: int


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

    async def pieces(self) -> AsyncGenerator[Piece]:
        """Yield blocks of all choices as they come. Leaving stops all on the server.

        Raises:
            ApiError: A choice failed.
        """
        arrived: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()

        async def read(index: int, job: Job) -> None:
            try:
                async with self._client.stream(**job.arguments()) as stream:
                    async for block in stream:
                        arrived.put_nowait(Piece(index, block, len(stream.prompt_ids)))
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
        self.first_at = self.first_at or time.monotonic()
        self.prompt_tokens[piece.index // self._wish.choices] = piece.prompt_tokens
        self.completion_tokens += len(piece.block.ids)
        self.denoiser_calls[piece.index] = piece.block.denoiser_calls

    async def whole(self) -> dict[str, Any]:
        """Return the whole answer."""
        count = len(self._wish.requests())
        blocks: list[list[Block]] = [[] for _ in range(count)]
        async for piece in self.pieces():
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
            is_first = piece.index not in begun
            begun.add(piece.index)
            yield {**head, "choices": [self._delta(piece, is_first)]}
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
        common = {"index": index, "finish_reason": reason, "logprobs": None}
        if self._wish.is_chat:
            return {**common, "message": {"role": "assistant", "content": text}}
        return {**common, "text": self._echoed(index) + text}

    def _delta(self, piece: Piece, is_first: bool) -> dict[str, Any]:
        block = piece.block
        reason = FINISH[block.finish_reason] if block.finish_reason else None
        common = {"index": piece.index, "finish_reason": reason, "logprobs": None}
        if self._wish.is_chat:
            role = {"role": "assistant"} if is_first else {}
            return {**common, "delta": {**role, "content": block.text}}
        return {**common, "text": (self._echoed(piece.index) if is_first else "") + block.text}

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
