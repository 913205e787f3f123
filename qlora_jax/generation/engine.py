"""Many replies at once: requests come and go while one batch is decoded.

The engine has a fixed number of slots. A request waits until one is free, is read into it
("prefill"), and from then on takes part in every decoding step until its reply ends; then the slot
is the next one's ("continuous batching"). Between two looks at the queue a chunk of tokens is
decoded in one compiled loop.

What a slot has read stays in the cache when its reply is over. A request goes to the free slot
whose tokens begin as its prompt does, and only the rest of the prompt is read: in a conversation
the system prompt and the earlier turns are never read twice.

A reply depends on its request alone: not on what else is in the batch, nor on the slot. (Up to
rounding: a prompt whose beginning was in the cache is read in other pieces.)
"""

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.errors import ConfigError
from qlora_jax.generation import slots as programs
from qlora_jax.generation.adapters import serve_adapters
from qlora_jax.generation.dense import fits_host, with_dense_copy
from qlora_jax.generation.lookup import decode_guessing
from qlora_jax.generation.requests import Delta, FinishReason, Request
from qlora_jax.generation.text import GrowingText, common_prefix
from qlora_jax.models.kv_cache import read_kv_dtype
from qlora_jax.models.llama import Llama
from qlora_jax.placement import tree_bytes

# Longer prompts are read in pieces of so many tokens, which bounds the memory that reading takes.
LONGEST_PIECE = 512
_SHORTEST_PROMPT_BUCKET = 16
_SHORTEST_SPAN = 64
_LONGEST_DEFAULT = 4096


@dataclasses.dataclass
class _Reply:
    """A request in its slot."""

    id: int
    request: Request
    text: GrowingText
    end_ids: frozenset[int]
    tokens: int = 0
    finished: FinishReason | None = None


@dataclasses.dataclass
class _Slot:
    """A row of the cache: the reply in it, and the tokens it has read."""

    reply: _Reply | None = None
    read: list[int] = dataclasses.field(default_factory=list)
    unread: int | None = None  # chosen, but not yet seen by the model
    adapter: str | None = None
    used: int = 0  # when it was last given away


class Engine:
    """Replies to requests, several at a time. Not thread-safe: one thread owns it.

    Attributes:
      adapters: names that `Request.adapter` may have.
      max_len: tokens that prompt and reply may have together.
      slots: requests that are replied to at the same time.
      tokenizer: the model's.
      dense: whether there is a dense copy of the weights.
      prompt_tokens: that were read so far; `cached_tokens` did not have to be.
      cached_tokens: of all prompts, found in the cache.
      passes: of the model over all slots, without those that read prompts.

    Example:
      >>> engine = Engine(model, tokenizer, slots=4)  # doctest: +SKIP
      >>> engine.submit(Request(tokenizer.encode("The capital of France is")))  # doctest: +SKIP
      0
      >>> while engine.busy:  # doctest: +SKIP
      ...     for delta in engine.step():
      ...         print(delta.text, end="")
       Paris.
    """

    def __init__(
        self,
        model: nnx.Module,
        tokenizer: Tokenizer,
        *,
        adapters: Mapping[str, Any] | None = None,
        slots: int = 8,
        max_len: int | None = None,
        kv_dtype: str | None = None,
        dense: bool | None = None,
        lookup: int = 0,
        chunk: int = 8,
    ):
        """Makes room for the replies.

        Args:
          model: a `Llama`, with an adapter of its own or without; its arrays are shared.
          tokenizer: the model's.
          adapters: by name: each a model with an adapter on the same base (of `load_adapter` or
            `load_trained`), or the state of its `nnx.LoRAParam`s, where it has the ranks and the
            scaling of `model`'s. None: the model's own, if it has one, under the name "adapter".
          slots: requests that are replied to at the same time; each takes `max_len` tokens of
            cache, also while it is idle.
          max_len: tokens of prompt and reply together; None: what the model can see, at most 4096.
          kv_dtype: None: keys and values as the model computes them; "int8": in half the memory.
          dense: whether a dense copy of the weights is kept for decoding; None: on a CPU, where
            there is memory for it. See `generation.dense`.
          lookup: tokens to guess from the text so far and to check in one pass; 0: none. The
            greedy text is the same; see `generation.lookup`.
          chunk: tokens (with `lookup` passes) that are decoded between two looks at the queue.

        Raises:
          ConfigError: a setting is out of range, the model is no decoder, or an adapter does not
            belong to it.
        """
        if not isinstance(model, Llama):
            raise ConfigError(
                f"the engine serves decoders, got a {type(model).__name__}; use generate() for it."
            )
        limit = model.config.max_position_embeddings
        max_len = min(limit, _LONGEST_DEFAULT) if max_len is None else max_len
        if not 2 <= max_len <= limit:
            raise ConfigError(
                f"max_len must be 2 to {limit}, the tokens that the model can see, got {max_len}"
            )
        if slots < 1 or chunk < 1 or lookup < 0:
            raise ConfigError(f"{slots=} and {chunk=} must be at least 1, {lookup=} at least 0")
        cache_dtype = read_kv_dtype(kv_dtype)
        model, names = serve_adapters(model, adapters)
        model.eval()
        self.dense = fits_host(model) if dense is None else dense
        if self.dense:
            model = with_dense_copy(model, one_row=slots == 1)
        self.adapters: tuple[str, ...] = names
        self.max_len, self.slots = max_len, slots
        self.prompt_tokens = self.cached_tokens = 0
        self.passes = 0
        self.tokenizer, self._chunk, self._lookup = tokenizer, chunk, lookup
        self._vocab_size = model.config.vocab_size
        self._graphdef, self._state = nnx.split(model)
        cache = model.init_cache(slots, max_len, ragged=True, dtype=cache_dtype)
        self._device = programs.Slots.empty(cache, self._vocab_size)
        # No token has the id -2: without an end token only the limit ends a reply.
        self._end_ids = jnp.asarray(list(tokenizer.eos_token_ids) or [-2], jnp.int32)
        self._slots = [_Slot() for _ in range(slots)]
        self._waiting: collections.deque[_Reply] = collections.deque()
        self._cancelled: list[Delta] = []
        self._submitted = self._admitted = 0

    @property
    def busy(self) -> bool:
        """Whether `step` has something to do."""
        return bool(self._waiting or self._cancelled or any(self._active()))

    @property
    def cache_bytes(self) -> int:
        """Memory of the key-value cache."""
        return tree_bytes(self._device.cache)

    def submit(self, request: Request) -> int:
        """Queues a request.

        Args:
          request: what to reply to.

        Returns:
          Its id, which is in every `Delta` of the reply.

        Raises:
          ConfigError: it cannot fit `max_len`, or a setting cannot be meant.
        """
        request.sampling.validate()
        count = len(request.prompt_ids)
        if request.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1, got {request.max_new_tokens}")
        if not count:
            raise ConfigError("the prompt has no tokens; give at least one, for example BOS.")
        if not 0 <= min(request.prompt_ids) <= max(request.prompt_ids) < self._vocab_size:
            raise ConfigError(f"the prompt has ids outside of 0 to {self._vocab_size - 1}.")
        if count + request.max_new_tokens > self.max_len:
            raise ConfigError(
                f"the prompt has {count} tokens; with max_new_tokens={request.max_new_tokens} "
                f"that is more than max_len={self.max_len}. Shorten the prompt or lower "
                "max_new_tokens."
            )
        if request.adapter is not None and request.adapter not in self.adapters:
            have = ", ".join(self.adapters) or "none"
            raise ConfigError(f"there is no adapter {request.adapter!r}; there are: {have}.")
        stops, end_ids = self._split_stops((*self.tokenizer.stop_strings, *request.stop))
        text = GrowingText(self.tokenizer, request.prompt_ids, stops)
        self._waiting.append(_Reply(self._submitted, request, text, end_ids))
        self._submitted += 1
        return self._submitted - 1

    def cancel(self, request_id: int) -> None:
        """Ends a reply; its last `Delta`, in the next step, says "cancelled".

        A reply that is over, or that never was, is left alone.
        """
        for reply in list(self._waiting):
            if reply.id == request_id:
                self._waiting.remove(reply)
                self._cancelled.append(Delta(request_id, "", 0, "cancelled"))
        for slot in self._active():
            if slot.reply.id == request_id:
                tokens = slot.reply.tokens
                self._cancelled.append(Delta(request_id, "", tokens, "cancelled"))
                slot.reply = None

    def step(self) -> list[Delta]:
        """One round: reads waiting requests into free slots, or decodes a chunk in all of them.

        Returns:
          What is new in each reply; [] when there is nothing to do.
        """
        deltas, self._cancelled = self._cancelled, []
        admitted = self._admit_waiting()
        if admitted:
            # Without a chunk behind it: the first token of a reply is not to wait.
            return deltas + admitted
        if any(self._active()):
            deltas += self._decode()
        return deltas

    def _active(self) -> Iterator[_Slot]:
        return (slot for slot in self._slots if slot.reply is not None)

    def _split_stops(self, stops: Sequence[str]) -> tuple[list[str], frozenset[int]]:
        """Stop strings, and the ids of those that are control tokens, which have no text."""
        texts, ids = [], set(self.tokenizer.eos_token_ids)
        for stop in stops:
            encoded = self.tokenizer.encode(stop)
            if len(encoded) == 1 and not self.tokenizer.decode(encoded):
                ids.add(encoded[0])
            else:
                texts.append(stop)
        return texts, frozenset(ids)

    def _admit_waiting(self) -> list[Delta]:
        admitted = []
        while self._waiting and not all(slot.reply for slot in self._slots):
            reply = self._waiting.popleft()
            row, known = self._choose_slot(reply.request)
            prompt = [int(token) for token in reply.request.prompt_ids]
            self._admitted += 1
            slot = _Slot(reply, prompt, None, reply.request.adapter, self._admitted)
            self._slots[row] = slot
            self.cached_tokens += known
            admitted.append((row, known))
        width = max((len(self._slots[row].read) - known for row, known in admitted), default=0)
        width = programs.bucket(width, _SHORTEST_PROMPT_BUCKET)
        # One pass reads the weights once, but computes for every slot, whether it has a prompt.
        if 2 * len(admitted) > max(self.slots, 2) and self.slots * width <= LONGEST_PIECE:
            tokens = self._read_all(dict(admitted), width)
        else:
            tokens = [self._read(row, known) for row, known in admitted]
        slots = [self._slots[row] for row, _ in admitted]
        return [self._take(slot, [int(one)]) for slot, one in zip(slots, tokens, strict=True)]

    def _choose_slot(self, request: Request) -> tuple[int, int]:
        """The free slot that has read most of a prompt, and how many of its tokens.

        At least the last token is read again, because its logits are needed. Among equals it is
        the one that nobody has used for longest.
        """
        found = []
        for row, slot in enumerate(self._slots):
            if slot.reply is None:
                same = slot.adapter == request.adapter
                known = common_prefix(slot.read, request.prompt_ids[:-1]) if same else 0
                found.append((known, -slot.used, row))
        known, _, row = max(found)
        return row, known

    def _admission(self, row: int, start: int, width: int) -> programs.Admission:
        """What is read of a slot's prompt from `start` on."""
        slot = self._slots[row]
        request, piece = slot.reply.request, slot.read[start : start + width]
        self.prompt_tokens += len(piece)
        return programs.Admission(
            row=np.int32(row),
            tokens=np.pad(np.array(piece, np.int32), (0, width - len(piece))),
            start=np.int32(start),
            count=np.int32(len(piece)),
            seen=programs.seen_tokens(slot.read, self._vocab_size),
            left=np.int32(request.max_new_tokens),
            seed=np.uint32(request.seed % 2**32),
            sampling=request.sampling.as_arrays(),
            adapter=np.int32(self._adapter_number(request.adapter)),
        )

    def _read(self, row: int, known: int) -> Array:
        """Reads a prompt into its slot, piece by piece; the first token of the reply."""
        count = len(self._slots[row].read)
        while known < count:  # what is chosen behind all pieces but the last is forgotten
            left = min(count - known, LONGEST_PIECE)
            width = min(programs.bucket(left, _SHORTEST_PROMPT_BUCKET), self.max_len)
            # A padded piece must not reach beyond the last slot; then it begins earlier.
            start = min(known, self.max_len - width)
            new, span = self._admission(row, start, width), self._span(start + width)
            model = self._graphdef, self._state, self._device
            self._device, token = programs.admit(*model, new, self._end_ids, span=span)
            known = start + int(new.count)
        return token

    def _read_all(self, known: dict[int, int], width: int) -> list[Array]:
        """Reads the prompts of several slots at once; the first tokens of their replies."""
        some = {row: self._admission(row, start, width) for row, start in known.items()}
        nothing = jax.tree.map(np.zeros_like, next(iter(some.values())))
        new = [some.get(row, nothing) for row in range(self.slots)]
        new = jax.tree.map(lambda *rows: np.stack(rows), *new)
        model = self._graphdef, self._state, self._device
        span = self._span(max(known.values()) + width)
        self._device, tokens = programs.admit_all(*model, new, self._end_ids, span=span)
        tokens = np.asarray(tokens)
        return [tokens[row] for row in known]

    def _adapter_number(self, name: str | None) -> int:
        return 0 if name is None else 1 + self.adapters.index(name)

    def _span(self, size: int) -> int:
        return min(programs.bucket(size, _SHORTEST_SPAN), self.max_len)

    def _decode(self) -> list[Delta]:
        active = list(self._active())
        longest = max(len(slot.read) for slot in active)
        common = dict(
            alive=np.array([slot.reply is not None for slot in self._slots]),
            end_ids=self._end_ids,
            least=np.int32(len(active) if self._waiting else 1),
            span=self._span(longest + self._chunk * (1 + self._lookup) + self._lookup),
            chunk=self._chunk,
            greedy=all(slot.reply.request.sampling.greedy for slot in active),
        )
        model = self._graphdef, self._state, self._device
        if self._lookup:
            self._device, tokens, passes = decode_guessing(
                *model, self._history(), **common, count=self._lookup
            )
        else:
            self._device, tokens, passes = programs.decode(*model, **common)
        self.passes += int(passes)
        rows = zip(self._slots, np.asarray(tokens).reshape(self.slots, -1).tolist(), strict=True)
        return [
            self._take(slot, [token for token in row if token != programs.NO_TOKEN])
            for slot, row in rows
            if slot.reply is not None
        ]

    def _history(self) -> Int[np.ndarray, "B S"]:
        """What each row has read, and the token that it has not."""
        history = np.zeros((self.slots, self.max_len), np.int32)
        for row, slot in zip(history, self._slots, strict=True):
            text = [*slot.read, slot.unread or 0][: self.max_len]
            row[: len(text)] = text
        return history

    def _take(self, slot: _Slot, tokens: list[int]) -> Delta:
        """Adds the tokens that were chosen in a slot to its reply."""
        reply, text = slot.reply, ""
        for token in tokens:
            if slot.unread is not None:
                slot.read.append(slot.unread)
            slot.unread = token
            if reply.finished is None:
                text += self._add(reply, token)
        if reply.finished is not None:
            slot.reply = None
        return Delta(reply.id, text, reply.tokens, reply.finished)

    def _add(self, reply: _Reply, token: int) -> str:
        if token in reply.end_ids:
            reply.finished = "stop"
            return reply.text.finish()
        reply.tokens += 1
        text = reply.text.add(token)
        if not reply.text.stopped and reply.tokens == reply.request.max_new_tokens:
            reply.finished = "length"
            text += reply.text.finish()
        if reply.text.stopped:
            reply.finished = "stop"
        return text
