"""The one thread that owns the engine, and the event loop's side of it.

An `Engine` is not thread-safe and its `step` blocks for a chunk of tokens, while the server is one
event loop. So commands travel to the thread through a queue, between two steps, and deltas travel
back with one `call_soon_threadsafe` a step:

    event loop                       thread
    submit, cancel   ── queue ──>    engine.submit, engine.cancel
    Replies' queue   <─ deltas ──    engine.step, as long as anything is under way

**Back-pressure.** The engine queues without limit, so the limit is here: at most `slots` replies
are under way and `max_waiting` wait. What is more is refused at once, with an estimate of when to
come again, instead of being kept until its client has given up.
"""

from __future__ import annotations

import asyncio
import logging
import math
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence

from qlora_jax.generation import Delta, Engine, Request

_LOG = logging.getLogger(__name__)
_LONGEST_RETRY_S = 60
_MEMORY = 0.8  # of the running mean of how long a reply takes


class QueueFullError(Exception):
    """As many replies are under way and wait as may.

    Attributes:
        retry_after_s: when one more will probably have room.
    """

    def __init__(self, message: str, retry_after_s: int):
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineFailedError(Exception):
    """The engine raised what it should not have; nothing can be answered any more."""


class Reply:
    """One reply under way.

    Attributes:
        request_id: the engine's; None until it is admitted.
        started: when it was asked for, `time.perf_counter`.
        over: whether its end has been handed over.
    """

    def __init__(self):
        self.request_id: int | None = None
        self.started = time.perf_counter()
        self.over = False


class Replies:
    """Replies that were asked for together; iterate for (index, delta) until all have ended."""

    def __init__(self, count: int, cancel: Callable[[Reply], None]):
        self._cancel = cancel
        self._queue: asyncio.Queue[tuple[int, Delta] | Exception] = asyncio.Queue()
        self.all = [Reply() for _ in range(count)]

    async def __aiter__(self) -> AsyncIterator[tuple[int, Delta]]:
        left = len(self.all)
        while left:
            item = await self._queue.get()
            if isinstance(item, Exception):
                raise item
            yield item
            left -= item[1].finish_reason is not None

    def cancel(self) -> None:
        """Ends what is not over yet. Safe to call at any time, and twice."""
        for reply in self.all:
            if not reply.over:
                self._cancel(reply)

    def put(self, reply: Reply, item: Delta | Exception) -> None:
        """Hands over what the engine said of one of them; in the event loop's thread."""
        failed = isinstance(item, Exception)
        reply.over = failed or item.finish_reason is not None
        self._queue.put_nowait(item if failed else (self.all.index(reply), item))


_Said = Sequence[tuple[Replies, Reply, Delta | Exception]]


class Scheduler:
    """Runs an engine for many clients.

    All methods are to be called in the thread of one event loop, the one that called `start`.

    Attributes:
        engine: what generates; only its constant attributes may be read from outside the thread.
        max_waiting: how many replies may wait for a slot.
        failure: what the engine raised, after which everything is refused; else None.
    """

    def __init__(self, engine: Engine, *, max_waiting: int = 64):
        """Keeps the engine; `start` starts it.

        Args:
            engine: not used by anyone else from now on.
            max_waiting: 0 or more.
        """
        self.engine = engine
        self.max_waiting = max_waiting
        self.failure: Exception | None = None
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._replies: dict[int, tuple[Replies, Reply]] = {}  # by the engine's id
        self._accepted = 0
        self._mean_s = 1.0
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    @property
    def running(self) -> int:
        """How many replies have a slot."""
        return min(self._accepted, self.engine.slots)

    @property
    def waiting(self) -> int:
        """How many replies wait for a slot."""
        return self._accepted - self.running

    def start(self) -> None:
        """Starts the thread; needs a running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def close(self) -> None:
        """Cancels what is under way and ends the thread."""
        self._commands.put(self._stop)
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join)

    async def submit(self, requests: Sequence[Request]) -> Replies:
        """Queues requests that belong together: all of them or none.

        Args:
            requests: at least one.

        Returns:
            Their replies, with the indices of the requests.

        Raises:
            QueueFullError: there is no room for all.
            EngineFailedError: see `failure`.
            ConfigError: the engine refuses one.
        """
        self._check_works()
        free = self.engine.slots + self.max_waiting - self._accepted
        if len(requests) > free:
            raise QueueFullError(
                f"{self.running} replies are under way and {self.waiting} wait, of at most "
                f"{self.engine.slots} and {self.max_waiting}",
                self._retry_after_s(),
            )
        replies = Replies(len(requests), self._cancel)
        admitted = self._loop.create_future()
        self._accepted += len(requests)
        self._commands.put(lambda: self._admit(requests, replies, admitted))
        try:
            await asyncio.shield(admitted)
        except asyncio.CancelledError:  # the client left before it was admitted
            admitted.add_done_callback(asyncio.Future.exception)
            replies.cancel()
            raise
        return replies

    def _check_works(self) -> None:
        if self.failure is not None:
            raise EngineFailedError("the engine has failed; restart the server")

    def _refuse(self, count: int, admitted: asyncio.Future, error: Exception) -> None:
        """In the event loop's thread."""
        self._accepted -= count
        admitted.set_exception(error)

    def _cancel(self, reply: Reply) -> None:
        # Looks up the id in the thread: the reply may not have been admitted yet.
        self._commands.put(lambda: self._cancel_in_engine(reply))

    def _cancel_in_engine(self, reply: Reply) -> None:
        if reply.request_id is not None and not reply.over:
            self.engine.cancel(reply.request_id)

    def _retry_after_s(self) -> int:
        rounds = 1 + self.waiting / max(1, self.engine.slots)
        return min(_LONGEST_RETRY_S, max(1, math.ceil(rounds * self._mean_s)))

    def _deliver(self, said: _Said) -> None:
        """In the event loop's thread."""
        for replies, reply, item in said:
            replies.put(reply, item)
            if reply.over:
                self._accepted -= 1
                took_s = time.perf_counter() - reply.started
                self._mean_s = _MEMORY * self._mean_s + (1 - _MEMORY) * took_s

    # From here on: the engine's thread.

    def _work(self) -> None:
        while not self._closing:
            self._obey(wait=not self._replies)
            if not self._replies:
                continue
            try:
                self._hand_over(self.engine.step())
            except Exception as error:
                _LOG.exception("the engine has failed")
                self.failure = error
                self._give_up()
        self._give_up()

    def _give_up(self) -> None:
        failure = EngineFailedError("the engine has stopped before the reply was complete")
        self._say([(*place, failure) for place in self._replies.values()])
        self._replies.clear()

    def _obey(self, *, wait: bool) -> None:
        """Takes all commands that are there, and waits for one if there is nothing else to do."""
        while True:
            try:
                command = self._commands.get(block=wait)
            except queue.Empty:
                return
            if command is None:
                return
            command()
            wait = False

    def _stop(self) -> None:
        self._closing = True

    def _admit(
        self, requests: Sequence[Request], replies: Replies, admitted: asyncio.Future
    ) -> None:
        try:
            self._check_works()
            for request, reply in zip(requests, replies.all, strict=True):
                reply.request_id = self.engine.submit(request)
        except Exception as error:
            for reply in replies.all:
                if reply.request_id is not None:
                    self.engine.cancel(reply.request_id)
            self._call(self._refuse, len(requests), admitted, error)
            return
        self._replies |= {reply.request_id: (replies, reply) for reply in replies.all}
        self._call(admitted.set_result, None)

    def _hand_over(self, deltas: Sequence[Delta]) -> None:
        said = [(*self._replies[d.request_id], d) for d in deltas if d.request_id in self._replies]
        for delta in deltas:
            if delta.finish_reason is not None:
                self._replies.pop(delta.request_id, None)
        self._say(said)

    def _say(self, said: _Said) -> None:
        if said:
            self._call(self._deliver, said)

    def _call(self, function: Callable, *arguments) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop has been closed: nobody listens any more
            _LOG.debug("the event loop is closed")
