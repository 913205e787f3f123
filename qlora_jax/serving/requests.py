"""What a client asks for: the bodies of `/v1/chat/completions` and `/v1/completions`.

The fields are those of OpenAI's API, with vLLM's further ones for sampling (`top_k`, `min_p`,
`repetition_penalty`). A field falls into one of four kinds:

- it is done: `temperature`, `top_p`, `max_tokens`, `max_completion_tokens`, `stop`, `seed`,
  `stream`, `stream_options.include_usage`, `model`;
- it cannot change the text, and is ignored: `user`, `metadata`, `store`, …;
- it would change the answer, and is refused with 400 unless it asks for nothing: `n` above 1,
  `tools`, `logprobs`, `response_format`, penalties, …;
- it is not a field of the API, and is refused, with the nearest name.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping
from typing import Any

from qlora_jax.generation import Sampling
from qlora_jax.serving.errors import ApiError
from qlora_jax.serving.fields import Fields, bad_field

Messages = list[dict[str, str]]
Prompt = str | list[int] | Messages

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_MOST_STOPS = 4
_LONGEST_STOP = 1000
_MOST_MESSAGES = 4096
_MOST_PROMPTS = 16
_MOST_TOKENS = 2**31 - 1
_SEEDS = 2**31
_IGNORED = (
    "user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention "
    "reasoning_effort verbosity parallel_tool_calls"
).split()


@dataclasses.dataclass(frozen=True)
class Ask:
    """One request, checked as far as that needs no tokenizer.

    Attributes:
        model: the name that was given; None: the server's own choice.
        prompts: each gets a reply; of a chat there is one.
        sampling: how to choose.
        max_new_tokens: of each reply; None: what has room.
        seed: of the random choices; drawn where none was given.
        stop: texts that end a reply.
        stream: whether the reply comes as events.
        include_usage: whether the last event counts tokens.
    """

    model: str | None
    prompts: tuple[Prompt, ...]
    sampling: Sampling
    max_new_tokens: int | None
    seed: int
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False


def parse_chat(body: Mapping[str, Any]) -> Ask:
    """Reads the body of `/v1/chat/completions`.

    Raises:
        ApiError: a field is missing, wrong, unknown, or asks for what is not there.

    >>> body = {"messages": [{"role": "user", "content": "Why?"}], "temperature": 0, "seed": 1}
    >>> parse_chat(body).prompts
    ([{'role': 'user', 'content': 'Why?'}],)
    """
    fields = Fields(body)
    messages = parse_messages(fields.needed("messages"))
    long = fields.integer("max_completion_tokens", 1, _MOST_TOKENS)
    limit = fields.integer("max_tokens", 1, _MOST_TOKENS)
    fields.refuse("logprobs", [False], "log probabilities are not given")
    fields.refuse("top_logprobs", [0], "log probabilities are not given")
    fields.refuse("tools", [[]], "there are no tools")
    fields.refuse("functions", [[]], "there are no functions")
    fields.refuse("tool_choice", ["none", "auto"], "there are no tools")
    fields.refuse("function_call", ["none", "auto"], "there are no functions")
    fields.refuse("response_format", [{"type": "text"}], "only {'type': 'text'} is there")
    fields.refuse("modalities", [["text"]], "only text is there")
    fields.refuse("audio", [], "only text is there")
    fields.ignore("prediction")
    return _ask(fields, (messages,), limit if long is None else long)


def parse_completion(body: Mapping[str, Any]) -> Ask:
    """Reads the body of `/v1/completions`.

    Raises:
        ApiError: see `parse_chat`.

    >>> parse_completion({"prompt": ["a", "b"], "max_tokens": 3}).prompts
    ('a', 'b')
    """
    fields = Fields(body)
    prompts = _parse_prompts(fields.needed("prompt"))
    limit = fields.integer("max_tokens", 1, _MOST_TOKENS, default=16)
    fields.refuse("logprobs", [], "log probabilities are not given")
    fields.refuse("echo", [False], "the prompt is not repeated")
    fields.refuse("suffix", [""], "text is continued, not filled in")
    fields.refuse("best_of", [1], "one reply is made")
    return _ask(fields, prompts, limit)


def _ask(fields: Fields, prompts: tuple[Prompt, ...], limit: int | None) -> Ask:
    """Reads what both bodies share."""
    fields.refuse("n", [1], "one reply a prompt is made; send several requests for more")
    for name in ("frequency_penalty", "presence_penalty"):
        fields.refuse(name, [0], "is not there; repetition_penalty is")
    fields.refuse("logit_bias", [{}], "is not there")
    fields.ignore(*_IGNORED)
    sampling = Sampling(
        temperature=fields.number("temperature", 0, 2, default=1.0),
        top_k=max(0, fields.integer("top_k", -1, _MOST_TOKENS, default=0)),
        top_p=fields.number("top_p", 1e-6, 1, default=1.0),
        min_p=fields.number("min_p", 0, 1, default=0.0),
        repetition_penalty=fields.number("repetition_penalty", 0.01, 100, default=1.0),
    )
    seed = fields.integer("seed", -(2**63), 2**63 - 1)
    stream = fields.boolean("stream")
    options = _parse_stream_options(fields.get("stream_options"), stream)
    ask = Ask(
        model=fields.text("model"),
        prompts=prompts,
        sampling=sampling,
        max_new_tokens=limit,
        seed=secrets.randbelow(_SEEDS) if seed is None else seed % _SEEDS,
        stop=_parse_stops(fields.get("stop")),
        stream=stream,
        include_usage=options,
    )
    fields.finish()
    return ask


def parse_messages(value: Any) -> Messages:
    """Checks a conversation, and writes its contents as plain texts.

    Raises:
        ApiError: a message is not one, or holds something else than text.

    >>> parse_messages([{"role": "developer", "content": [{"type": "text", "text": "Be kind."}]}])
    [{'role': 'system', 'content': 'Be kind.'}]
    """
    if not isinstance(value, list) or not value:
        raise bad_field("messages", "must be a list of at least one message")
    if len(value) > _MOST_MESSAGES:
        raise bad_field("messages", f"must be at most {_MOST_MESSAGES}, got {len(value)}")
    return [_parse_message(f"messages[{i}]", message) for i, message in enumerate(value)]


def _parse_message(where: str, message: Any) -> dict[str, str]:
    if not isinstance(message, dict):
        raise bad_field(where, "must be an object with role and content")
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise bad_field(f"{where}.role", f"must be one of {', '.join(_ROLES)}")
    for name in ("tool_calls", "function_call", "audio"):
        if message.get(name):
            raise bad_field(f"{where}.{name}", "is not there", code="unsupported_value")
    return {
        "role": _ROLES[role],
        "content": _parse_content(f"{where}.content", message.get("content")),
    }


def _parse_content(where: str, content: Any) -> str:
    if isinstance(content, list):
        parts = content
        for part in parts:
            if not isinstance(part, dict) or part.get("type") != "text":
                raise bad_field(where, "only parts of type 'text' are there")
            if not isinstance(part.get("text"), str):
                raise bad_field(where, "a part of type 'text' needs a text")
        content = "".join(part["text"] for part in parts)
    if not isinstance(content, str):
        raise bad_field(where, "must be a text, or a list of parts of type 'text'")
    return _check_text(where, content)


def _check_text(where: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise bad_field(where, "has half of a surrogate pair; write the character") from None
    return text


def _parse_prompts(value: Any) -> tuple[Prompt, ...]:
    if isinstance(value, str):
        return (_check_text("prompt", value),)
    if not isinstance(value, list) or not value:
        raise bad_field("prompt", "must be a text, a list of texts, or token ids")
    if all(_is_id(item) for item in value):
        return (value,)
    if len(value) > _MOST_PROMPTS:
        raise bad_field("prompt", f"at most {_MOST_PROMPTS} prompts at once, got {len(value)}")
    for item in value:
        ids = isinstance(item, list) and item and all(_is_id(i) for i in item)
        if not ids and not isinstance(item, str):
            raise bad_field("prompt", "must be a text, a list of texts, or token ids")
    return tuple(_check_text("prompt", item) if isinstance(item, str) else item for item in value)


def _is_id(item: Any) -> bool:
    return isinstance(item, int) and not isinstance(item, bool)


def _parse_stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value or []
    if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
        raise bad_field("stop", "must be a text, or a list of texts, none of them empty")
    if len(stops) > _MOST_STOPS or any(len(stop) > _LONGEST_STOP for stop in stops):
        raise bad_field("stop", f"at most {_MOST_STOPS} texts of at most {_LONGEST_STOP} letters")
    return tuple(stops)


def _parse_stream_options(value: Any, stream: bool) -> bool:
    if value is None:
        return False
    if not stream:
        raise bad_field("stream_options", "may only be given with stream: true")
    if not isinstance(value, dict):
        raise bad_field("stream_options", "must be an object")
    fields = Fields(value, "stream_options.")
    include_usage = fields.boolean("include_usage")
    fields.ignore("include_obfuscation", "continuous_usage_stats")
    fields.finish()
    return include_usage


def unknown_model(name: str, known: list[str], nearest: str | None) -> ApiError:
    """The error that no model has this name."""
    hint = f"; did you mean {nearest!r}?" if nearest else ""
    return ApiError(
        404,
        f"there is no model {name!r} here, only {', '.join(map(repr, known))}{hint}",
        code="model_not_found",
        param="model",
    )
