"""The routes: OpenAI's API, the game, health and metrics, and the page.

    POST /v1/chat/completions, /v1/completions     as OpenAI's, streamed or not
    GET  /v1/models                                the base and its adapters
    GET  /game, POST /game/rounds, /game/votes     tell them apart
    GET  /health, /metrics                         for whoever watches the server
    GET  /, /app.js, …                             the page

No path has a parameter, nothing is uploaded, and nothing but the votes is written.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from qlora_jax.serving.errors import ApiError
from qlora_jax.serving.events import (
    ChatFormat,
    EventStream,
    Format,
    TextFormat,
    completion,
    completion_events,
    unless_gone,
)
from qlora_jax.serving.fields import parse_object
from qlora_jax.serving.game import Game
from qlora_jax.serving.guard import Access, Guard
from qlora_jax.serving.metrics import CONTENT_TYPE
from qlora_jax.serving.page import page_routes
from qlora_jax.serving.requests import Ask, parse_chat, parse_completion
from qlora_jax.serving.scheduler import EngineFailedError
from qlora_jax.serving.service import Limits, Service

_GONE = 499  # nobody reads it; what nginx logs when a client left


def create_app(
    service: Service, *, access: Access | None = None, game: Game | None = None
) -> ASGIApp:
    """Builds the application of one server.

    Args:
        service: what answers. Its engine runs from the start to the end of the lifespan.
        access: who may speak to it; by default pages and programs of this machine.
        game: None: there is none.

    Returns:
        An ASGI application.
    """
    api = _Api(service, game)
    pages = page_routes()
    routes = [
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
        Route("/v1/completions", api.completions, methods=["POST"]),
        Route("/v1/models", api.models, methods=["GET"]),
        Route("/health", api.health, methods=["GET"]),
        Route("/metrics", api.metrics, methods=["GET"]),
        *pages,
    ]
    if game is not None:
        routes += [
            Route("/game", api.game_state, methods=["GET"]),
            Route("/game/rounds", api.game_round, methods=["POST"]),
            Route("/game/votes", api.game_vote, methods=["POST"]),
        ]

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        service.scheduler.start()
        yield
        await service.scheduler.close()

    def count(status: int, path: str) -> None:
        known = path if path in {route.path for route in routes} else "other"
        service.metrics.responses.labels(known, str(status)).inc()

    async def api_error(_: Request, error: ApiError) -> Response:
        service.metrics.refused.labels(error.code).inc()
        return error.response()

    app = Starlette(
        routes=routes,
        lifespan=lifespan,
        exception_handlers={ApiError: api_error, HTTPException: _http_error, Exception: _defect},
    )
    app.router.redirect_slashes = False
    open_paths = frozenset({"/health", *(route.path for route in pages)})
    return Guard(app, access or Access(), open_paths, count)


async def _http_error(_: Request, error: HTTPException) -> Response:
    messages = {404: "there is nothing at this address", 405: "this address has another method"}
    codes = {404: "not_found", 405: "method_not_allowed"}
    status = error.status_code
    message = messages.get(status, error.detail)
    return ApiError(
        status,
        message,
        code=codes.get(status, "invalid_request"),
        headers=dict(error.headers or {}),
    ).response()


async def _defect(_: Request, error: Exception) -> Response:
    return ApiError(500, "a defect of the server; its log says more", code="defect").response()


async def read_json(request: Request, limits: Limits) -> dict[str, Any]:
    """Reads a body within the limits.

    Raises:
        ApiError: it is too long, takes too long, or is not a JSON object.
    """
    too_long = ApiError(
        413, f"the body may have {limits.body_bytes} bytes", code="request_too_large"
    )
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > limits.body_bytes:
        raise too_long
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_s):
            async for part in request.stream():
                body += part
                if len(body) > limits.body_bytes:
                    raise too_long
    except TimeoutError:
        raise ApiError(
            408, f"the body took more than {limits.body_s:g} s", code="timeout"
        ) from None
    except ClientDisconnect:
        raise ApiError(_GONE, "the client has gone", code="client_gone") from None
    return parse_object(bytes(body))


class _Api:
    """The endpoints."""

    def __init__(self, service: Service, game: Game | None):
        self._service = service
        self._game = game

    async def chat(self, request: Request) -> Response:
        return await self._complete(request, parse_chat, ChatFormat())

    async def completions(self, request: Request) -> Response:
        return await self._complete(request, parse_completion, TextFormat())

    async def _complete(
        self, request: Request, parse: Callable[[dict[str, Any]], Ask], form: Format
    ) -> Response:
        ask = parse(await read_json(request, self._service.limits))
        answers = await self._service.begin([ask])
        if ask.stream:
            return EventStream(completion_events(form, ask, answers), answers.close)
        try:
            body = await unless_gone(request, completion(form, answers))
        except EngineFailedError as error:
            raise ApiError(500, str(error), code="engine_failed") from None
        finally:
            answers.close()
        return Response(status_code=_GONE) if body is None else JSONResponse(body)

    async def models(self, _: Request) -> Response:
        service = self._service
        shared = {
            "object": "model",
            "created": service.created,
            "owned_by": "qlora_jax",
            "root": service.base_name,
            "max_model_len": service.engine.max_len,
            "max_new_tokens": service.limits.new_tokens,
        }
        data = [
            {"id": name, **shared, "parent": None if name == service.base_name else shared["root"]}
            for name in service.models
        ]
        return JSONResponse({"object": "list", "data": data})

    async def health(self, _: Request) -> Response:
        if self._service.scheduler.failure is not None:
            return JSONResponse({"status": "failed"}, 503)
        if self._service.draining:
            return JSONResponse({"status": "stopping"}, 503)
        return JSONResponse({"status": "ok"})

    async def metrics(self, _: Request) -> Response:
        return Response(self._service.metrics.text(), media_type=CONTENT_TYPE)

    async def game_state(self, _: Request) -> Response:
        return JSONResponse(self._game.state())

    async def game_round(self, request: Request) -> Response:
        body = await read_json(request, self._service.limits)
        return EventStream(*await self._game.begin(body))

    async def game_vote(self, request: Request) -> Response:
        body = await read_json(request, self._service.limits)
        answer = await self._game.vote(body)
        self._service.metrics.votes.inc()
        return JSONResponse(answer)
