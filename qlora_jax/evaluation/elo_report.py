"""A tournament as a page: tables and plots in Markdown, and the same as one HTML file.

`write` takes verdicts and leaves in a folder `report.md` with its plots beside it, `report.html`
with the plots inside it, and `elo.json` with all figures and what is needed to repeat them.
"""

import base64
import dataclasses
import html
import json
import pathlib
import re
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qlora_jax.errors import UserError
from qlora_jax.evaluation.elo import START, K, bradley_terry, elo_ratings, head_to_head
from qlora_jax.evaluation.ratings import Ratings, position_bias, relative_scores

_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([mb])\b", re.IGNORECASE)
_BILLIONS = {"b": 1.0, "m": 1e-3}
_INTERVALS = (
    "Elo is the mean over random orderings of the matches. ± is the 95 % interval of that mean: it "
    "shrinks with the number of orderings and does not say how sure a difference between systems "
    "is. “One ordering” is where 95 % of single orderings end. Bradley-Terry does not depend on "
    "the order; its interval comes from drawing the questions anew, and is the one to compare "
    "systems by. A dash: there is no such figure, for example because a system won every match."
)


@dataclasses.dataclass(frozen=True)
class _Section:
    """A heading, and what may stand under it: text, a table (its first row the heads), a plot."""

    title: str
    text: str = ""
    table: Sequence[Sequence[str]] = ()
    plot: str = ""


def write(
    ratings: Ratings,
    out: str | pathlib.Path,
    *,
    orderings: int = 10_000,
    matches: int | None = None,
    seed: int = 0,
    source: str = "",
    sizes: Mapping[str, float] | None = None,
) -> pathlib.Path:
    """Rates the systems and writes the report.

    Args:
        ratings: the verdicts.
        out: a folder; made if it is missing. Files of an earlier report in it are replaced.
        orderings: of Elo, at least 2.
        matches: how many each ordering draws; None: all.
        seed: of the orderings and of the bootstrap.
        source: where the verdicts are from, for the page.
        sizes: of systems, in billions of parameters; of the others what their names say ("7B").

    Returns:
        The path of `report.md`.

    Raises:
        UserError: the folder cannot be made, or a size is of no system, or not above zero.
    """
    sizes = _sizes(ratings.systems, sizes or {})
    out = pathlib.Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {out}: {error.strerror}") from None
    elo, likely = _rate(ratings, orderings, matches, seed)
    wins, played = head_to_head(ratings.first, ratings.second, ratings.score, len(ratings.systems))
    ranks = np.argsort(-elo.mean, kind="stable")
    judges = sorted(set(ratings.judge.tolist()))
    _draw(out / "elo.png", _draw_ratings, ratings.systems, elo, likely, ranks)
    _draw(out / "head_to_head.png", _draw_matrix, ratings.systems, wins, played, ranks)
    sections = [
        _Section("Ratings", _INTERVALS, _rating_table(ratings, elo, likely, ranks), "elo.png"),
        _Section(
            "Head to head",
            "Share of the matches that the system of the row won against that of the column, a tie "
            "being half a win.",
            plot="head_to_head.png",
        ),
        _Section(
            "Position bias",
            "How often the answer that was shown first won, over all matches; and, of the pairs "
            "that were judged in both orders, how often the verdict stayed the same, and how often "
            "the answer at one place won both times.",
            _bias_table(ratings, judges),
        ),
    ]
    sections.append(
        _Section(
            "Score by position",
            "What a system scored when its answer was shown first, and when second. With one order "
            "alone, the difference would be taken for quality.",
            _position_table(ratings, ranks),
        )
    )
    if len(judges) > 1:
        sections.append(_per_judge(ratings, judges, ranks, orderings, matches, seed))
    if relative := _relative(ratings):
        sections.append(relative)
    if len(set(sizes.values())) > 1:
        _draw(out / "size.png", _draw_sizes, ratings.systems, elo, likely, sizes)
        text = "For the systems whose number of parameters is known."
        sections.append(_Section("Score against size", text, plot="size.png"))
    settings = {
        "source": source,
        "matches": len(ratings.score),
        "unparsed": ratings.unparsed,
        "judges": judges,
        "k": K,
        "start": START,
        "orderings": orderings,
        "matches_per_ordering": min(len(ratings.score), matches or len(ratings.score)),
        "seed": seed,
    }
    rated = {
        name: {
            "elo": float(elo.mean[i]),
            "elo_mean_interval": float(elo.mean_interval[i]),
            "elo_spread": elo.spread[i].tolist(),
            "bradley_terry": _or_none(likely.rating[i]),
            "bradley_terry_interval": [_or_none(end) for end in likely.interval[i]],
        }
        for i, name in enumerate(ratings.systems)
    }
    results = {
        "settings": settings,
        "systems": ratings.systems,
        "ratings": rated,
        "wins": wins.tolist(),
        "matches": played.tolist(),
    }
    (out / "elo.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    intro = ", ".join(
        f"{name.replace('_', ' ')}: {_text(value)}" for name, value in settings.items()
    )
    (out / "report.html").write_text(_as_html(sections, intro, out), encoding="utf-8")
    (out / "report.md").write_text(_as_markdown(sections, intro), encoding="utf-8")
    return out / "report.md"


def _sizes(systems: Sequence[str], given: Mapping[str, float]) -> dict[int, float]:
    """Billions of parameters, by the number of the system."""
    for name, size in given.items():
        if name not in systems:
            raise UserError(f"a size of {name!r} was given; the systems are {', '.join(systems)}")
        if isinstance(size, bool) or not isinstance(size, int | float) or not 0 < size < np.inf:
            raise UserError(f"the size of {name!r} must be billions of parameters, got {size!r}")
    named = {i: _SIZE.search(name) for i, name in enumerate(systems)}
    found = {i: float(m[1]) * _BILLIONS[m[2].lower()] for i, m in named.items() if m}
    found |= {i: float(given[name]) for i, name in enumerate(systems) if name in given}
    return {i: size for i, size in found.items() if size > 0}


def _rate(ratings: Ratings, orderings: int, matches: int | None, seed: int):
    played = (ratings.first, ratings.second, ratings.score, len(ratings.systems))
    # Without questions, matches are drawn.
    question = None
    if (ratings.question != "").all():
        question = np.unique(ratings.question, return_inverse=True)[1]
    return (
        elo_ratings(*played, orderings=orderings, matches=matches, seed=seed),
        bradley_terry(*played, question=question, seed=seed),
    )


def _rating_table(ratings, elo, likely, ranks) -> list[list[str]]:
    count = np.bincount(np.concatenate([ratings.first, ratings.second]), minlength=len(ranks))
    rows = [["system", "matches", "Elo", "±", "one ordering", "Bradley-Terry", "95 %"]]
    for i in ranks:
        row = [ratings.systems[i], f"{count[i]:,}", _round(elo.mean[i])]
        row += [f"{elo.mean_interval[i]:.1f}", _range(elo.spread[i])]
        rows.append([*row, _round(likely.rating[i]), _range(likely.interval[i])])
    return rows


def _bias_table(ratings: Ratings, judges: Sequence[str]) -> list[list[str]]:
    rows = [["judge", "first won", "second won", "both orders", "same", "always first"]]
    rows[0].append("always second")
    for judge in judges:
        bias = position_bias(ratings.of_judge(judge))
        row = [judge, _percent(bias.first), _percent(bias.second), f"{bias.both_orders:,}"]
        shares = (bias.same, bias.always_first, bias.always_second)
        rows.append([*row, *map(_percent, shares)])
    return rows


def _position_table(ratings: Ratings, ranks) -> list[list[str]]:
    rows = [["system", "shown first", "shown second"]]
    for i in ranks:
        first, second = ratings.first == i, ratings.second == i
        ahead = ratings.score[first].mean() if first.any() else np.nan
        behind = 1 - ratings.score[second].mean() if second.any() else np.nan
        rows.append([ratings.systems[i], _percent(ahead), _percent(behind)])
    return rows


def _per_judge(ratings, judges, ranks, orderings, matches, seed) -> _Section:
    cells = {}
    for judge in judges:
        own = ratings.of_judge(judge)
        elo, likely = _rate(own, orderings, matches, seed)
        for i, name in enumerate(own.systems):
            cells[judge, name] = f"{_round(elo.mean[i])} / {_round(likely.rating[i])}"
    names = [ratings.systems[i] for i in ranks]
    rows = [[name, *(cells.get((judge, name), "–") for judge in judges)] for name in names]
    text = "Elo / Bradley-Terry from the verdicts of one judge."
    return _Section("By judge", text, [["system", *judges], *rows])


def _relative(ratings: Ratings) -> _Section | None:
    """Points against the one system that all matches with points have in common."""
    rated = ~np.isnan(ratings.points[:, 0])
    pairs = zip(ratings.first[rated].tolist(), ratings.second[rated].tolist(), strict=True)
    shared = set.intersection(*map(set, pairs)) if rated.any() else set()
    if len(shared) != 1:
        return None
    baseline = ratings.systems[shared.pop()]
    rows = [["system", f"{baseline} first", f"{baseline} second", "both orders"]]
    for name, shares in relative_scores(ratings, baseline).items():
        rows.append([name, *(f"{share:.1f}" if np.isfinite(share) else "–" for share in shares)])
    text = f"Sum of a system's points in percent of the sum of {baseline}'s."
    return _Section(f"Points relative to {baseline}", text, rows)


def _draw(path: pathlib.Path, draw, systems: Sequence[str], *arguments) -> None:
    # A Figure of its own, not pyplot's: no window system is asked for, and nothing is kept.
    figure = Figure(figsize=(8, max(5, 0.4 * len(systems))), layout="constrained")
    draw(figure.add_subplot(), systems, *arguments)
    figure.savefig(path, dpi=110)


def _draw_ratings(axes: Axes, systems, elo, likely, ranks) -> None:
    places = np.arange(len(ranks))
    for label, value, ends, shift in (
        ("Elo, 95 % of single orderings", elo.mean, elo.spread, -0.12),
        ("Bradley-Terry, 95 % over questions", likely.rating, likely.interval, 0.12),
    ):
        axes.errorbar(
            value[ranks], places + shift, xerr=_bars(value, ends)[:, ranks], fmt="o", label=label,
            capsize=3,
        )  # fmt: skip
    axes.set_yticks(places, [systems[i] for i in ranks])
    axes.invert_yaxis()
    axes.set_xlabel("rating")
    axes.grid(axis="x", alpha=0.3)
    axes.legend()


def _draw_matrix(axes: Axes, systems, wins, played, ranks) -> None:
    with np.errstate(invalid="ignore"):
        share = (wins / played)[np.ix_(ranks, ranks)]
    image = axes.imshow(share, cmap="RdBu", vmin=0, vmax=1)
    names = [systems[i] for i in ranks]
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    for (row, column), value in np.ndenumerate(share):
        if np.isfinite(value):
            shade = "white" if abs(value - 0.5) > 0.3 else "black"
            axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", color=shade)
    axes.figure.colorbar(image, label="share won by the row's system")


def _draw_sizes(axes: Axes, systems, elo, likely, sizes: dict[int, float]) -> None:
    for i, size in sizes.items():
        bars = _bars(likely.rating[i], likely.interval[i])
        axes.errorbar([size], [likely.rating[i]], yerr=bars.reshape(2, 1), fmt="o", capsize=3)
        axes.annotate(systems[i], (size, elo.mean[i]), (6, 4), textcoords="offset points")
        axes.plot([size], [elo.mean[i]], "kx")
    axes.set_xscale("log")
    axes.margins(x=0.2)  # for the names
    ticks = sorted(set(sizes.values()))
    axes.set_xticks(ticks, [f"{size:g}" for size in ticks], minor=False)
    axes.set_xticks([], minor=True)
    axes.set(xlabel="parameters, billions", ylabel="Bradley-Terry with 95 %; cross: Elo")


def _bars(value, ends: Float[np.ndarray, "... 2"]) -> Float[np.ndarray, "2 ..."]:
    """Returns the lengths of error bars; a mean can lie outside quantiles by rounding."""
    return np.maximum(0, np.stack([value - ends[..., 0], ends[..., 1] - value]))


def _as_markdown(sections: Sequence[_Section], intro: str) -> str:
    def row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"

    parts = [f"# Tournament\n\n{intro}\n"]
    for section in sections:
        parts.append(f"\n## {section.title}\n\n{section.text}\n")
        if section.table:
            head, *rows = section.table
            parts.append("\n" + row(head) + row(["---"] * len(head)) + "".join(map(row, rows)))
        if section.plot:
            parts.append(f"\n![{section.title}]({section.plot})\n")
    return "".join(parts)


def _as_html(sections: Sequence[_Section], intro: str, folder: pathlib.Path) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        inside = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
        return f"<tr>{inside}</tr>\n"

    style = (
        "body{font-family:sans-serif;max-width:60em;margin:2em auto;line-height:1.4}"
        "td,th{padding:.2em .8em;text-align:right}td:first-child,th:first-child{text-align:left}"
        "img{max-width:100%}"
    )
    parts = [
        f"<!doctype html>\n<meta charset=utf-8><title>Tournament</title><style>{style}</style>\n"
    ]
    parts.append(f"<h1>Tournament</h1>\n<p>{html.escape(intro)}</p>\n")
    for section in sections:
        parts.append(f"<h2>{html.escape(section.title)}</h2>\n<p>{html.escape(section.text)}</p>\n")
        if section.table:
            head, *rows = section.table
            body = row(head, "th") + "".join(row(cells, "td") for cells in rows)
            parts.append(f"<table>\n{body}</table>\n")
        if section.plot:
            data = base64.b64encode((folder / section.plot).read_bytes()).decode()
            alt = html.escape(section.title)
            parts.append(f'<img alt="{alt}" src="data:image/png;base64,{data}">\n')
    return "".join(parts)


def _or_none(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None  # JSON has no NaN


def _text(value) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)


def _round(value: float) -> str:
    return f"{value:.0f}" if np.isfinite(value) else "–"


def _range(ends: Float[np.ndarray, "2"]) -> str:
    return f"{ends[0]:.0f} to {ends[1]:.0f}" if np.isfinite(ends).all() else "–"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if np.isfinite(share) else "–"
