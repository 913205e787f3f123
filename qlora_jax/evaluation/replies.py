"""All replies to a list of requests, each as soon as it is complete."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from qlora_jax.generation.engine import Engine, FinishReason, Request


class Reply(NamedTuple):
    """A complete reply.

    Attributes:
        text: of the reply.
        tokens: of it, without the end token.
        finish_reason: why it ended.
    """

    text: str
    tokens: int
    finish_reason: FinishReason


def replies(engine: Engine, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
    """Sends all requests to an engine that is idle.

    Yields:
        The index of a request and its reply, in the order in which they are complete.

    Raises:
        ConfigError: a request can never fit; the others are not sent.
    """
    texts = {engine.submit(request): [] for request in requests}
    numbers = {request_id: i for i, request_id in enumerate(texts)}
    while engine.busy:
        for delta in engine.step():
            texts[delta.request_id].append(delta.text)
            if delta.finish_reason is not None:
                text = "".join(texts.pop(delta.request_id))
                yield numbers[delta.request_id], Reply(text, delta.tokens, delta.finish_reason)
