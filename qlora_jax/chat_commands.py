"""The commands of a chat: lines that begin with a slash.

A command changes the `Chat`, and says what is left to the one who called: something to show, a
message to have answered, or that the chat is over.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shlex
from collections.abc import Callable

from qlora_jax.chat import Chat
from qlora_jax.errors import ConfigError, DataError, UserError, nearest


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
