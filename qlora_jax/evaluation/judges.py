"""A model judges what systems answered: pairs of answers in, verdicts out.

Replies are kept one by one under a hash of all that has a say in them: the judge's name, the
messages and the settings, not the endpoint. So what is there is never paid for twice: a rerun asks
nothing, and a run that was stopped, or that is given one system more, asks only what is missing.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import json
import pathlib
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

import xxhash

from qlora_jax.errors import EvaluationError
from qlora_jax.evaluation.chat_answers import write_lines
from qlora_jax.evaluation.comparisons import Comparison, Prices, prompt_tokens, text_tokens
from qlora_jax.evaluation.journal import Journal
from qlora_jax.evaluation.judge_client import Endpoint, JudgeClient, JudgeReply
from qlora_jax.evaluation.judge_prompts import Form
from qlora_jax.evaluation.judging import parse_relative, parse_threeclass
from qlora_jax.evaluation.suites import progress_bar
from qlora_jax.training.card import versions

_REPLIES = "replies.journal"
_CACHE = {"cache": "replies of judges by content", "version": 1}
_CLASSES = {1: "model_a", 2: "model_b", 3: "tie"}


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
            spent["prompt"] += _counted(reply.prompt_tokens, prompt_tokens(left[key]))
            spent["reply"] += _counted(reply.completion_tokens, text_tokens(reply.text))
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

        _wait_for(_ask_all(endpoint, left, keep, tell, concurrency))
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


def _wait_for(work: Coroutine[Any, Any, None]) -> None:
    """Runs to the end, also in a notebook, whose thread has an event loop that is busy with us."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(work)
    else:
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            thread.submit(asyncio.run, work).result()


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
