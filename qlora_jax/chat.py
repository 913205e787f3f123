"""A conversation with a base and its adapters.

Nothing here reads a keyboard or draws: `Chat` holds the turns and the settings and yields the
pieces of replies. `chat_commands` steers it, and `chat_terminal` is the face of both.
"""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Iterator, Sequence

from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.errors import ConfigError, DataError, nearest
from qlora_jax.generation import Engine, Request, Sampling, encode_prompt

# Of the QLoRA paper's chat evaluation (section 5.2): nucleus sampling, p = 0.9, temperature 0.7.
TEMPERATURE, TOP_P = 0.7, 0.9


@dataclasses.dataclass(frozen=True)
class Settings:
    """What `/set` changes.

    Attributes:
        temperature: see `Sampling`.
        top_p: see `Sampling`.
        top_k: see `Sampling`.
        min_p: see `Sampling`.
        repetition_penalty: see `Sampling`.
        max_new_tokens: the longest reply.
        seed: of the random choices; -1 draws another one for each reply.
    """

    temperature: float = TEMPERATURE
    top_p: float = TOP_P
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 512
    seed: int = -1

    def sampling(self) -> Sampling:
        """The settings as the engine takes them."""
        names = [field.name for field in dataclasses.fields(Sampling)]
        return Sampling(**{name: getattr(self, name) for name in names})

    def changed(self, name: str, text: str) -> Settings:
        """The same settings with another value of one.

        Raises:
            ConfigError: there is no such setting, or it cannot have this value.

        >>> Settings().changed("temperature", "0").temperature
        0.0
        """
        kinds = {field.name: type(field.default) for field in dataclasses.fields(self)}
        if name not in kinds:
            match = nearest(name, kinds)
            hint = f"did you mean {match}?" if match else f"there are {', '.join(kinds)}"
            raise ConfigError(f"there is no setting {name!r}; {hint}")
        try:
            value = kinds[name](text)
        except ValueError:
            kind = {int: "a whole number", float: "a number"}[kinds[name]]
            raise ConfigError(f"{name}: got {text!r}, needs to be {kind}") from None
        changed = dataclasses.replace(self, **{name: value})
        changed.sampling().validate()
        if changed.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1, got {value}")
        return changed


@dataclasses.dataclass
class Reply:
    """One reply, while it grows and after.

    Attributes:
        adapter: whose it is; None: the base's.
        text: so far.
        tokens: so far.
        finish_reason: None while it grows.
        first_s: seconds until the first text, or None.
        took_s: seconds until now.
    """

    adapter: str | None
    text: str = ""
    tokens: int = 0
    finish_reason: str | None = None
    first_s: float | None = None
    took_s: float = 0.0

    @property
    def tokens_per_s(self) -> float | None:
        """The speed after the first token, which comes with reading the prompt; None if unknown."""
        if self.tokens < 2 or self.first_s is None or self.took_s <= self.first_s:
            return None
        return (self.tokens - 1) / (self.took_s - self.first_s)


class Chat:
    """The turns of a conversation, and who answers.

    Attributes:
        messages: the turns so far, without the system prompt.
        system: the system prompt, or "".
        adapter: who answers; None: the base alone.
        settings: how.
        base_name: what the base is called.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        *,
        base_name: str = "base",
        system: str = "",
        settings: Settings | None = None,
    ):
        """Begins a conversation; the first adapter answers, where there is one.

        Args:
            engine: not used by anyone else.
            tokenizer: the model's; with a chat template.
            base_name: what the base is called.
            system: the system prompt.
            settings: how replies are made.
        """
        if tokenizer.chat_template is None:
            raise DataError(
                "this model has no chat template: it continues texts and does not answer. Take "
                "the instruct model, or train with --config.data.chat_format=NAME"
            )
        self._engine = engine
        self._tokenizer = tokenizer
        self.messages: list[dict[str, str]] = []
        self.system = system
        self.settings = settings or Settings()
        self.adapter: str | None = next(iter(engine.adapters), None)
        self.base_name = base_name

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters."""
        return self._engine.adapters

    def name(self, adapter: str | None) -> str:
        """What to call an adapter, or the base."""
        return self.base_name if adapter is None else adapter

    def say(self, text: str) -> Iterator[Reply]:
        """Adds a message and its reply to the conversation.

        The reply stays as far as it came when the iterator is closed before its end; without any
        text the message is taken back.

        Args:
            text: the user's message.

        Yields:
            The reply, each time it has grown.

        Raises:
            ConfigError: the conversation has become too long.
        """
        turn = {"role": "user", "content": text}
        reply = None
        replies = self._generate([*self.messages, turn], [self.adapter])
        try:
            for [reply] in replies:
                yield reply
        finally:
            replies.close()
            if reply is not None and reply.text.strip():
                self.messages += [turn, {"role": "assistant", "content": reply.text.strip()}]

    def compare(self, text: str, adapters: Sequence[str | None]) -> Iterator[list[Reply]]:
        """Lets several answer the same message; the conversation stays as it was.

        Args:
            text: the user's message.
            adapters: who answers.

        Yields:
            All replies, each time one has grown.
        """
        yield from self._generate([*self.messages, {"role": "user", "content": text}], adapters)

    def retry(self) -> str:
        """Takes the last message and its reply back.

        Returns:
            The message, to be said again.

        Raises:
            DataError: nothing was said yet.
        """
        if not self.messages:
            raise DataError("nothing was said yet; write a message")
        message, _ = self.messages[-2:]
        del self.messages[-2:]
        return message["content"]

    def last_message(self) -> str:
        """The user's last message.

        Raises:
            DataError: nothing was said yet.
        """
        if not self.messages:
            raise DataError("nothing was said yet; write the message after the command")
        return self.messages[-2]["content"]

    def _generate(
        self, messages: list[dict[str, str]], adapters: Sequence[str | None]
    ) -> Iterator[list[Reply]]:
        started = time.perf_counter()
        replies: dict[int, Reply] = {}
        try:
            for request in self._requests(messages, adapters):
                replies[self._engine.submit(request)] = Reply(request.adapter)
            while any(reply.finish_reason is None for reply in replies.values()):
                for delta in self._engine.step():
                    reply = replies[delta.request_id]
                    reply.text += delta.text
                    reply.tokens, reply.finish_reason = delta.tokens, delta.finish_reason
                    reply.took_s = time.perf_counter() - started
                    if delta.text and reply.first_s is None:
                        reply.first_s = reply.took_s
                yield list(replies.values())
        finally:
            self._cancel(replies)

    def _requests(
        self, messages: list[dict[str, str]], adapters: Sequence[str | None]
    ) -> Iterator[Request]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        ids = encode_prompt(self._tokenizer, [*system, *messages])
        room = self._engine.max_len - len(ids)
        if room < 1:
            raise ConfigError(
                f"the conversation has {len(ids)} tokens, and the model sees "
                f"{self._engine.max_len}; /reset begins another one"
            )
        seed = self.settings.seed
        seed = secrets.randbelow(2**31) if seed < 0 else seed
        limit = min(self.settings.max_new_tokens, room)
        for adapter in adapters:
            yield Request(ids, limit, self.settings.sampling(), seed, (), adapter)

    def _cancel(self, replies: dict[int, Reply]) -> None:
        """Ends what is unfinished, and takes what the engine has to say about it."""
        unfinished = [key for key, reply in replies.items() if reply.finish_reason is None]
        for key in unfinished:
            self._engine.cancel(key)
        while self._engine.busy:
            for delta in self._engine.step():
                replies[delta.request_id].finish_reason = delta.finish_reason
