"""A conversation with a base and its adapters, and the commands that steer it.

Nothing here reads a keyboard or draws: `Chat` holds the turns and the settings and yields the
pieces of replies; `run_command` answers a line that begins with a slash. `chat_terminal` is their
face.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import secrets
import shlex
import time
from collections.abc import Callable, Iterator, Sequence

from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.errors import ConfigError, DataError, UserError, nearest
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


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a command asks its caller to do.

    Attributes:
        text: to be shown.
        say: a message to be answered, or None.
        compare: a message to be answered by all of these, or None.
        leave: whether the chat is over.
    """

    text: str = ""
    say: str | None = None
    compare: tuple[str, tuple[str | None, ...]] | None = None
    leave: bool = False


def _help(chat: Chat, rest: str) -> Outcome:
    width = max(len(usage) for usage, _, _ in COMMANDS.values()) + 3
    lines = [f"{'/' + usage:<{width}}{about}" for usage, about, _ in COMMANDS.values()]
    keys = [
        'A line that ends with \\ goes on in the next one; """ begins and ends several lines.',
        "Ctrl-C stops a reply. At an empty prompt, twice leaves; so does Ctrl-D.",
    ]
    return Outcome("\n".join([*lines, *keys]))


def _reset(chat: Chat, rest: str) -> Outcome:
    chat.messages.clear()
    return Outcome("A new conversation.")


def _system(chat: Chat, rest: str) -> Outcome:
    if not rest:
        return Outcome(f"System prompt: {chat.system}" if chat.system else "No system prompt.")
    chat.system = "" if rest == "off" else rest
    chat.messages.clear()
    return Outcome("A new conversation, " + ("with that." if chat.system else "without one."))


def _adapter(chat: Chat, rest: str) -> Outcome:
    if not chat.adapters:
        raise ConfigError("no adapter was loaded: start with --workdir or --adapter")
    if rest == "off":
        chat.adapter = None
    elif rest == "on":
        chat.adapter = chat.adapter or chat.adapters[0]
    elif rest in chat.adapters:
        chat.adapter = rest
    elif rest:
        names = [*chat.adapters, "on", "off"]
        match = nearest(rest, names)
        hint = f"did you mean {match}?" if match else f"there are {', '.join(names)}"
        raise ConfigError(f"there is no adapter {rest!r}; {hint}")
    shown = [f"[{name}]" if name == chat.adapter else name for name in chat.adapters]
    off = "off" if chat.adapter else "[off]"
    return Outcome(f"Adapter: {' '.join([off, *shown])}")


def _compare(chat: Chat, rest: str) -> Outcome:
    if not chat.adapters:
        raise ConfigError("no adapter was loaded: there is nothing to compare the base with")
    text = rest or chat.last_message()
    # All of them, where there are several: the base is what they have in common.
    return Outcome(compare=(text, (None, *chat.adapters)))


def _retry(chat: Chat, rest: str) -> Outcome:
    return Outcome(say=chat.retry())


def _set(chat: Chat, rest: str) -> Outcome:
    if rest:
        name, _, value = rest.replace("=", " ", 1).partition(" ")
        if not value.strip():
            raise ConfigError(f"/set {name}: write the value, too, as in /set temperature 0.7")
        chat.settings = chat.settings.changed(name, value.strip())
    values = dataclasses.asdict(chat.settings).items()
    return Outcome("   ".join(f"{name} {value:g}" for name, value in values))


def _save(chat: Chat, rest: str) -> Outcome:
    path = pathlib.Path(*shlex.split(rest)[:1]).expanduser() if rest else None
    if path is None or path.suffix != ".jsonl":
        raise ConfigError("write a file that ends in .jsonl, as in /save chats.jsonl")
    if not chat.messages:
        raise DataError("nothing was said yet; there is nothing to save")
    system = [{"role": "system", "content": chat.system}] if chat.system else []
    record = json.dumps({"messages": [*system, *chat.messages]}, ensure_ascii=False)
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(record + "\n")
        count = sum(1 for line in path.read_text("utf-8").split("\n") if line.strip())
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None
    return Outcome(
        f"Added to {path} ({count} {'conversation' if count == 1 else 'conversations'}); train on "
        f"it with --config.data.path={path}"
    )


def _quit(chat: Chat, rest: str) -> Outcome:
    return Outcome(leave=True)


Command = Callable[[Chat, str], Outcome]
COMMANDS: dict[str, tuple[str, str, Command]] = {
    "help": ("help", "this list", _help),
    "adapter": ("adapter [on|off|NAME]", "with the adapter or without; which", _adapter),
    "compare": ("compare [MESSAGE]", "all answer it, side by side (else your last one)", _compare),
    "retry": ("retry", "answer the last message again", _retry),
    "set": ("set [NAME VALUE]", "settings, as in /set temperature 0.7", _set),
    "system": ("system [TEXT|off]", "the system prompt; begins a new conversation", _system),
    "reset": ("reset", "a new conversation", _reset),
    "save": ("save FILE.jsonl", "adds the conversation to a file to train on", _save),
    "quit": ("quit", "leaves", _quit),
}


def run_command(chat: Chat, line: str) -> Outcome:
    """Does what a line that begins with a slash says.

    Args:
        chat: is changed by it.
        line: for example "/adapter off".

    Returns:
        What is left to the caller.

    Raises:
        UserError: the command is unknown, or cannot be done.
    """
    name, _, rest = line[1:].strip().partition(" ")
    if name not in COMMANDS:
        match = nearest(name, COMMANDS)
        hint = f"did you mean /{match}?" if match else "/help lists them"
        raise UserError(f"there is no command /{name}; {hint}")
    return COMMANDS[name][2](chat, rest.strip())
