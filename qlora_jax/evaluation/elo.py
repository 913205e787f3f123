"""Ratings of systems from matches between them: Elo over random orderings, and Bradley-Terry.

Both say the same thing of a pair, that system i beats system j with the probability

    p_ij = 1 / (1 + 10 ** ((r_j - r_i) / 400)),

so 400 points are odds of 10 to 1. They differ in how r is found.

**Elo** walks through the matches once. After each, the winner takes K * (score - p) points from
the loser (score 1, or 0.5 for a tie). The last matches count most, so the result depends on their
order; the QLoRA paper therefore averages over 10,000 random orderings (K = 32, start 1000). Two
intervals belong to such an average, and they answer different questions:

- `mean_interval`, of the mean over orderings, tells how well the *average* is known. It shrinks
  with the number of orderings, whatever the number of matches: it is no measure of how sure one
  can be that a system is better. This is the paper's "± 1".
- `spread`, the central 95 % of single orderings, tells what one pass could have said.

With few matches Elo has not moved all the way from its start. Its average over the orderings of
493 matches of eight systems is closer to 1000 than that of 4,467 matches of the same kind.

**Bradley-Terry** is the r that makes all matches together most likely; the order does not
matter. Its interval comes from drawing the *questions* anew (a bootstrap), which is the chance that
is really at work: other questions, other verdicts.

Source: Dettmers et al. 2023, "QLoRA", section 5.3; Hunter 2004, "MM algorithms for generalized
Bradley-Terry models", for the iteration and for when a maximum exists.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int

START = 1000.0
K = 32.0
_LOGIT = np.log(10) / 400
# Orderings that walk side by side: enough to drown NumPy's overhead a call, few enough to stay in
# the cache.
_ORDERINGS = 2000
_MATCHES = 64


@dataclasses.dataclass(frozen=True)
class Elo:
    """Elo ratings over random orderings, a row each.

    Attributes:
        mean: the average rating.
        mean_interval: of the average, 95 %, half its width: 1.96 standard errors.
        spread: of a single ordering, the 2.5 % and 97.5 % quantiles.
    """

    mean: Float[np.ndarray, " S"]
    mean_interval: Float[np.ndarray, " S"]
    spread: Float[np.ndarray, "S 2"]


@dataclasses.dataclass(frozen=True)
class BradleyTerry:
    """Maximum-likelihood ratings, their mean at 1000; NaN where no maximum exists.

    Attributes:
        rating: from all matches.
        interval: the 2.5 % and 97.5 % quantiles over the bootstrap; NaN if a draw has no maximum.
    """

    rating: Float[np.ndarray, " S"]
    interval: Float[np.ndarray, "S 2"]


def elo_ratings(
    first: Int[np.ndarray, " M"],
    second: Int[np.ndarray, " M"],
    score: Float[np.ndarray, " M"],
    num_systems: int,
    *,
    orderings: int = 10_000,
    matches: int | None = None,
    k: float = K,
    seed: int = 0,
) -> Elo:
    """Averages Elo ratings over random orderings of the matches.

    Args:
        first: index of the system whose answer was shown first.
        second: index of the other one; nobody plays itself.
        score: of the first one: 1 won, 0.5 tie, 0 lost.
        num_systems: S.
        orderings: how many, at least 2.
        matches: how many each ordering draws, without replacement; None: all. The paper's Table 1
          comes out with about a tenth of them.
        k: the most that a match moves, in points.
        seed: the same seed gives the same ratings.

    Returns:
        The ratings; all start at 1000, and so does their mean stay.

    Example:
        >>> once = elo_ratings(np.array([0]), np.array([1]), np.array([1.0]), 2, orderings=2)
        >>> once.mean.round(3)
        array([1016.,  984.])
    """
    count = len(first) if matches is None else min(matches, len(first))
    rng = np.random.default_rng(seed)
    ratings = np.concatenate(
        [
            _walk(
                rng, first, second, score, num_systems, min(_ORDERINGS, orderings - done), count, k
            )
            for done in range(0, orderings, _ORDERINGS)
        ]
    )
    return Elo(
        mean=ratings.mean(0),
        mean_interval=1.96 * ratings.std(0, ddof=1) / np.sqrt(orderings),
        spread=np.quantile(ratings, [0.025, 0.975], axis=0).T,
    )


def _walk(rng, first, second, score, num_systems, orderings, count, k) -> Float[np.ndarray, "O S"]:
    """Walks through `orderings` orderings at a time, one match of each a step."""
    order = np.empty((count, orderings), np.int32)
    for column in range(orderings):
        order[:, column] = rng.permutation(len(first))[:count]
    # In units of the logistic function, and from zero: small numbers, of which float32 holds what
    # matters, at half the traffic.
    ratings = np.zeros(orderings * num_systems, np.float32)
    base = np.arange(orderings, dtype=np.int64) * num_systems
    step = np.float32(k * _LOGIT)
    for start in range(0, count, _MATCHES):
        block = order[start : start + _MATCHES]
        for i, j, won in zip(
            first[block] + base, second[block] + base, score.astype(np.float32)[block], strict=True
        ):
            r_i, r_j = ratings.take(i), ratings.take(j)
            gain = won - 1 / (1 + np.exp(r_j - r_i))
            gain *= step
            ratings[i] = r_i + gain
            ratings[j] = r_j - gain
    return START + ratings.reshape(orderings, num_systems).astype(np.float64) / _LOGIT


def bradley_terry(
    first: Int[np.ndarray, " M"],
    second: Int[np.ndarray, " M"],
    score: Float[np.ndarray, " M"],
    num_systems: int,
    *,
    question: Int[np.ndarray, " M"] | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> BradleyTerry:
    """Finds the ratings that make the matches most likely.

    Args:
        first: see `elo_ratings`.
        second: see `elo_ratings`.
        score: see `elo_ratings`; a tie is half a win of each.
        num_systems: S.
        question: the question of each match, from 0. Verdicts on one question share its answers and
          are not independent, so the bootstrap draws questions; None: it draws matches.
        draws: of the bootstrap.
        seed: the same seed gives the same intervals.

    Returns:
        The ratings. A maximum exists only if no group of systems wins (or loses) every match
        against the others.

    Example:
        >>> won = np.array([1.0] * 10 + [0.0])
        >>> bradley_terry(np.zeros(11, int), np.ones(11, int), won, 2, draws=2).rating
        array([1200.,  800.])
    """
    group = (
        np.arange(len(first)) if question is None else np.unique(question, return_inverse=True)[1]
    )
    rng = np.random.default_rng(seed)
    groups = group.max() + 1
    wins = [_wins(first, second, score, num_systems, np.ones(len(first)))]
    for _ in range(draws):
        times = np.bincount(rng.integers(groups, size=groups), minlength=groups)
        wins.append(_wins(first, second, score, num_systems, times[group]))
    ratings = _most_likely(np.stack(wins))
    return BradleyTerry(ratings[0], np.quantile(ratings[1:], [0.025, 0.975], axis=0).T)


def _wins(first, second, score, num_systems, times) -> Float[np.ndarray, "S S"]:
    """Returns how often the row's system won against the column's."""
    size = num_systems**2
    won = np.bincount(first * num_systems + second, score * times, size)
    lost = np.bincount(second * num_systems + first, (1 - score) * times, size)
    return (won + lost).reshape(num_systems, num_systems)


def _most_likely(wins: Float[np.ndarray, "B S S"], *, tolerance=1e-9) -> Float[np.ndarray, "B S"]:
    """Iterates p_i = wins_i / sum_j n_ij / (p_i + p_j) of Hunter 2004 for all draws at once."""
    exists = _strongly_connected(wins > 0)
    wins = wins[exists]
    played = wins + wins.swapaxes(1, 2)
    strength = np.ones(wins.shape[:2])
    change = np.inf
    while wins.size and change > tolerance:
        pairs = strength[:, :, None] + strength[:, None, :]
        new = wins.sum(2) / (played / pairs).sum(2)
        new /= np.exp(np.log(new).mean(1, keepdims=True))
        change = np.abs(np.log(new / strength)).max()
        strength = new
    ratings = np.full((len(exists), played.shape[-1]), np.nan)
    ratings[exists] = START + np.log(strength) / _LOGIT
    return ratings


def _strongly_connected(edges: Bool[np.ndarray, "B S S"]) -> Bool[np.ndarray, " B"]:
    reach = edges | np.eye(edges.shape[-1], dtype=bool)
    for _ in range(edges.shape[-1].bit_length()):  # squaring doubles the length of the paths
        reach = reach @ reach
    return reach.all((1, 2))


def head_to_head(
    first: Int[np.ndarray, " M"],
    second: Int[np.ndarray, " M"],
    score: Float[np.ndarray, " M"],
    num_systems: int,
) -> tuple[Float[np.ndarray, "S S"], Float[np.ndarray, "S S"]]:
    """Returns the wins of the row's system over the column's (ties half), and the matches played.

    Example:
        >>> wins, played = head_to_head(np.array([0, 1]), np.array([1, 0]), np.array([1, 0.5]), 2)
        >>> wins.tolist(), played.tolist()
        ([[0.0, 1.5], [0.5, 0.0]], [[0.0, 2.0], [2.0, 0.0]])
    """
    wins = _wins(first, second, score, num_systems, np.ones(len(first)))
    return wins, wins + wins.T
