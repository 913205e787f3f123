"""Files of verdicts: one record a line, each on two answers to one question.

Two kinds of records are read, and told apart by their fields:

- of the QLoRA authors: `score` is 1, 2 or 3 (equivalent), or a pair of points; -1 is unparsed, and
  dropped. The systems and the judge stand in the file's name,
  `<system>-vs-<system>-<judge>-reviewer[-threeclass].jsonl`, or the same with `_` between;
- of Chatbot Arena: `model_a`, `model_b`, `winner` (`model_a`, `model_b`, or begins with `tie`),
  and, where known, `judge`, `question_id`, `turn` of the question, and `points` of both. To use
  ratings of your own, write these.

**Who answered first.** The name of a file does not always give the order of the answers: in the
authors' relative ratings, all files with Guanaco have it reversed. What decides is `answer1_id` and
`answer2_id`. An answer occurs in several files, and belongs to the one system that all their names
share; what is still open then, the name of the file settles.
"""

import collections
import dataclasses
import json
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from qlora_jax.errors import DataError
from qlora_jax.files import resolve_path

_NAME = re.compile(
    r"(?P<first>.+?)[-_]vs[-_](?P<second>.+?)[-_](?P<judge>gpt-?4|[^-_]+)[-_]reviewer"
)
_OWN = re.compile(r"(\d+b)-(.+)-(?:vicuna|oa)-generations.*")
# Names of the same system in the authors' pairwise and relative files.
_SYSTEMS = {
    "gpt4": "GPT-4",
    "gpt-3.5": "ChatGPT",
    "gpt35": "ChatGPT",
    "bard": "Bard",
    "vicuna-13b": "Vicuna 13B",
    "30b-guanaco": "Guanaco 33B",  # LLaMA-33B is "30B" in its own repository
}
_JUDGES = {"gpt4": "gpt-4"}
_WINNERS = {"model_a": 1.0, "model_b": 0.0}
_CLASSES = {1: 1.0, 2: 0.0, 3: 0.5}
_NEED = (
    "need records with model_a, model_b and winner, or with score in a file that is named "
    "<system>-vs-<system>-<judge>-reviewer.jsonl"
)


@dataclasses.dataclass(frozen=True)
class Ratings:
    """Verdicts as arrays of one length M, for S systems.

    Attributes:
        systems: names, sorted; `first` and `second` are indices into them.
        first: the system whose answer was shown first.
        second: the other one.
        score: of the first one: 1 won, 0.5 tie, 0 lost.
        points: what the judge gave the two; NaN where it gave a verdict alone.
        question: of each match, as a text; empty where unknown.
        judge: who rated.
        turn: of the question, from 1; 0 where it has only one.
        unparsed: how many records had no verdict; they are in none of the arrays.
    """

    systems: tuple[str, ...]
    first: Int[np.ndarray, " M"]
    second: Int[np.ndarray, " M"]
    score: Float[np.ndarray, " M"]
    points: Float[np.ndarray, "M 2"]
    question: np.ndarray
    judge: np.ndarray
    turn: Int[np.ndarray, " M"]
    unparsed: int

    def of_judge(self, judge: str) -> "Ratings":
        """Returns the matches of one judge, and the systems that occur in them."""
        keep = self.judge == judge
        fields = ("first", "second", "score", "points", "question", "judge", "turn")
        kept = {name: getattr(self, name)[keep] for name in fields}
        used, index = np.unique([kept["first"], kept["second"]], return_inverse=True)
        kept["first"], kept["second"] = index.reshape(2, -1)
        systems = tuple(self.systems[i] for i in used)
        return dataclasses.replace(self, systems=systems, **kept)


@dataclasses.dataclass(frozen=True)
class PositionBias:
    """How the place of an answer changes the verdict.

    Attributes:
        first: share of all matches that the answer shown first won.
        second: that the other one won. The rest is ties.
        both_orders: how many pairs of answers were judged in both orders.
        same: share of those with the same verdict on both.
        always_first: the answer shown first won both times.
        always_second: the answer shown second won both times. The rest is one tie and one win.
    """

    first: float
    second: float
    both_orders: int
    same: float
    always_first: float
    always_second: float


def read_ratings(*paths: str | pathlib.Path) -> Ratings:
    """Reads files of verdicts, or all `*.jsonl` of folders and of the folders in them.

    Args:
        *paths: at least one file or folder.

    Returns:
        The verdicts.

    Raises:
        DataError: nothing is there, a record is of neither kind, or none has a verdict.
    """
    files: list[pathlib.Path] = []
    for found in (resolve_path(str(path)) for path in paths):
        inside = sorted(found.rglob("*.jsonl")) if found.is_dir() else [found]
        if not inside:
            raise DataError(f"{found} holds no .jsonl files; {_NEED}")
        files += inside
    records = [(file, number, record) for file in files for number, record in _records(file)]
    named = {file: _systems_of(file) for file in files}
    owners = _owners((named[file], record) for file, _, record in records)
    matches, unparsed = [], 0
    for file, number, record in records:
        try:
            match = _match(record, named[file], owners)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise DataError(f"{file}, line {number}: not a verdict; {_NEED}") from None
        if match is None:
            unparsed += 1
        elif match[0] == match[1]:
            raise DataError(f"{file}, line {number}: {match[0]} is compared with itself; {_NEED}")
        else:
            matches.append(match)
    if not matches:
        source = ", ".join(map(str, paths))
        raise DataError(f"{source}: {unparsed} records, none with a verdict; {_NEED}")
    return _as_arrays(matches, unparsed)


def _records(file: pathlib.Path) -> Iterable[tuple[int, dict]]:
    with file.open(encoding="utf-8-sig") as lines:
        try:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, json.loads(line)
        except ValueError as error:
            raise DataError(f"{file}: not JSON Lines in UTF-8 ({error}); {_NEED}") from None


def _systems_of(file: pathlib.Path) -> tuple[str, str, str] | None:
    """Returns the two systems and the judge of a file of the authors."""
    match = _NAME.match(file.name)
    if not match:
        return None
    judge = match["judge"]
    return _display(match["first"]), _display(match["second"]), _JUDGES.get(judge, judge)


def _display(name: str) -> str:
    name = name.removeprefix("answer-")
    if own := _OWN.fullmatch(name):
        name = f"{own[1]}-{own[2]}"
    if name in _SYSTEMS:
        return _SYSTEMS[name]
    size, _, data = name.partition("-")
    return f"{data.capitalize()} {size.upper()}" if own else name


def _owners(records: Iterable[tuple[Any, dict]]) -> dict[str, set[str]]:
    """Returns, for each answer, the systems that could have written it."""
    candidates: dict[str, set[str]] = {}
    for named, record in records:
        if named and isinstance(record, dict):
            for key in ("answer1_id", "answer2_id"):
                if isinstance(answer := record.get(key), str):
                    known = candidates.setdefault(answer, set(named[:2]))
                    known &= set(named[:2])
    return candidates


def _match(record: dict, named: tuple[str, str, str] | None, owners: dict[str, set[str]]):
    question = str(record.get("question_id", ""))
    if "winner" in record:
        winner = record["winner"]
        if not isinstance(winner, str) or not (winner in _WINNERS or winner.startswith("tie")):
            return None
        names = (str(record["model_a"]), str(record["model_b"]))
        judge = str(record.get("judge", "unknown"))
        one, two = map(float, record.get("points") or (np.nan, np.nan))
        turn = int(record.get("turn", 0))
        return (*names, _WINNERS.get(winner, 0.5), (one, two), question, judge, turn)
    first, second, judge = named
    # Either answer settles the order, where it is known.
    if owners.get(record.get("answer1_id")) == {second} or (
        owners.get(record.get("answer2_id")) == {first}
    ):
        first, second = second, first
    score = record["score"]
    if isinstance(score, list):
        one, two = map(float, score)
        if not (0 <= one < np.inf and 0 <= two < np.inf):
            return None
        return (first, second, (np.sign(one - two) + 1) / 2, (one, two), question, judge, 0)
    if score == -1:
        return None
    return (first, second, _CLASSES[score], (np.nan, np.nan), question, judge, 0)


def _as_arrays(matches: Sequence[tuple], unparsed: int) -> Ratings:
    first, second, score, points, question, judge, turn = zip(*matches, strict=True)
    systems = tuple(sorted({*first, *second}))
    index = {name: number for number, name in enumerate(systems)}
    return Ratings(
        systems=systems,
        first=np.array([index[name] for name in first]),
        second=np.array([index[name] for name in second]),
        score=np.array(score, np.float64),
        points=np.array(points, np.float64),
        question=np.array(question),
        judge=np.array(judge),
        turn=np.array(turn),
        unparsed=unparsed,
    )


def position_bias(ratings: Ratings) -> PositionBias:
    """Measures how often the verdict follows the place of an answer.

    Args:
        ratings: of one judge or several; the two orders are compared judge by judge.

    Returns:
        Shares in [0, 1]; NaN for those over both orders if nothing was judged twice.
    """
    orders = collections.defaultdict(lambda: ([], []))
    who = (ratings.judge, ratings.question, ratings.turn)
    columns = (*who, ratings.first, ratings.second, ratings.score)
    for judge, question, turn, one, two, score in zip(*columns, strict=True):
        key = (judge, question, turn, min(one, two), max(one, two))
        orders[key][int(one > two)].append(score)
    # An answer that was judged several times in one order has its first verdict counted. Without
    # questions, nothing says which verdicts are on the same answers.
    pairs = [(a[0], b[0]) for (_, question, *_), (a, b) in orders.items() if question and a and b]
    ahead, behind = np.array(pairs, np.float64).reshape(-1, 2).T

    def share(of: np.ndarray) -> float:
        return float(of.mean()) if len(of) else float("nan")

    return PositionBias(
        first=share(ratings.score == 1),
        second=share(ratings.score == 0),
        both_orders=len(pairs),
        same=share(ahead + behind == 1),
        always_first=share((ahead == 1) & (behind == 1)),
        always_second=share((ahead == 0) & (behind == 0)),
    )


def relative_scores(ratings: Ratings, baseline: str) -> dict[str, tuple[float, float, float]]:
    """Returns each system's points as a percentage of the baseline's.

    It is the ratio of sums (Table 6 of the QLoRA paper), not the average of ratios.

    Args:
        ratings: those with points count, in matches against the baseline.
        baseline: a system's name.

    Returns:
        For each system: the percentage when the baseline is shown first, when it is second, and
        over both orders together. NaN for an order that does not occur.
    """
    index = ratings.systems.index(baseline)
    rated = ~np.isnan(ratings.points[:, 0])
    result = {}
    for number, name in enumerate(ratings.systems):
        after = rated & (ratings.first == index) & (ratings.second == number)
        before = rated & (ratings.first == number) & (ratings.second == index)
        if number != index and (after.any() or before.any()):
            # The baseline's points, then the system's.
            orders = (ratings.points[after].sum(0), ratings.points[before].sum(0)[::-1])
            with np.errstate(invalid="ignore"):
                shares = [float(100 * p[1] / p[0]) for p in (*orders, orders[0] + orders[1])]
            result[name] = tuple(shares)
    return result
