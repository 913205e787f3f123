"""The terminal of a chat: reads lines, shows replies while they grow.

At a keyboard, `readline` edits lines, keeps a history and completes commands; Ctrl-C stops a reply,
and only at an empty prompt, twice, the program. Where input is a pipe, replies go to standard
output and everything else to standard error, and a mistake ends the program with code 2.

A model can write any character. What a terminal would obey (escape sequences) is left out.
"""

from __future__ import annotations

import contextlib
import re
import readline
import signal
import sys
from collections.abc import Sequence
from typing import TextIO

from rich.cells import cell_len
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from qlora_jax.chat import Chat, Reply
from qlora_jax.chat_commands import COMMANDS, run_command
from qlora_jax.errors import UserError

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_NARROWEST_PAIR = 72  # columns; below, answers stand below each other
# \001 and \002 tell readline what has no width.
_PROMPT = "\001\033[1;36m\002›\001\033[0m\002 "
_MORE = "\001\033[2m\002…\001\033[0m\002 "
_BLOCK = '"""'


def printable(text: str) -> str:
    r"""Leaves out what a terminal would obey.

    >>> printable("a\x1b[2Jb\n\tc")
    'a[2Jb\n\tc'
    """
    return _CONTROLS.sub("", text)


def facts(reply: Reply) -> str:
    """What stands under a reply: how fast it was, and how it ended if not by itself."""
    parts = []
    if reply.first_s is not None:
        parts.append(f"{reply.first_s:.2f} s to the first token")
    if reply.tokens_per_s is not None:
        parts.append(f"{reply.tokens_per_s:.1f} tokens/s")
    parts.append(f"{reply.tokens} tokens")
    ends = {"length": "cut: /set max_new_tokens", "cancelled": "stopped"}
    if reply.finish_reason in ends:
        parts.append(ends[reply.finish_reason])
    return " · ".join(parts)


class WordWrap:
    r"""Breaks growing text between words, at the width of a terminal.

    A word that has no end yet waits for it, so that it never has to move to the next line.

    >>> wrap = WordWrap(8)
    >>> wrap.add("a long") + wrap.add("er wo") + wrap.add("rd\n\nb ") + wrap.end()
    'a longer\nword\n\nb '
    """

    def __init__(self, width: int):
        """Begins a line of so many columns."""
        self._width = width
        self._column = 0
        self._waiting = ""

    def add(self, text: str) -> str:
        """What can be shown once this text has come."""
        *words, self._waiting = re.split(r"(?<=\s)", self._waiting + text)
        return "".join(map(self._place, words))

    def end(self) -> str:
        """What is left when no more text comes."""
        word, self._waiting = self._waiting, ""
        return self._place(word)

    def _place(self, word: str) -> str:
        """A word with the space after it, in this line or the next; a long one over several."""
        length = cell_len(word.rstrip())
        begins = "\n" if self._column and self._column + length > self._width else ""
        self._column = 0 if begins else self._column
        self._column = 0 if word.endswith("\n") else (self._column + cell_len(word))
        return begins + (word.rstrip(" ") if self._column > self._width >= length else word)


def _clean(reply: Reply) -> str:
    return printable(reply.text).strip()


class StopKey:
    """Takes note of Ctrl-C instead of being interrupted by it, in the midst of a step or not.

    The second time it interrupts after all: then something hangs.
    """

    pressed = False

    def __enter__(self) -> StopKey:
        self._before = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _press(self, *_: object) -> None:
        if self.pressed:
            raise KeyboardInterrupt
        self.pressed = True


class Terminal:
    """Reads and shows a chat.

    Attributes:
        at_keyboard: whether a person sits there.
    """

    def __init__(self, chat: Chat, *, stdin: TextIO | None = None, console: Console | None = None):
        """Prepares the keyboard.

        Args:
            chat: the conversation.
            stdin: where lines come from; None: standard input.
            console: where replies go; None: standard output.
        """
        self._chat = chat
        self._stdin = stdin or sys.stdin
        self.at_keyboard = self._stdin.isatty()
        self._out = console or Console(highlight=False, soft_wrap=True)
        self._notes = self._out if self.at_keyboard else Console(stderr=True, highlight=False)
        if self.at_keyboard:
            readline.set_completer(self._complete)
            readline.set_completer_delims(" ")
            readline.parse_and_bind("tab: complete")

    def run(self) -> None:
        """Talks until the user leaves.

        Raises:
            UserError: input is a pipe, and something in it cannot be done.
        """
        interrupted = False
        while True:
            try:
                line = self._read()
            except EOFError:
                self._note("") if self.at_keyboard else None
                return
            except KeyboardInterrupt:
                empty = not readline.get_line_buffer()
                self._note("")
                if interrupted and empty:
                    return
                if empty:
                    self._note("Ctrl-C again, or /quit, leaves.")
                interrupted = empty
                continue
            interrupted = False
            try:
                if line.strip() and self._answer(line):
                    return
            except UserError as error:
                if not self.at_keyboard:
                    raise
                self._notes.print(Text(str(error), style="yellow"))

    def _answer(self, line: str) -> bool:
        """Does what a line says; returns whether the chat is over."""
        if not line.startswith("/"):
            self._say(line)
            return False
        outcome = run_command(self._chat, line)
        if outcome.text:
            self._note(outcome.text)
        if outcome.say is not None:
            self._say(outcome.say)
        if outcome.compare is not None:
            self._compare(*outcome.compare)
        return outcome.leave

    def _say(self, text: str) -> None:
        shown, reply = "", None
        wrap = WordWrap(self._out.width) if self.at_keyboard else None
        with contextlib.closing(self._chat.say(text)) as replies, StopKey() as stop:
            for reply in replies:
                # Space at the end waits: most replies end without it.
                ready = _clean(reply)
                new = ready[len(shown) :]
                self._write(wrap.add(new) if wrap else new)
                shown = ready
                if stop.pressed:
                    break
        self._write((wrap.end() if wrap else "") + "\n")
        if reply is not None:
            self._note(f"{self._chat.name(reply.adapter)} · {facts(reply)}")
            if self.at_keyboard:
                self._write("\n")

    def _compare(self, text: str, adapters: Sequence[str | None]) -> None:
        drawn = self.at_keyboard and self._out.is_terminal
        # What is higher than the terminal cannot be drawn again: it is shown whole in the end.
        live = Live(console=self._out, auto_refresh=False, transient=True) if drawn else None
        latest: list[Reply] = []
        with (
            live or contextlib.nullcontext(),
            contextlib.closing(self._chat.compare(text, adapters)) as replies,
            StopKey() as stop,
        ):
            for latest in replies:
                if live:
                    live.update(self._side_by_side(latest), refresh=True)
                if stop.pressed:
                    break
        if drawn:
            self._out.print(self._side_by_side(latest))
        else:
            for reply in latest:
                self._write(f"[{self._chat.name(reply.adapter)}]\n{_clean(reply)}\n")

    def _side_by_side(self, replies: Sequence[Reply]) -> Table | Group:
        panels = [
            Panel(
                Group(Text(_clean(reply)), Text(facts(reply), style="dim")),
                title=Text(self._chat.name(reply.adapter), style="bold"),
                border_style="dim",
            )
            for reply in replies
        ]
        if self._out.width < _NARROWEST_PAIR or len(panels) > 3:
            return Group(*panels)
        table = Table.grid(expand=True, padding=(0, 1))
        for _ in panels:
            table.add_column(ratio=1)
        table.add_row(*panels)
        return table

    def _read(self) -> str:
        """Reads one message, which may have several lines."""
        line = self._read_line(_PROMPT)
        if line.strip().startswith(_BLOCK):
            return self._read_block(line.strip()[len(_BLOCK) :])
        lines = [line]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(self._read_line(_MORE))
        return "\n".join(lines)

    def _read_block(self, line: str) -> str:
        lines = []
        while not line.rstrip().endswith(_BLOCK):
            lines.append(line)
            line = self._read_line(_MORE)
        lines.append(line.rstrip()[: -len(_BLOCK)])
        return "\n".join(lines).strip("\n")

    def _read_line(self, prompt: str) -> str:
        if self.at_keyboard:
            return input(prompt)
        line = self._stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n")

    def _write(self, text: str) -> None:
        self._out.file.write(text)
        self._out.file.flush()

    def _note(self, text: str) -> None:
        self._notes.print(Text(text, style="dim"), soft_wrap=True)

    def _complete(self, text: str, state: int) -> str | None:
        line = readline.get_line_buffer()
        if line.startswith("/adapter "):
            words = ["on", "off", *self._chat.adapters]
        elif line.startswith("/set "):
            words = [name for name in vars(self._chat.settings)]
        else:
            words = [f"/{name}" for name in COMMANDS] if line.startswith("/") else []
        matches = [f"{word} " for word in words if word.startswith(text)]
        return matches[state] if state < len(matches) else None
