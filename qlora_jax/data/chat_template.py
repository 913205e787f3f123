"""Chat templates: the Jinja text that a model brings along to write a conversation its way.

A template comes with a model from anywhere, so it is untrusted code. Jinja's immutable sandbox
keeps it from Python's insides, but not from `'a' * 10**9`, from loops in loops, or from
`'%1000000000d' | format(1)`; and too many operations on strings and lists can take all memory to
forbid each. So templates are rendered in a process of their own (`template_worker.py`), which has
512 MB of memory and a few seconds for each conversation, and is ended when it takes more. It is
started with the first conversation and stays. What a conversation then costs is a message there and
one back; all the texts that finding its answers takes (`data/spans.py`) go in one.

One thing differs from transformers. Templates such as those of Llama 3.1 and 3.2 write the date of
today into the system turn. Here it is always 26 Jul 2024, the date to which Llama's own template
falls back where there is no clock: training data that changed overnight could not be continued to
the bit, and what is asked of the model afterwards should look like what it was trained on.
"""

import contextlib
import itertools
import json
import os
import select
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qlora_jax.data import template_worker
from qlora_jax.errors import DataError

RENDER_SECONDS = 10.0  # a conversation takes a fraction of a millisecond
_NEEDED = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME")  # by some Pythons, to start
_START_SECONDS = 120.0
_MOST_REQUEST_BYTES = 32 << 20
_MOST_TEMPLATES = 64
_MOST_TEXTS, _MOST_CHARACTERS = 256, 32 << 20  # at once
_FIX = "Correct chat_template.jinja or tokenizer_config.json in the model's folder."


def render_chat_template(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = False,
    special_tokens: Mapping[str, str] | None = None,
) -> str:
    """Writes a conversation as one text.

    Args:
      template: Jinja source.
      messages: dictionaries with "role", "content" and whatever else the template reads; what JSON
        has no name for becomes text.
      add_generation_prompt: end with the header of the assistant's turn.
      special_tokens: further variables, such as "bos_token".

    Returns:
      The text, special tokens included as they are written.

    Raises:
      DataError: the template is not valid, calls `raise_exception`, fails on these messages, takes
        more time or memory than any conversation needs, or writes more than a million characters
        beyond sixteen times the conversation.

    Example:
      >>> template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
      >>> render_chat_template(template, [{"role": "user", "content": "hi"}])
      '<user>hi'
      >>> render_chat_template("{{ raise_exception('roles must alternate') }}", [])
      Traceback (most recent call last):
      ...
      qlora_jax.errors.DataError: the chat template refused the conversation (roles: none): roles...
    """
    wanted = [(len(messages), add_generation_prompt)]
    answer = _ask(template, _variables(messages, special_tokens), wanted)
    if "texts" in answer:
        return answer["texts"][0]
    reason = answer["reason"].rstrip(".")
    match answer["failure"]:
        case "refused":
            roles = ", ".join(str(message.get("role")) for message in messages[:8]) or "none"
            raise DataError(
                f"the chat template refused the conversation (roles: {roles}): {reason}. "
                "Each message needs the role and content that the model's template expects."
            )
        case "syntax":
            raise DataError(f"the model's chat template is not valid Jinja: {reason}. {_FIX}")
        case "length":
            raise DataError(f"the model's chat template wrote a text of {reason}. {_FIX}")
        case "memory":
            raise DataError(f"the model's chat template needs more than {reason}. {_FIX}")
    raise DataError(f"the model's chat template {reason}. {_FIX}")


def render_prefixes(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    wanted: Sequence[tuple[int, bool]],
    *,
    special_tokens: Mapping[str, str] | None = None,
) -> list[str] | None:
    """Writes several beginnings of a conversation.

    Args:
      template: Jinja source.
      messages: see `render_chat_template`.
      wanted: for each text, how many of the messages, and whether to end with the header of the
        assistant's turn.
      special_tokens: further variables.

    Returns:
      The texts; None if one of them cannot be written, for which `render_chat_template` has the
      reason, or if they are too many to be made at once.

    Example:
      >>> template = "{% for m in messages %}{{ m.content }}{% endfor %}"
      >>> render_prefixes(template, [{"content": "a"}, {"content": "b"}], [(1, False), (2, False)])
      ['a', 'ab']
    """
    characters = sum(len(str(message.get("content"))) for message in messages)
    if len(wanted) > _MOST_TEXTS or len(wanted) * characters > _MOST_CHARACTERS:
        return None
    return _ask(template, _variables(messages, special_tokens), wanted).get("texts")


def _variables(
    messages: Sequence[Mapping[str, Any]], special_tokens: Mapping[str, str] | None
) -> dict[str, Any]:
    """What a template sees, less what differs between the texts."""
    messages = [dict(message) for message in messages]
    return {"messages": messages, "tools": None, "documents": None, **(special_tokens or {})}


class _Ended(Exception):
    """The process has ended, or was ended because its time was up."""


class _Worker:
    """A process that renders, one conversation after the other."""

    def __init__(self) -> None:
        # It sees none of this process's variables (tokens, keys), and no Ctrl-C of its terminal.
        # Where to find Jinja is all that it is told.
        command = [sys.executable, "-s", "-P", template_worker.__file__]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,
            env={
                **{name: os.environ[name] for name in _NEEDED if name in os.environ},
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            },
        )
        self._numbers: dict[str, int] = {}  # of the templates that it has compiled
        self._free = itertools.count()
        try:
            self._receive(_START_SECONDS)
        except _Ended:
            code = self._process.poll()
            raise RuntimeError(
                f"{' '.join(command)} does not start (exit code {code}); run it to see why"
            ) from None

    @property
    def spent(self) -> bool:
        """Whether another process should take over: this one is full, or somebody has ended it."""
        return len(self._numbers) >= _MOST_TEMPLATES or self._process.poll() is not None

    def render(
        self, template: str, variables: Mapping[str, Any], wanted: Sequence[tuple[int, bool]]
    ) -> dict[str, Any]:
        """See `template_worker.answer`; anything that goes wrong ends the process."""
        raw = json.dumps(variables, default=str)
        known = template in self._numbers
        request = {
            "number": self._numbers[template] if known else next(self._free),
            "seconds": RENDER_SECONDS,
            "most_characters": (1 << 20) + 16 * len(raw),
            "wanted": wanted,
        }
        if not known:
            request["template"] = template
        # The variables are put in as the text they are: encoding them twice would take longer.
        message = f'{json.dumps(request)[:-1]}, "variables": {raw}}}'.encode()
        if len(message) > _MOST_REQUEST_BYTES:
            raise DataError(
                f"a conversation of {len(message):,} bytes is longer than any model's context. "
                "Cut it into several, or leave it out."
            )
        with self._or_end():
            try:
                self._send(struct.pack("<I", len(message)) + message)
            except BrokenPipeError:
                raise _Ended from None
            answer = self._receive(RENDER_SECONDS)
        if answer["compiled"]:
            self._numbers[template] = request["number"]
        return answer

    def end(self) -> None:
        """Ends the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()

    @contextlib.contextmanager
    def _or_end(self) -> Iterator[None]:
        """After an exception, also Ctrl-C, nobody knows whose answer comes next."""
        try:
            yield
        except BaseException:
            self.end()
            raise

    def _send(self, message: bytes) -> None:
        view = memoryview(message)
        while view:
            view = view[self._process.stdin.write(view) :]

    def _receive(self, seconds: float) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        length = struct.unpack("<I", self._read(4, deadline))[0]
        return json.loads(self._read(length, deadline))

    def _read(self, count: int, deadline: float) -> bytearray:
        data, file = bytearray(), self._process.stdout
        while len(data) < count:
            ready, _, _ = select.select([file], [], [], max(0.0, deadline - time.monotonic()))
            chunk = file.read(count - len(data)) if ready else b""
            if not chunk:
                raise _Ended
            data += chunk
        return data


_lock = threading.Lock()
_worker: _Worker | None = None
_refused: set[str] = set()  # templates that would only be ended again


def _ask(
    template: str, variables: Mapping[str, Any], wanted: Sequence[tuple[int, bool]]
) -> dict[str, Any]:
    """Renders in the process, which is started where there is none."""
    global _worker
    failure = {
        "failure": "ended",
        "reason": f"does not end within {RENDER_SECONDS:g} s, or ends the process that renders it",
    }
    with _lock:
        if template in _refused:
            return failure
        if _worker is not None and _worker.spent:
            _worker.end()
            _worker = None
        if _worker is None:
            _worker = _Worker()
        try:
            return _worker.render(template, variables, wanted)
        except DataError:
            raise
        except BaseException as error:
            _worker = None
            if isinstance(error, _Ended):
                _refused.add(template)
                return failure
            raise


def _forget_worker() -> None:
    """A child that was forked must not talk to its parent's process."""
    global _lock, _worker
    _lock, _worker = threading.Lock(), None


os.register_at_fork(after_in_child=_forget_worker)
