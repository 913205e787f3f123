"""Which answers a judge is shown, in which order, and what that will cost.

Every pair of answers is shown in both orders, because a judge prefers what it reads first (GPT-4
did, in the paper's ratings: see docs/evaluation.md).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import xxhash

from qlora_jax.errors import ConfigError, DataError
from qlora_jax.evaluation.judge_prompts import GENERAL, JudgePrompt
from qlora_jax.evaluation.questions import Answer

# What the authors asked GPT-4 with.
SETTINGS = {"temperature": 0.2, "max_tokens": 1024}
BYTES_A_TOKEN = 4
# The authors' 4,480 pairwise verdicts are 1,156 bytes on average.
TOKENS_A_REPLY = 300


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two answers in one order, and the request that asks a judge about them.

    Attributes:
        first: the answer that is shown first.
        second: the other one.
        turn: that is judged, from 0.
        body: of the request.
    """

    first: Answer
    second: Answer
    turn: int
    body: Mapping[str, Any]

    @functools.cached_property
    def key(self) -> str:
        """A hash of the request; equal requests have one reply."""
        text = json.dumps(self.body, sort_keys=True)
        return xxhash.xxh3_128_hexdigest(text.encode())


@dataclasses.dataclass(frozen=True)
class Prices:
    """What an endpoint takes, in dollars for a million tokens."""

    prompt: float
    reply: float

    def cost(self, prompt_tokens: int, reply_tokens: int) -> float:
        """Dollars.

        >>> Prices(prompt=2.0, reply=8.0).cost(500_000, 250_000)
        3.0
        """
        return (prompt_tokens * self.prompt + reply_tokens * self.reply) / 1e6


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What is left to ask, before it is asked.

    Attributes:
        verdicts: that are wanted.
        calls: that are needed for them; the rest is known already.
        prompt_tokens: at 4 bytes of UTF-8 a token.
        reply_tokens: at 300 a reply, what the paper's verdicts have on average, or at `max_tokens`
            where that is less.
        cost: dollars; None without prices.
    """

    verdicts: int
    calls: int
    prompt_tokens: int
    reply_tokens: int
    cost: float | None


def pair_up(
    answers: Iterable[Answer],
    prompts: Mapping[str, JudgePrompt],
    judge: str,
    *,
    settings: Mapping[str, Any] = SETTINGS,
    baseline: str | None = None,
    both_orders: bool = True,
) -> list[Comparison]:
    """All comparisons of the systems' answers, question by question.

    Args:
        answers: of at least two systems.
        prompts: by category; "general" for all other questions.
        judge: what the endpoint calls the model that judges.
        settings: more fields of the requests; one that is None is not sent.
        baseline: compares the others with this system only; None: all with all.
        both_orders: whether each pair is shown in both orders; if not, the question and the two
            names decide who is first, about as often one as the other.

    Raises:
        DataError: there are not two systems, they have no question in common, or one has answered
            another question under the same id.
        ConfigError: there is no such baseline.
    """
    by_question: dict[str, dict[str, Answer]] = {}
    for answer in answers:
        given = by_question.setdefault(answer.question.question_id, {})
        if answer.system in given:
            raise DataError(
                f"two files hold answers of {answer.system} to question "
                f"{answer.question.question_id}; name them: --answers=NAME=FILE"
            )
        if any(one.question.turns != answer.question.turns for one in given.values()):
            raise DataError(
                f"question {answer.question.question_id} is another one in the answers of "
                f"{answer.system} than in the others"
            )
        given[answer.system] = answer
    systems = sorted({name for given in by_question.values() for name in given})
    if len(systems) < 2:
        raise DataError(
            f"all answers are of {systems[0]}; give those of two systems, and name them if need "
            "be: --answers=NAME=FILE"
        )
    if baseline is not None and baseline not in systems:
        raise ConfigError(f"--baseline={baseline}: the systems are {', '.join(systems)}")
    sent = {name: value for name, value in settings.items() if value is not None}
    found = []
    for given in by_question.values():
        # FastChat's answers have none of their own.
        categories = [one.question.category for one in given.values() if one.question.category]
        prompt = prompts.get(categories[0] if categories else GENERAL, prompts[GENERAL])
        for pair in itertools.combinations(sorted(given), 2):
            if baseline is None or baseline in pair:
                for one, two in _orders(pair, given, both_orders):
                    for turn in range(len(one.question.turns)):
                        messages = prompt.fill(one, two, turn)
                        body = {"model": judge, "messages": messages, **sent}
                        found.append(Comparison(one, two, turn, body))
    if not found:
        raise DataError(f"no question was answered by two of {', '.join(systems)}")
    return found


def _orders(
    pair: tuple[str, str], given: Mapping[str, Answer], both: bool
) -> Iterator[tuple[Answer, Answer]]:
    one, two = (given[name] for name in pair)
    drawn = xxhash.xxh3_64_intdigest("\0".join((*pair, one.question.question_id)).encode()) % 2
    if both or not drawn:
        yield one, two
    if both or drawn:
        yield two, one


def estimate(
    comparisons: Sequence[Comparison], known: Iterable[str], prices: Prices | None = None
) -> Estimate:
    """Says what is left to ask, from the keys of the replies that are known."""
    known = frozenset(known)
    left = {one.key: one.body for one in comparisons if one.key not in known}
    prompt = sum(prompt_tokens(body) for body in left.values())
    reply = sum(_reply_tokens(body) for body in left.values())
    cost = prices.cost(prompt, reply) if prices else None
    return Estimate(len(comparisons), len(left), prompt, reply, cost)


def text_tokens(text: str) -> int:
    """About how many tokens a text is.

    >>> text_tokens("four"), text_tokens("fünf")
    (1, 2)
    """
    return -(-len(text.encode(errors="replace")) // BYTES_A_TOKEN)


def prompt_tokens(body: Mapping[str, Any]) -> int:
    """About how many tokens the messages of a request are."""
    return sum(text_tokens(message["content"]) for message in body["messages"])


def _reply_tokens(body: Mapping[str, Any]) -> int:
    most = body.get("max_tokens", body.get("max_completion_tokens"))
    return min(TOKENS_A_REPLY, most) if isinstance(most, int) else TOKENS_A_REPLY
