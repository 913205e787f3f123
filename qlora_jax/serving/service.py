"""From what a client asks for to replies of the engine: names, tokens, limits, counts."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Sequence

from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.errors import ConfigError, DataError, nearest
from qlora_jax.generation import Delta, Engine, Request, encode_prompt
from qlora_jax.serving.errors import ApiError
from qlora_jax.serving.fields import bad_field
from qlora_jax.serving.metrics import Metrics
from qlora_jax.serving.requests import Ask, Prompt, unknown_model
from qlora_jax.serving.scheduler import EngineFailedError, QueueFullError, Replies, Scheduler


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one request, and all of them together, may take.

    Attributes:
        body_bytes: the longest body.
        body_s: the longest time that a body may take to arrive, in seconds.
        new_tokens: the longest reply.
        waiting: how many replies may wait for a slot of the engine.
    """

    body_bytes: int = 1 << 20
    body_s: float = 30.0
    new_tokens: int = 2048
    waiting: int = 64


@dataclasses.dataclass
class Answer:
    """What is known of a reply so far.

    Attributes:
        model: the name that it was asked from.
        prompt_tokens: of its prompt.
        completion_tokens: generated so far.
        finish_reason: None until it ends.
    """

    model: str
    prompt_tokens: int
    completion_tokens: int = 0
    finish_reason: str | None = None


class Answers:
    """The replies to one request; iterate for (index, delta) until all have ended.

    Attributes:
        all: what is known of each.
    """

    def __init__(self, replies: Replies, answers: Sequence[Answer], metrics: Metrics):
        self.all = list(answers)
        self._replies = replies
        self._metrics = metrics
        self._started = time.perf_counter()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Delta]]:
        has_text = False
        async for index, delta in self._replies:
            answer = self.all[index]
            new_tokens = delta.tokens - answer.completion_tokens
            self._metrics.completion_tokens.labels(answer.model).inc(new_tokens)
            answer.completion_tokens = delta.tokens
            answer.finish_reason = delta.finish_reason
            took_s = time.perf_counter() - self._started
            if delta.text and not has_text:
                has_text = True
                self._metrics.first_token.observe(took_s)
            if delta.finish_reason is not None:
                self._metrics.finished.labels(answer.model, delta.finish_reason).inc()
                self._metrics.reply.observe(took_s)
            yield index, delta

    def usage(self) -> dict[str, int]:
        """Tokens of all prompts and replies, as OpenAI's API counts them."""
        prompt = sum(answer.prompt_tokens for answer in self.all)
        completion = sum(answer.completion_tokens for answer in self.all)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }

    def close(self) -> None:
        """Cancels what has not ended, and counts it."""
        for answer in self.all:
            if answer.finish_reason is None:
                self._metrics.finished.labels(answer.model, "cancelled").inc()
                answer.finish_reason = "cancelled"
        self._replies.cancel()


class Service:
    """A base and its adapters behind names.

    Attributes:
        engine: what generates.
        tokenizer: the model's.
        base_name: the name of the base alone.
        adapters: names of its adapters.
        default: the model of requests that name none: the first adapter, else the base.
        limits: what a request may take.
        scheduler: what runs the engine.
        metrics: what is counted.
        created: when the server started, in seconds since 1970.
        draining: whether the server is about to stop.
    """

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, *, base_name: str, limits: Limits | None = None
    ):
        """Puts names to an engine.

        Args:
            engine: with the adapters; not used by anyone else from now on.
            tokenizer: the model's.
            base_name: what clients call the base.
            limits: what a request may take.

        Raises:
            ConfigError: an adapter has the name of the base.
        """
        if base_name in engine.adapters:
            raise ConfigError(f"an adapter is called {base_name!r}, as the base is; rename it")
        self.engine = engine
        self.tokenizer = tokenizer
        self.base_name = base_name
        self.adapters = tuple(engine.adapters)
        self.default = next(iter(self.adapters), base_name)
        self.limits = limits or Limits()
        self.scheduler = Scheduler(engine, max_waiting=self.limits.waiting)
        self.metrics = Metrics(self.scheduler)
        self.created = int(time.time())
        self.draining = False

    @property
    def models(self) -> tuple[str, ...]:
        """All names, the base first."""
        return (self.base_name, *self.adapters)

    def find(self, name: str | None) -> str:
        """The name of a model that is there.

        Raises:
            ApiError: there is none of that name.
        """
        if name is None:
            return self.default
        if name not in self.models:
            raise unknown_model(name[:200], list(self.models), nearest(name[:200], self.models))
        return name

    async def begin(self, asks: Sequence[Ask]) -> Answers:
        """Queues one request, or several whose replies belong together.

        Args:
            asks: at least one; of each, all prompts.

        Returns:
            The replies, in the order of the asks and, within each, of its prompts.

        Raises:
            ApiError: a prompt cannot be used or is too long, or there is no room.
        """
        if self.draining:
            raise ApiError(503, "the server is stopping", code="stopping")
        names = [self.find(ask.model) for ask in asks for _ in ask.prompts]
        pairs = [(ask, prompt) for ask in asks for prompt in ask.prompts]
        requests = await asyncio.to_thread(
            lambda: [self._request(name, *pair) for name, pair in zip(names, pairs, strict=True)]
        )
        try:
            replies = await self.scheduler.submit(requests)
        except QueueFullError as error:
            raise ApiError(
                429,
                f"the server is busy: {error}. Try again in {error.retry_after_s} s",
                code="queue_full",
                headers={"retry-after": str(error.retry_after_s)},
            ) from None
        except EngineFailedError as error:
            raise ApiError(503, str(error), code="engine_failed") from None
        except ConfigError as error:
            raise ApiError(400, str(error)) from None
        answers = [
            Answer(name, len(request.prompt_ids))
            for name, request in zip(names, requests, strict=True)
        ]
        for answer in answers:
            self.metrics.prompt_tokens.labels(answer.model).inc(answer.prompt_tokens)
        return Answers(replies, answers, self.metrics)

    def _request(self, name: str, ask: Ask, prompt: Prompt) -> Request:
        ids = self._encode(prompt)
        limit, room = self.limits.new_tokens, self.engine.max_len - len(ids)
        wanted = ask.max_new_tokens
        if wanted is not None and wanted > limit:
            raise bad_field("max_tokens", f"this server gives at most {limit}, got {wanted}")
        if room < (wanted or 1):
            more = f" and {wanted} of the reply" if wanted else ""
            raise ApiError(
                400,
                f"the model's context is {self.engine.max_len} tokens; the prompt has {len(ids)}"
                f"{more}. Shorten the prompt or the reply",
                code="context_length_exceeded",
                param="messages" if _is_chat(prompt) else "prompt",
            )
        return Request(
            prompt_ids=ids,
            max_new_tokens=min(limit, room) if wanted is None else wanted,
            sampling=ask.sampling,
            seed=ask.seed,
            stop=ask.stop,
            adapter=None if name == self.base_name else name,
        )

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, list) and isinstance(prompt[0], int):
            size = self.tokenizer.vocab_size
            if not all(0 <= token < size for token in prompt):
                raise bad_field("prompt", f"token ids are from 0 to {size - 1}")
            return prompt
        try:
            return encode_prompt(self.tokenizer, prompt)
        except DataError as error:
            param = "messages" if _is_chat(prompt) else "prompt"
            raise ApiError(400, str(error), param=param) from None


def _is_chat(prompt: Prompt) -> bool:
    return isinstance(prompt, list) and isinstance(prompt[0], dict)
