"""What is asked of the engine, and what it says."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from qlora_jax.sampling import Sampling

FinishReason = Literal["stop", "length", "cancelled"]


@dataclasses.dataclass(frozen=True)
class Request:
    """What to reply to, and how.

    Attributes:
      prompt_ids: at least one token.
      max_new_tokens: at most so many tokens.
      sampling: how tokens are chosen.
      seed: of the random choices.
      stop: texts that end the reply, besides the model's end tokens and the tokenizer's own.
      adapter: a name in `Engine.adapters`; None: the base alone.
    """

    prompt_ids: Sequence[int]
    max_new_tokens: int = 256
    sampling: Sampling = Sampling()
    seed: int = 0
    stop: Sequence[str] = ()
    adapter: str | None = None


@dataclasses.dataclass(frozen=True)
class Delta:
    """What is new in a reply.

    Attributes:
      request_id: of `Engine.submit`.
      text: that follows the text so far; never part of a stop string, never half a character.
      tokens: of the reply so far, without the end token.
      finish_reason: None while the reply goes on.
    """

    request_id: int
    text: str
    tokens: int
    finish_reason: FinishReason | None = None
