"""A model judges what systems answered: pairs of answers in, verdicts out.

Every pair of answers is shown in both orders, because a judge prefers what it reads first (GPT-4
did, in the paper's ratings: see docs/evaluation.md). Replies are kept one by one under a hash of
all that has a say in them: the judge's name, the messages and the settings, not the endpoint. So
what is there is never paid for twice: a rerun asks nothing, and a run that was stopped, or that is
given one system more, asks only what is missing.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import itertools
import json
import pathlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import xxhash

from qlora_jax.errors import ConfigError, DataError, EvaluationError
from qlora_jax.evaluation.chat_answers import write_lines
from qlora_jax.evaluation.journal import Journal
from qlora_jax.evaluation.judge_client import Endpoint, JudgeClient, JudgeReply
from qlora_jax.evaluation.judge_prompts import GENERAL, Form, JudgePrompt
from qlora_jax.evaluation.judging import parse_relative, parse_threeclass
from qlora_jax.evaluation.questions import Answer
from qlora_jax.evaluation.suites import progress_bar
from qlora_jax.training.card import versions

# What the authors asked GPT-4 with.
SETTINGS = {"temperature": 0.2, "max_tokens": 1024}
BYTES_A_TOKEN = 4
# The authors' 4,480 pairwise verdicts are 1,156 bytes on average.
TOKENS_A_REPLY = 300
_REPLIES = "replies.journal"
_CACHE = {"cache": "replies of judges by content", "version": 1}
_CLASSES = {1: "model_a", 2: "model_b", 3: "tie"}


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


@dataclasses.dataclass(frozen=True)
class JudgeResult:
    """What a judge has said.

    Attributes:
        path: of the file of ratings.
        verdicts: that could be read.
        unparsed: how many could not, by reason: "form", "length" (cut off), "too_long" (refused).
        calls: that were made now.
        prompt_tokens: of those; estimated where the endpoint does not count.
        reply_tokens: as well.
        cost: dollars, of those; None without prices.
    """

    path: pathlib.Path
    verdicts: int
    unparsed: Mapping[str, int]
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
    prompt = sum(_tokens(body) for body in left.values())
    reply = sum(_reply_tokens(body) for body in left.values())
    cost = prices.cost(prompt, reply) if prices else None
    return Estimate(len(comparisons), len(left), prompt, reply, cost)


def _tokens(body: Mapping[str, Any]) -> int:
    size = sum(len(one["content"].encode(errors="replace")) for one in body["messages"])
    return -(-size // BYTES_A_TOKEN)


def _reply_tokens(body: Mapping[str, Any]) -> int:
    most = body.get("max_tokens", body.get("max_completion_tokens"))
    return min(TOKENS_A_REPLY, most) if isinstance(most, int) else TOKENS_A_REPLY


def known_replies(out: pathlib.Path) -> frozenset[str]:
    """The keys of the replies that a folder holds."""
    if not (out / _REPLIES).exists():
        return frozenset()
    with Journal(out / _REPLIES, _CACHE) as cache:
        return frozenset(cache.records)


def run_judge(
    comparisons: Sequence[Comparison],
    endpoint: Endpoint,
    out: pathlib.Path,
    *,
    form: Form,
    prices: Prices | None = None,
    max_cost: float | None = None,
    concurrency: int = 8,
) -> JudgeResult:
    """Asks what is not known yet, and writes all verdicts.

    The folder gets `ratings.jsonl`, which `read_ratings` reads, `judge.json` with what is needed to
    repeat it, and `replies.journal`.

    Args:
        comparisons: see `pair_up`.
        endpoint: where to ask.
        out: the folder.
        form: of the verdicts that the prompts ask for.
        prices: of the endpoint.
        max_cost: dollars that this call may spend; it stops when they are spent, at most
            `concurrency` replies later.
        concurrency: requests at a time.

    Raises:
        EvaluationError: the endpoint refuses, or fails too often, or the money is spent; or the
            disk is full. What was said until then is kept, and the same command goes on.
    """
    spent = Counter()
    with Journal(out / _REPLIES, _CACHE) as cache, progress_bar() as bar:
        left = {one.key: one.body for one in comparisons if one.key not in cache.records}
        task = bar.add_task("verdicts", total=len(left))
        refused: dict[str, JudgeReply] = {}

        def keep(key: str, reply: JudgeReply) -> None:
            spent["calls"] += 1
            spent["prompt"] += _counted(reply.prompt_tokens, _tokens(left[key]))
            size = len(reply.text.encode(errors="replace"))
            spent["reply"] += _counted(reply.completion_tokens, -(-size // BYTES_A_TOKEN))
            bar.advance(task)
            if reply.finish_reason == "too_long":
                refused[key] = reply  # another endpoint may have more room: not kept
            else:
                cache.write([(key, reply)])
            cost = prices.cost(spent["prompt"], spent["reply"]) if prices else 0.0
            if max_cost is not None and cost >= max_cost and spent["calls"] < len(left):
                raise EvaluationError(
                    f"${cost:.2f} are spent of --max_cost={max_cost:g}; {spent['calls']} of "
                    f"{len(left)} replies are kept. Raise it to go on"
                )

        def tell(reason: str) -> None:
            spent["retries"] += 1
            bar.update(task, description=f"verdicts ({spent['retries']} retries: {reason[:60]})")

        asyncio.run(_ask_all(endpoint, left, keep, tell, concurrency))
        known = {key: JudgeReply(*record) for key, record in cache.records.items()} | refused
    records = [_record(one, known[one.key], form) for one in comparisons]
    path = out / "ratings.jsonl"
    write_lines(path, records)
    result = JudgeResult(
        path=path,
        verdicts=sum(record["winner"] is not None for record in records),
        unparsed=dict(Counter(one["unparsed"] for one in records if one["winner"] is None)),
        calls=spent["calls"],
        prompt_tokens=spent["prompt"],
        reply_tokens=spent["reply"],
        cost=prices.cost(spent["prompt"], spent["reply"]) if prices else None,
    )
    _write_summary(out, comparisons, endpoint, form, result)
    return result


def _counted(count: int | None, otherwise: int) -> int:
    return otherwise if count is None else count


async def _ask_all(
    endpoint: Endpoint,
    bodies: Mapping[str, Mapping[str, Any]],
    keep: Callable[[str, JudgeReply], None],
    tell: Callable[[str], None],
    concurrency: int,
) -> None:
    """Asks, a few at a time; after a failure what is under way is still kept."""
    waiting = iter(bodies.items())
    failures: list[EvaluationError] = []
    async with JudgeClient(endpoint, on_retry=tell) as client:

        async def work() -> None:
            for key, body in waiting:  # all share it
                try:
                    keep(key, await client.ask(body))
                except EvaluationError as error:
                    failures.append(error)
                    client.stop()
                if failures:
                    return

        await asyncio.gather(*(work() for _ in range(min(concurrency, len(bodies)))))
    if failures:
        raise failures[0]


def _record(comparison: Comparison, reply: JudgeReply, form: Form) -> dict[str, Any]:
    first, second = comparison.first, comparison.second
    verdict, reason = _read(reply, form)
    points = {}
    if isinstance(verdict, tuple):
        one, two = verdict
        points = {"points": verdict}
        verdict = 3 if one == two else 1 if one > two else 2
    several = len(first.question.turns) > 1
    return {
        "model_a": first.system,
        "model_b": second.system,
        "winner": None if verdict is None else _CLASSES[verdict],
        **points,
        "judge": comparison.body["model"],
        "question_id": first.question.question_id,
        **({"turn": comparison.turn + 1} if several else {}),
        "category": first.question.category,
        **({} if verdict is not None else {"unparsed": reason}),
        "finish_reason": reply.finish_reason,
        "text": reply.text,
    }


def _read(reply: JudgeReply, form: Form) -> tuple[Any, str]:
    """The verdict, or None and why there is none."""
    # In a text that was cut off, the last line may be the "1" of a list that went on.
    if reply.finish_reason in ("length", "too_long"):
        return None, reply.finish_reason
    parse = parse_threeclass if form == "threeclass" else parse_relative
    return parse(reply.text), "form"


def _write_summary(
    out: pathlib.Path,
    comparisons: Sequence[Comparison],
    endpoint: Endpoint,
    form: Form,
    result: JudgeResult,
) -> None:
    body = dict(comparisons[0].body)
    keys = "\n".join(one.key for one in comparisons)
    content = {
        "judge": body.pop("model"),
        "endpoint": endpoint.url,
        "form": form,
        "settings": {name: value for name, value in body.items() if name != "messages"},
        "comparisons": len(comparisons),
        "requests": xxhash.xxh3_128_hexdigest(keys.encode()),
        "result": dataclasses.asdict(result) | {"path": result.path.name},
        "versions": versions(),
    }
    path = out / "judge.json"
    try:
        path.write_text(json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise EvaluationError(f"{path} cannot be written: {error.strerror}") from error
