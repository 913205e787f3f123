"""An engine without a model: it implements `generation.Engine`, and what it says can be foretold.

A reply is `<adapter or base>: <last user turn>`, then numbered words up to `max_new_tokens`, one
token a word. With a temperature a word carries the seed. Two words of the user steer it: `slow`
makes every step take time, and `fail` makes the engine raise.
"""

import collections
import dataclasses
import re
import time

from fake_tokenizer import CHATML, FakeTokenizer

from qlora_jax.errors import ConfigError, DataError
from qlora_jax.generation import Delta, Request

REPLY_WORDS = 12
SLOW_S = 0.05


class ServedTokenizer(FakeTokenizer):
    """One token a character, as a `data.Tokenizer` is for the server."""

    stop_strings = ()
    vocab_size = 0x110000

    def __init__(self):
        super().__init__(CHATML)

    def apply_chat_template(self, messages, add_generation_prompt=False):
        if messages[-1]["role"] == "assistant":
            raise DataError("the last message must be the user's")
        return super().apply_chat_template(messages, add_generation_prompt)


@dataclasses.dataclass
class _Reply:
    id: int
    request: Request
    words: list[str]
    slow: bool
    fail: bool
    tokens: int = 0
    text: str = ""


class FakeEngine:
    """See the module; the interface is `generation.Engine`'s."""

    def __init__(self, *, adapters=("mine",), slots=4, max_len=2000, step_s=0.0):
        self.tokenizer = ServedTokenizer()
        self.adapters = tuple(adapters)
        self.max_len, self.slots, self.step_s = max_len, slots, step_s
        self.cancelled = []
        self.most_active = 0
        self._waiting = collections.deque()
        self._active = []
        self._ended = []
        self._submitted = 0

    @property
    def busy(self):
        return bool(self._waiting or self._active or self._ended)

    def submit(self, request):
        if len(request.prompt_ids) + request.max_new_tokens > self.max_len:
            raise ConfigError("the prompt and the reply do not fit")
        if request.adapter is not None and request.adapter not in self.adapters:
            raise ConfigError(f"no adapter {request.adapter!r}")
        request.sampling.validate()
        question = self._question(request.prompt_ids)
        words = [f"{request.adapter or 'base'}: ", f"{question} "]
        if request.sampling.temperature:
            words.append(f"seed{request.seed} ")
        words += [f"{i} " for i in range(REPLY_WORDS)]
        if "slow" in question:
            words += [f"{i} " for i in range(REPLY_WORDS, 400)]
        slow, fail = "slow" in question, "fail" in question
        self._waiting.append(_Reply(self._submitted, request, words, slow, fail))
        self._submitted += 1
        return self._submitted - 1

    def _question(self, ids):
        text = self.tokenizer.decode(ids, skip_special_tokens=False)
        turns = re.findall(r"<\|im_start\|>user\n(.*?)<\|im_end\|>", text, re.DOTALL)
        return turns[-1] if turns else text

    def cancel(self, request_id):
        for replies in (self._waiting, self._active):
            for reply in list(replies):
                if reply.id == request_id:
                    replies.remove(reply)
                    self.cancelled.append(request_id)
                    self._ended.append(Delta(request_id, "", reply.tokens, "cancelled"))

    def step(self):
        deltas, self._ended = self._ended, []
        while self._waiting and len(self._active) < self.slots:
            self._active.append(self._waiting.popleft())
        self.most_active = max(self.most_active, len(self._active))
        if self._active:
            time.sleep(SLOW_S if any(r.slow for r in self._active) else self.step_s)
        deltas += [self._advance(reply) for reply in list(self._active)]
        return deltas

    def _advance(self, reply):
        if reply.fail:
            raise RuntimeError("the fake engine was told to fail")
        before = reply.text
        reply.text += reply.words[reply.tokens]
        reply.tokens += 1
        finish = None
        for stop in reply.request.stop:
            if stop in reply.text:
                reply.text = reply.text[: reply.text.index(stop)]
                finish = "stop"
        if finish is None and reply.tokens == len(reply.words):
            finish = "stop"
        if finish is None and reply.tokens == reply.request.max_new_tokens:
            finish = "length"
        if finish:
            self._active.remove(reply)
        return Delta(reply.id, reply.text[len(before) :], reply.tokens, finish)
