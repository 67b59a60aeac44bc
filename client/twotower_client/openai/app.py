"""The front end as an ASGI application: OpenAI's paths, keys, limits, and the page at `/`."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import html
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from twotower_client.aio import AsyncTwoTowerClient
from twotower_client.errors import ClientError
from twotower_client.openai.answers import Answers, check_model, sse
from twotower_client.openai.chat import ChatTemplate
from twotower_client.openai.fields import Wish, read_chat, read_completion
from twotower_client.openai.infill import with_suffix
from twotower_client.openai.metrics import Metrics
from twotower_client.openai.problems import ApiError
from twotower_contract.replay import filled_page, script_json
from twotower_contract.statuses import retry_header

PATIENCE_SECONDS = 10.0  # until a stream that has nothing yet is begun, and between its comments
LEFT = 499  # of nginx: the caller left before the answer
Result = TypeVar("Result")
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Settings:
    """How the front end serves.

    Attributes:
        model: Name of the model as callers know it.
        api_keys: Keys, one of which a caller must give; no key is asked for where there is none.
        max_body: Most bytes of a request.
        max_concurrency: Most requests under way; others are told to come again.
        template: Template that makes a prompt of chat messages; None where there is none.
    """

    model: str
    api_keys: tuple[str, ...] = ()
    max_body: int = 1 << 20
    max_concurrency: int = 256
    template: ChatTemplate | None = None


class CallerLeftError(Exception):
    """The caller closed the connection before the answer."""


def make_app(make_client: Callable[[], AsyncTwoTowerClient], settings: Settings) -> Starlette:
    """Return the application.

    Args:
        make_client: Makes the client of the server, once there is an event loop.
        settings: How to serve.
    """
    front = FrontEnd(settings)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with make_client() as client:
            front.client = client
            yield

    routes = [
        Route("/v1/completions", front.guarded(front.completions), methods=["POST"]),
        Route("/v1/chat/completions", front.guarded(front.chat), methods=["POST"]),
        Route("/v1/models", front.guarded(front.models)),
        Route("/v1/models/{name}", front.guarded(front.model)),
        Route("/health", front.health),
        Route("/metrics", front.metrics_page),
        Route("/", front.page),
    ]
    app = Starlette(routes=routes, lifespan=lifespan)
    app.add_exception_handler(404, front.not_there)
    app.add_exception_handler(405, front.not_there)
    return app


class FrontEnd:
    """The handlers of the paths.

    Attributes:
        client: Client of the server.
    """

    client: AsyncTwoTowerClient

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._metrics = Metrics()

    def guarded(
        self, handle: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """Return a handler that asks for a key, counts, and answers errors in OpenAI's form."""

        async def guard(request: Request) -> Response:
            start, status = time.monotonic(), 500
            try:
                self._check_key(request)
                response = await handle(request)
                if isinstance(response, EventStream):  # counts itself when it ends
                    return response
            except ApiError as problem:
                response = _answer_of(problem)
            except CallerLeftError:
                response = Response(status_code=LEFT)
            status = response.status_code
            self._count(request, status, start)
            return response

        return guard

    async def completions(self, request: Request) -> Response:
        """Answer `/v1/completions`."""
        body = await self._body(request)
        check_model(body, self._settings.model)
        return await self._answer(request, read_completion(body))

    async def chat(self, request: Request) -> Response:
        """Answer `/v1/chat/completions`."""
        body = await self._body(request)
        check_model(body, self._settings.model)
        if self._settings.template is None:
            raise ApiError(
                400,
                "this model has no chat template; use /v1/completions, or give the front end one "
                "with --chat-template",
            )
        prompt = self._settings.template.prompt(body.get("messages"))
        return await self._answer(request, read_chat(body, prompt))

    async def models(self, request: Request) -> Response:
        """List the one model."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """Describe the one model."""
        check_model({"model": request.path_params["name"]}, self._settings.model)
        return JSONResponse(self._model())

    async def health(self, request: Request) -> Response:
        """Answer 200 where the server behind is ready, else 503 and why."""
        try:
            await self.client.check_ready()
        except ClientError as problem:
            return _answer_of(ApiError(503, str(problem), "server_error"))
        return JSONResponse({"status": "ready"})

    async def metrics_page(self, request: Request) -> Response:
        """Return the counters."""
        return PlainTextResponse(
            self._metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    async def page(self, request: Request) -> Response:
        """Return the page where one types a prompt and watches its answer."""
        name = self._settings.model
        content = filled_page("playground.html", model=html.escape(name), name=script_json(name))
        return Response(content, media_type="text/html; charset=utf-8")

    async def not_there(self, request: Request, problem: Exception) -> Response:
        """Answer an unknown path, or one that is asked with the wrong method."""
        status = getattr(problem, "status_code", 404)
        path = request.url.path
        return _answer_of(
            ApiError(status, f"there is no {request.method} {path}", code="unknown_url")
        )

    async def _answer(self, request: Request, wish: Wish) -> Response:
        """Ask the server, and answer whole or in pieces."""
        if self._metrics.running >= self._settings.max_concurrency:
            raise ApiError(
                429,
                f"{self._metrics.running} requests are under way, as many as this front end "
                "takes; try again later",
                "rate_limit_error",
            )
        start = time.monotonic()
        wish = await with_suffix(self.client, wish)
        answers = Answers(self.client, wish, self._settings.model)
        self._metrics.running += 1
        ended = contextlib.ExitStack()
        ended.callback(self._ended, answers, start)
        if not wish.stream:
            with ended:
                return JSONResponse(await unless_left(request.receive, answers.whole()))
        chunks = answers.chunks()
        begun = asyncio.ensure_future(anext(chunks, None))
        try:
            await unless_left(request.receive, asyncio.wait({begun}, timeout=PATIENCE_SECONDS))
            if begun.done() and (problem := begun.exception()):
                raise problem
        except BaseException:
            begun.cancel()
            await asyncio.gather(begun, return_exceptions=True)
            await chunks.aclose()
            ended.close()
            raise

        def done(status: int) -> None:
            ended.close()
            self._count(request, status, start)

        return EventStream(begun, chunks, done)

    async def _body(self, request: Request) -> dict[str, Any]:
        """Return the body, a JSON object.

        Raises:
            ApiError: It is none, or too large.
        """
        content = bytearray()
        async for part in request.stream():
            content += part
            if len(content) > self._settings.max_body:
                raise ApiError(
                    413, f"the request is larger than {self._settings.max_body} bytes; shorten it"
                )
        try:
            body = json.loads(content)
        except (ValueError, RecursionError) as problem:
            raise ApiError(400, f"the body is no JSON ({problem})") from None
        if not isinstance(body, dict):
            raise ApiError(400, "the body must be a JSON object")
        return body

    def _check_key(self, request: Request) -> None:
        keys = self._settings.api_keys
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # All are compared, so that the time tells nothing.
        known = [hmac.compare_digest(given.encode(), key.encode()) for key in keys]
        if keys and not (scheme.lower() == "bearer" and any(known)):
            raise ApiError(
                401,
                "the API key is missing or wrong; give it as `Authorization: Bearer KEY`",
                code="invalid_api_key",
            )

    def _ended(self, answers: Answers, start: float) -> None:
        self._metrics.running -= 1
        self._metrics.prompt_tokens += sum(answers.prompt_tokens.values())
        self._metrics.generation_tokens += answers.completion_tokens
        self._metrics.denoiser_calls += sum(answers.denoiser_calls.values())
        if answers.first_at is not None:
            self._metrics.first.add(answers.first_at - start)
        self._metrics.whole.add(time.monotonic() - start)

    def _count(self, request: Request, status: int, start: float) -> None:
        self._metrics.requests[request.scope["route"].path, status] += 1

    def _model(self) -> dict[str, Any]:
        return {"id": self._settings.model, "object": "model", "created": 0, "owned_by": "twotower"}


class EventStream(Response):
    """Server-sent events of one answer; the caller's leaving ends it, on the server too.

    Args:
        begun: The first chunk, which may still be under way.
        chunks: The others.
        done: Is told the status at the end.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        begun: asyncio.Future[dict[str, Any] | None],
        chunks: AsyncGenerator[dict[str, Any]],
        done: Callable[[int], None],
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._begun, self._chunks, self._done = begun, chunks, done

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Send the events."""
        status = 200
        try:
            await unless_left(receive, self._send(send))
        except CallerLeftError:
            status = LEFT
        except ApiError as problem:
            status = problem.status
        finally:
            self._begun.cancel()
            await asyncio.gather(self._begun, return_exceptions=True)
            await self._chunks.aclose()
            self._done(status)

    async def _send(self, send: Send) -> None:
        head = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(head)

        async def write(content: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": content, "more_body": more})

        problem: ApiError | None = None
        try:
            while not (await asyncio.wait({self._begun}, timeout=PATIENCE_SECONDS))[0]:
                await write(b": the request waits\n\n")
            chunk = self._begun.result()
            while chunk is not None:
                await write(sse(json.dumps(chunk)))
                chunk = await anext(self._chunks, None)
        except ApiError as error:
            problem = error
            await write(sse(json.dumps(error.body())))
        await write(sse("[DONE]"), more=False)
        if problem is not None:
            raise problem


async def unless_left(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Return what some work gives; end it where the caller leaves meanwhile.

    Raises:
        CallerLeftError: The caller left.
    """

    async def left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, leaving = asyncio.create_task(work), asyncio.create_task(left())
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise CallerLeftError
        return task.result()
    finally:
        for one in (task, leaving):
            one.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


def _answer_of(problem: ApiError) -> Response:
    headers = {}
    if problem.status in (429, 503):
        headers["retry-after"] = retry_header(problem.retry_after)
    if problem.status == 413:  # the rest of the body is not read, so nothing can follow it
        headers["connection"] = "close"
    return JSONResponse(problem.body(), problem.status, headers)
