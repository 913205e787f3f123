"""Do raters agree, on single answers and on the order of the systems?

**On answers**: Fleiss' kappa over verdicts in three classes (one answer, the other, a tie),

    kappa = (P - P_e) / (1 - P_e),

where P is the share of pairs of ratings of the same item that are equal, averaged over items, and
P_e what it would be if all ratings were drawn from their overall frequencies. 1 is agreement, 0
what chance gives. An item is a question (and turn) with two systems' answers, whoever was shown
first.

**On systems**: Kendall's tau (b, for ties) and Spearman's rho between the systems' Elo ratings,
from each rater's own verdicts. With few systems both are coarse: four systems have 24 orders.

The QLoRA paper compares GPT-4 with people in these figures (section 5.3). Between two raters the
verdict of each on an item counts once: what it said most, over both orders and all votes.

Sources: Fleiss 1971, "Measuring nominal scale agreement among many raters"; for items with
different numbers of ratings, P is averaged over those that have at least two.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import scipy  # scipy.stats comes with its first use: 60 MB that a training run does not need
from jaxtyping import Int

from qlora_jax.errors import DataError, EvaluationError
from qlora_jax.evaluation.elo import elo_ratings
from qlora_jax.evaluation.ratings import Ratings

# With two systems, tau and rho can only be 1, -1 or nothing.
_FEWEST_SYSTEMS = 3

Item = tuple[str, int, str, str]


class Consistency(NamedTuple):
    """How far the ratings of one rater agree with each other.

    Attributes:
        ratings: all of them.
        repeated: items that were rated more than once: in both orders, or by several people who
            share a name.
        kappa: over those; NaN if there are none, or if all ratings are the same.
    """

    ratings: int
    repeated: int
    kappa: float


class Agreement(NamedTuple):
    """How far two raters agree.

    Attributes:
        items: that both have rated.
        same: share of those with the same verdict; NaN if there are none.
        kappa: Fleiss' of the two; NaN if there are no items, or if all verdicts are the same.
        systems: that both have rated.
        tau: Kendall's, between their Elo ratings; NaN with fewer than three systems.
        rho: Spearman's, as well.
    """

    items: int
    same: float
    kappa: float
    systems: int
    tau: float
    rho: float


class AllRaters(NamedTuple):
    """How far all raters agree.

    Attributes:
        items: that at least two have rated.
        kappa: Fleiss' over those; NaN as above.
    """

    items: int
    kappa: float


@dataclasses.dataclass(frozen=True)
class AgreementReport:
    """Raters beside each other.

    Attributes:
        alone: each rater's agreement with itself.
        pairs: of two raters.
        together: all raters at once.
    """

    alone: Mapping[str, Consistency]
    pairs: Mapping[tuple[str, str], Agreement]
    together: AllRaters


def fleiss_kappa(counts: Int[np.ndarray, "N K"]) -> float:
    """Agreement beyond chance of any number of raters.

    Args:
        counts: how many raters put each item into each class. Items with fewer than two ratings
            say nothing about agreement and are left out.

    Returns:
        At most 1; NaN if all ratings are of one class, when chance gives agreement, too.

    Raises:
        DataError: no item has two ratings.

    Example:
        >>> round(fleiss_kappa(np.array([[3, 0], [0, 3], [2, 1], [1, 2]])), 6)
        0.333333
    """
    counts = np.asarray(counts, np.float64)
    raters = counts.sum(1)
    counts, raters = counts[raters >= 2], raters[raters >= 2]
    if not len(counts):
        raise DataError("agreement needs two ratings of an item, and every item has only one")
    equal_pairs = (counts * (counts - 1)).sum(1) / (raters * (raters - 1))
    shares = counts.sum(0) / counts.sum()
    by_chance = float((shares**2).sum())
    if np.count_nonzero(shares) == 1:
        return float("nan")
    return (float(equal_pairs.mean()) - by_chance) / (1 - by_chance)


def compare_raters(
    ratings: Mapping[str, Ratings], *, orderings: int = 10_000, seed: int = 0
) -> AgreementReport:
    """Measures how far raters agree with themselves and with each other.

    Args:
        ratings: of each rater, by its name.
        orderings: of Elo.
        seed: of those.

    Raises:
        DataError: no item has two ratings, by one rater or by two.
    """
    votes = {name: _votes(one) for name, one in ratings.items()}
    verdicts = {name: {item: _most(v) for item, v in by.items()} for name, by in votes.items()}
    together = _together(list(verdicts.values()))
    if not together and not any(len(v) > 1 for by in votes.values() for v in by.values()):
        raise DataError(
            f"{' and '.join(ratings)}: no two ratings of the same answers. Agreement needs a "
            "second rater of the same systems and questions (the same names and question_ids), "
            "or ratings in both orders"
        )
    elo = {
        name: dict(zip(one.systems, _elo(one, orderings, seed), strict=True))
        for name, one in ratings.items()
    }
    return AgreementReport(
        alone={name: _consistency(ratings[name], by) for name, by in votes.items()},
        pairs={
            (a, b): _agreement((verdicts[a], verdicts[b]), (elo[a], elo[b]))
            for a, b in itertools.combinations(ratings, 2)
        },
        together=AllRaters(len(together), _kappa(together)),
    )


def by_rater(sources: Sequence[tuple[str, Ratings]]) -> dict[str, Ratings]:
    """Splits ratings from several sources into those of each judge.

    Args:
        sources: with a name each, which tells apart judges of the same name.
    """
    judges = [
        (name, one, judge) for name, one in sources for judge in sorted(set(one.judge.tolist()))
    ]
    times = collections.Counter(judge for *_, judge in judges)
    found = {}
    for name, one, judge in judges:
        label = judge if times[judge] == 1 else f"{judge} ({name})"
        if label in found:
            raise DataError(f"two sources of ratings are called {name!r}; rename one")
        found[label] = one.of_judge(judge)
    return found


def _votes(ratings: Ratings) -> dict[Item, list[float]]:
    """All scores of an item, of the system that is earlier in the alphabet."""
    found = collections.defaultdict(list)
    columns = (ratings.question, ratings.turn, ratings.first, ratings.second, ratings.score)
    for question, turn, first, second, score in zip(*columns, strict=True):
        if question:  # without it, nothing says which ratings are of the same answers
            names = ratings.systems[first], ratings.systems[second]
            item = (str(question), int(turn), *sorted(names))
            found[item].append(float(score if names[0] < names[1] else 1 - score))
    return found


def _most(scores: Sequence[float]) -> float:
    """What was said most: a win, a loss or, where neither prevails, a tie."""
    return float(np.sign(2 * sum(scores) - len(scores)) + 1) / 2


def _together(verdicts: Sequence[Mapping[Item, float]]) -> list[list[float]]:
    items = collections.defaultdict(list)
    for one in verdicts:
        for item, score in one.items():
            items[item].append(score)
    return [scores for scores in items.values() if len(scores) > 1]


def _kappa(items: Sequence[Sequence[float]]) -> float:
    counts = [[scores.count(kind) for kind in (0.0, 0.5, 1.0)] for scores in items]
    return fleiss_kappa(np.array(counts)) if counts else float("nan")


def _consistency(ratings: Ratings, votes: Mapping[Item, list[float]]) -> Consistency:
    repeated = [scores for scores in votes.values() if len(scores) > 1]
    return Consistency(len(ratings.score), len(repeated), _kappa(repeated))


def _elo(ratings: Ratings, orderings: int, seed: int) -> np.ndarray:
    played = (ratings.first, ratings.second, ratings.score, len(ratings.systems))
    return elo_ratings(*played, orderings=orderings, seed=seed).mean


def _agreement(
    verdicts: tuple[Mapping[Item, float], Mapping[Item, float]],
    elo: tuple[Mapping[str, float], Mapping[str, float]],
) -> Agreement:
    both = _together(verdicts)
    same = sum(a == b for a, b in both) / len(both) if both else float("nan")
    systems = sorted(elo[0].keys() & elo[1].keys())
    tau = rho = float("nan")
    if len(systems) >= _FEWEST_SYSTEMS:
        ranks = [[one[name] for name in systems] for one in elo]
        tau = float(scipy.stats.kendalltau(*ranks).statistic)
        rho = float(scipy.stats.spearmanr(*ranks).statistic)
    return Agreement(len(both), same, _kappa(both), len(systems), tau, rho)


def write(report: AgreementReport, out: str | pathlib.Path, sources: Sequence[str]) -> pathlib.Path:
    """Writes the figures as JSON, `null` where there are none.

    Args:
        report: the figures.
        out: a folder; made if it is missing.
        sources: where the ratings are from.

    Returns:
        The path of `agreement.json`.

    Raises:
        EvaluationError: the folder cannot be made or written.
    """
    path = pathlib.Path(out).expanduser() / "agreement.json"
    content = {
        "sources": list(sources),
        "raters": {name: _finite(one) for name, one in report.alone.items()},
        "pairs": [{"raters": two, **_finite(one)} for two, one in report.pairs.items()],
        "all": _finite(report.together),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise EvaluationError(f"{path} cannot be written: {error.strerror}") from error
    return path


def _finite(figures: NamedTuple) -> dict[str, float | None]:
    pairs = figures._asdict().items()
    return {name: value if np.isfinite(value) else None for name, value in pairs}
