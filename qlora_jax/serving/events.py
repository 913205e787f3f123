"""Server-sent events, and the objects of OpenAI's API that travel in them."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from qlora_jax.serving.errors import ApiError
from qlora_jax.serving.requests import Ask
from qlora_jax.serving.scheduler import EngineFailedError
from qlora_jax.serving.service import Answers

DONE = b"data: [DONE]\n\n"


def event(value: Any) -> bytes:
    r"""One event.

    >>> event({"a": "1\n2"})
    b'data: {"a":"1\\n2"}\n\n'
    """
    return f"data: {json.dumps(value, separators=(',', ':'))}\n\n".encode()


class EventStream(StreamingResponse):
    """A stream of events that frees what it holds, however it ends.

    Without it, a client that leaves while an event is being sent would have its reply computed to
    the end: nothing closes a generator that is not running.
    """

    def __init__(self, events: AsyncIterator[bytes], on_end: Callable[[], None]):
        # Proxies (nginx) would else keep events back until a buffer is full.
        super().__init__(
            _with_errors(events),
            media_type="text/event-stream",
            headers={"x-accel-buffering": "no"},
        )
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()


async def _with_errors(events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Tells a client what broke a stream whose status was sent long ago."""
    try:
        async for one in events:
            yield one
    except EngineFailedError as error:
        yield event(ApiError(500, str(error), code="engine_failed").body())
    yield DONE


async def unless_gone[T](request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """Awaits `work`, but cancels it and returns None when the client goes away."""
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        return await working if working.done() else None
    finally:
        working.cancel()
        watching.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class ChatFormat:
    """The objects of `/v1/chat/completions`."""

    prefix, whole, part = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def begin(self) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": ""}}

    def piece(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}

    def choice(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}


class TextFormat:
    """The objects of `/v1/completions`."""

    prefix, whole, part = "cmpl-", "text_completion", "text_completion"

    def begin(self) -> None:
        return None

    def piece(self, text: str) -> dict[str, Any]:
        return {"text": text}

    choice = piece


Format = ChatFormat | TextFormat


def _head(form: Format, answers: Answers, kind: str) -> dict[str, Any]:
    return {
        "id": form.prefix + uuid.uuid4().hex,
        "object": kind,
        "created": int(time.time()),
        "model": answers.all[0].model,
    }


async def completion_events(form: Format, ask: Ask, answers: Answers) -> AsyncIterator[bytes]:
    """The events of a streamed completion, but for the last one.

    Args:
        form: of the chat or of texts.
        ask: what was asked for.
        answers: the replies.

    Yields:
        Events: for each choice its beginning, its pieces, its end; then the usage, if asked for.
    """
    head = _head(form, answers, form.part)
    usage = {"usage": None} if ask.include_usage else {}

    def chunk(index: int, content: dict[str, Any], finish_reason: str | None = None) -> bytes:
        choice = {"index": index, **content, "logprobs": None, "finish_reason": finish_reason}
        return event({**head, "choices": [choice], **usage})

    if (begin := form.begin()) is not None:
        for index in range(len(answers.all)):
            yield chunk(index, begin)
    async for index, delta in answers:
        if delta.text:
            yield chunk(index, form.piece(delta.text))
        if delta.finish_reason is not None:
            yield chunk(index, form.piece(""), delta.finish_reason)
    if ask.include_usage:
        yield event({**head, "choices": [], "usage": answers.usage()})


async def completion(form: Format, answers: Answers) -> dict[str, Any]:
    """A completion as one object, when all its replies have ended."""
    texts = [""] * len(answers.all)
    async for index, delta in answers:
        texts[index] += delta.text
    choices = [
        {
            "index": index,
            **form.choice(text),
            "logprobs": None,
            "finish_reason": answer.finish_reason,
        }
        for index, (text, answer) in enumerate(zip(texts, answers.all, strict=True))
    ]
    return {**_head(form, answers, form.whole), "choices": choices, "usage": answers.usage()}
