"""A reply as it grows, for whoever wants one at a time."""

from collections.abc import Iterator, Sequence

from qlora_jax.errors import ConfigError
from qlora_jax.generation.batches import Prompt, encode_prompt
from qlora_jax.generation.engine import Engine, Request
from qlora_jax.sampling import Sampling


def stream(
    engine: Engine,
    prompt: Prompt,
    *,
    max_new_tokens: int = 256,
    sampling: Sampling | None = None,
    seed: int = 0,
    stop: Sequence[str] = (),
    adapter: str | None = None,
) -> Iterator[str]:
    """Yields the pieces of a reply; together they are the reply.

    Whoever stops iterating (`break`, Ctrl-C) stops the reply. What the engine has read stays: the
    next prompt that begins with the same tokens, such as a conversation's next turn, reads on.

    Args:
      engine: with nothing to do; `Engine(model, tokenizer, slots=1)` is enough.
      prompt: a text, which is continued, or a conversation, which is answered; see `generate`.
      max_new_tokens: at most so many tokens.
      sampling: how tokens are chosen; None is greedy.
      seed: of the random choices.
      stop: texts that end the reply.
      adapter: a name in `engine.adapters`; None: the base alone.

    Raises:
      ConfigError: the engine is busy, a setting is out of range, or the prompt is too long.
      DataError: the prompt cannot be used.

    Example:
      >>> for text in stream(Engine(model, tokenizer, slots=1), "Once"):  # doctest: +SKIP
      ...     print(text, end="", flush=True)
    """
    if engine.busy:
        raise ConfigError("the engine has other requests; use its submit() and step().")
    ids = encode_prompt(engine.tokenizer, prompt)
    request = Request(ids, max_new_tokens, sampling or Sampling(), seed, stop, adapter)
    return _pieces(engine, engine.submit(request))


def _pieces(engine: Engine, request_id: int) -> Iterator[str]:
    try:
        while engine.busy:
            for delta in engine.step():
                if delta.text:
                    yield delta.text
    finally:
        engine.cancel(request_id)
        engine.step()  # which says no more than that it was cancelled
