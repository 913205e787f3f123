"""*Tell them apart*: two anonymous answers to one question, a vote, and only then the names.

The names stay here until the vote: what the page gets says `a` and `b`. A round is remembered until
it is voted on, and the oldest are forgotten. Answers are computed for the occasion, or read from
files (`stored.py`).
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import datetime
import secrets
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import xxhash

from qlora_jax.errors import DataError
from qlora_jax.generation import Sampling
from qlora_jax.serving.errors import ApiError
from qlora_jax.serving.events import event
from qlora_jax.serving.fields import Fields, bad_field
from qlora_jax.serving.requests import Ask, parse_messages
from qlora_jax.serving.service import Answers, Service
from qlora_jax.serving.stored import StoredQuestion
from qlora_jax.serving.votes import Votes

_SIDES = ("a", "b")
_WINNERS = {"a": "model_a", "b": "model_b", "tie": "tie"}
_MOST_ROUNDS = 256


@dataclasses.dataclass
class Round:
    """Two answers that wait for a verdict.

    Attributes:
        question: what was asked.
        question_id: the same for the same question, in either order of the answers.
        names: of the two systems, in the order in which they are shown.
        texts: their answers so far.
        complete: whether both have ended.
        details: what else is written with the verdict.
    """

    question: str
    question_id: str
    names: tuple[str, str]
    texts: list[str]
    complete: bool
    details: dict[str, Any]


class Game:
    """The rounds of one server.

    Attributes:
        votes: where verdicts go.
        stored: questions with answers from files.
    """

    def __init__(
        self,
        service: Service,
        votes: Votes,
        stored: Sequence[StoredQuestion] = (),
        *,
        draw: Callable[[int], int] = secrets.randbelow,
    ):
        """Begins without rounds.

        Args:
            service: what answers.
            votes: where verdicts go.
            stored: questions with answers from files.
            draw: gives a random number in [0, n) for n; decides who is shown first.
        """
        self.votes = votes
        self.stored = list(stored)
        self._service = service
        self._draw = draw
        self._rounds: collections.OrderedDict[str, Round] = collections.OrderedDict()

    def state(self) -> dict[str, Any]:
        """What the page shows before a round: who can play, and the score so far."""
        return {
            "models": list(self._service.models),
            "stored_questions": len(self.stored),
            "votes": self.votes.count,
            "score": self.votes.score(),
        }

    async def begin(
        self, body: Mapping[str, Any]
    ) -> tuple[AsyncIterator[bytes], Callable[[], None]]:
        """Starts a round.

        Args:
            body: `stored: true`; or a `prompt`, and, if wanted, `system`, `models` (two names),
                `temperature`, `max_tokens`.

        Returns:
            The events, and what to call when they are not wanted any more.

        Raises:
            ApiError: the body is wrong, or there is no room.
        """
        fields = Fields(body)
        if fields.boolean("stored"):
            fields.finish()
            return self._begin_stored()
        return await self._begin_live(fields)

    def _begin_stored(self) -> tuple[AsyncIterator[bytes], Callable[[], None]]:
        if not self.stored:
            raise bad_field("stored", "no answers were given; start with --answers=FILE")
        question = self.stored[self._draw(len(self.stored))]
        names = sorted(question.answers)
        first = names.pop(self._draw(len(names)))
        second = names.pop(self._draw(len(names)))
        shown = (first, second)
        texts = [question.answers[name] for name in shown]
        details = {"kind": "stored"}
        round_ = Round(question.question, question.question_id, shown, texts, True, details)
        return _stored_events(self._remember(round_), round_), lambda: None

    async def _begin_live(self, fields: Fields) -> tuple[AsyncIterator[bytes], Callable]:
        prompt = fields.needed("prompt")
        if not isinstance(prompt, str) or not prompt.strip():
            raise bad_field("prompt", "must be a text")
        system = fields.text("system") or ""
        names = self._names(fields.get("models"))
        temperature = fields.number("temperature", 0, 2, default=0.7)
        limit = fields.integer("max_tokens", 1, self._service.limits.new_tokens)
        fields.finish()
        if self._draw(2):
            names = names[::-1]
        messages = [{"role": "system", "content": system}] if system else []
        messages = parse_messages([*messages, {"role": "user", "content": prompt}])
        seed = secrets.randbelow(2**31)
        sampling = Sampling(temperature=temperature)
        asks = [Ask(name, (messages,), sampling, limit, seed) for name in names]
        details = {"kind": "live", "temperature": temperature, "seed": seed}
        if system:
            details["system"] = system
        question_id = xxhash.xxh3_64_hexdigest(f"{system}\0{prompt}".encode())
        answers = await self._service.begin(asks)
        round_ = Round(prompt, question_id, names, ["", ""], False, details)
        key = self._remember(round_)

        def end() -> None:
            answers.close()
            if not round_.complete:
                self._rounds.pop(key, None)

        return _live_events(key, round_, answers), end

    def _names(self, value: Any) -> tuple[str, str]:
        models = self._service.models
        if value is None:
            if len(models) < 2:
                raise bad_field("models", "there is only one model here; start with an adapter")
            value = models[:2]
        elif not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise bad_field("models", "must be a list of two names")
        if len(value) != 2 or value[0] == value[1]:
            raise bad_field("models", "must be two different names")
        return self._service.find(value[0]), self._service.find(value[1])

    def _remember(self, round_: Round) -> str:
        key = secrets.token_urlsafe(16)
        self._rounds[key] = round_
        while len(self._rounds) > _MOST_ROUNDS:
            self._rounds.popitem(last=False)
        return key

    async def vote(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Writes a verdict, and says who is who.

        Args:
            body: the `round`, and the `winner`: "a", "b" or "tie".

        Returns:
            The names of both, and the score.

        Raises:
            ApiError: there is no such round (any more), or its answers are not complete.
        """
        fields = Fields(body)
        key, winner = fields.needed("round"), fields.needed("winner")
        fields.finish()
        if not isinstance(winner, str) or winner not in _WINNERS:
            raise bad_field("winner", "must be a, b or tie")
        round_ = self._rounds.get(key) if isinstance(key, str) else None
        if round_ is None:
            raise ApiError(404, "this round is over; begin another", code="no_such_round")
        if not round_.complete:
            raise ApiError(409, "wait until both answers are complete", code="round_not_complete")
        del self._rounds[key]  # first, so that two votes at once count once
        record = {
            "model_a": round_.names[0],
            "model_b": round_.names[1],
            "winner": _WINNERS[winner],
            "judge": "human",
            "question_id": round_.question_id,
            "question": round_.question,
            "answer_a": round_.texts[0],
            "answer_b": round_.texts[1],
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            **round_.details,
        }
        try:
            await asyncio.to_thread(self.votes.append, record)
        except OSError as error:
            self._rounds[key] = round_
            raise ApiError(
                500, f"the vote could not be written: {error.strerror}", code="votes_not_writable"
            ) from None
        names = dict(zip(_SIDES, round_.names, strict=True))
        return {**names, "winner": winner, **self.state()}


async def _stored_events(key: str, round_: Round) -> AsyncIterator[bytes]:
    yield event({"round": key, "question": round_.question})
    for side, text in zip(_SIDES, round_.texts, strict=True):
        yield event({"side": side, "text": text})
        yield event({"side": side, "finish_reason": "stop"})


async def _live_events(key: str, round_: Round, answers: Answers) -> AsyncIterator[bytes]:
    yield event({"round": key, "question": round_.question})
    async for index, delta in answers:
        side = _SIDES[index]
        round_.texts[index] += delta.text
        if delta.text:
            yield event({"side": side, "text": delta.text})
        if delta.finish_reason is not None:
            round_.complete = all(answer.finish_reason for answer in answers.all)
            yield event({"side": side, "finish_reason": delta.finish_reason})


def check_playable(stored: Sequence[StoredQuestion], models: Sequence[str]) -> None:
    """Raises DataError where a stored system has the name of a model that answers here."""
    clash = sorted({name for question in stored for name in question.answers} & set(models))
    if clash:
        raise DataError(
            f"the stored answers are of {clash[0]!r}, which is also a model here; give them another"
            " name: --answers=NAME=FILE"
        )
