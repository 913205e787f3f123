"""What data types cost, as tables, a plot, and the paper's claims held to the figures.

`write` leaves in a folder `datatypes.md` with `datatypes.png` beside it, and `datatypes.json` with
all figures and what is needed to repeat them.

A difference of a text's likelihood has a standard error: both models saw the same windows, so the
differences of the windows are looked at, and how much these scatter. One that is not larger than
two standard errors decides nothing, and the report says so.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qlora_jax.errors import EvaluationError
from qlora_jax.evaluation.datatypes import DATATYPES, SYNTHETIC, Cost, signal_to_noise
from qlora_jax.evaluation.datatypes_model import SIXTEEN_BITS
from qlora_jax.training.card import versions

# Of the paper: table 2 (perplexity: NF4 27.4, E3M0 29.5, E2M1 31.1, INT4 34.3), and that double
# quantization costs nothing; of bitsandbytes' FP4 what would hold if it were the paper's.
_CLAIMS = (
    ("NF4", "FP4 E2M1"),
    ("NF4", "FP4 E3M0"),
    ("NF4", "FP4 bnb"),
    ("NF4", "INT4"),
    ("FP4 E2M1", "INT4"),
    ("FP4 E3M0", "INT4"),
    ("FP4 bnb", "INT4"),
    ("FP4 E3M0", "FP4 E2M1"),
)
_FREE = ("NF4 + DQ", "NF4")
# A larger error of the weights than this share more, and double quantization is not called free.
_FREE_ERROR = 0.02


class Table(NamedTuple):
    """A heading, a sentence, and rows of cells of which the first are the heads."""

    title: str
    text: str
    rows: list[list[str]]


class Difference(NamedTuple):
    """Nats per token that one model needs more than another, with its standard error."""

    nats: float
    error: float


def difference(nats: Sequence[float], others: Sequence[float], tokens: Sequence[int]) -> Difference:
    """Compares two models on the same windows of a text.

    Args:
        nats: negative log-likelihood of each window.
        others: of the model to compare with.
        tokens: of each window.

    Returns:
        The difference per token; its standard error takes the windows as draws, and is NaN for a
        single one.

    >>> difference([2.0, 5.0], [1.0, 3.0], [10, 20])
    Difference(nats=0.1, error=0.0)
    """
    more, tokens = np.subtract(nats, others), np.asarray(tokens)
    mean, count = more.sum() / tokens.sum(), len(tokens)
    scatter = math.sqrt(((more - mean * tokens) ** 2).sum())
    error = scatter / tokens.sum() * math.sqrt(count / (count - 1)) if count > 1 else math.nan
    return Difference(float(mean), float(error))


def write(
    costs: Sequence[Cost],
    tokens: Sequence[int],
    out: pathlib.Path,
    *,
    settings: Mapping[str, Any],
    notes: Sequence[str] = (),
) -> list[Table]:
    """Writes the report.

    Args:
        costs: of random weights and maybe of one model.
        tokens: of the windows of the model's text.
        out: a folder; made if it is missing.
        settings: what is needed to repeat it.
        notes: sentences that a reader must know, for example that the model was quantized before.

    Returns:
        The tables, to be printed.

    Raises:
        EvaluationError: the folder cannot be written to.
    """
    tables = [_synthetic_table(costs)]
    if tokens:
        tables.append(_model_table(costs, tokens))
    tables.append(_claims_table(costs, tokens))
    content = {
        "settings": dict(settings),
        "notes": list(notes),
        "costs": [dataclasses.asdict(cost) for cost in costs],
        "tokens": list(tokens),
        "versions": versions(),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        _draw(out / "datatypes.png", costs, tokens)
        (out / "datatypes.md").write_text(_as_markdown(tables, notes))
        (out / "datatypes.json").write_text(json.dumps(content) + "\n")
    except OSError as error:
        raise EvaluationError(f"{out} cannot be written: {error.strerror or error}") from error
    return tables


def _synthetic_table(costs: Sequence[Cost]) -> Table:
    found = {(c.datatype, c.block_size, c.source): c for c in costs if c.source in SYNTHETIC}
    rows = [["data type", "block", "bits", *SYNTHETIC]]
    for datatype, block_size in dict.fromkeys(key[:2] for key in found):
        one = [found[datatype, block_size, source] for source in SYNTHETIC]
        errors = (f"{signal_to_noise(cost.error):.2f}" for cost in one)
        rows.append([datatype, str(block_size), f"{one[0].bits:.3f}", *errors])
    text = (
        "Signal to noise in decibels, more is better: 3 dB are half the squared error. Bits are "
        "those of a weight, scales included. Student t has 5 degrees of freedom; outliers are "
        "normal weights of which 0.1 % are 20 times as large."
    )
    return Table("Random weights", text, rows)


def _model_table(costs: Sequence[Cost], tokens: Sequence[int]) -> Table:
    found = [cost for cost in costs if cost.nats]
    rows = [["data type", "block", "bits", "dB", "perplexity", "nats per token more", "±"]]
    for cost in found:
        more = difference(cost.nats, found[0].nats, tokens)
        noise = signal_to_noise(cost.error)
        rows.append(
            [
                cost.datatype,
                str(cost.block_size or "–"),
                f"{cost.bits:.3f}",
                f"{noise:.2f}" if math.isfinite(noise) else "–",
                f"{_perplexity(cost, tokens):.3f}",
                f"{more.nats:+.4f}" if cost is not found[0] else "–",
                f"{more.error:.4f}" if cost is not found[0] and more.error == more.error else "–",
            ]
        )
    text = (
        f"Linear layers rounded, all but the head; {sum(tokens):,} tokens in {len(tokens):,} "
        f"windows. More than {SIXTEEN_BITS}, with the standard error over the windows."
    )
    return Table(f"{found[0].source}", text, rows)


def _claims_table(costs: Sequence[Cost], tokens: Sequence[int]) -> Table:
    sizes = {cost.block_size for cost in costs if cost.block_size}
    block_size = 64 if 64 in sizes else min(sizes)
    sources = list(dict.fromkeys(cost.source for cost in costs))
    by_name = {(c.source, c.datatype): c for c in costs if c.block_size == block_size}
    rows = [["claim", *sources]]
    for better, worse in _CLAIMS:
        cells = [_held(by_name[s, better], by_name[s, worse], tokens) for s in sources]
        rows.append([f"{better} beats {worse}", *cells])
    cells = [_free(*(by_name[s, name] for name in _FREE), tokens) for s in sources]
    rows.append(["double quantization is free", *cells])
    text = (
        f"In blocks of {block_size}; the paper says nothing of bitsandbytes' FP4 (bnb). Random "
        "weights: the squared error of the second, or with double quantization, against that of "
        "the first, or without. A model: nats per token that the second, or with double "
        "quantization, needs more ± the standard error; within two of them it is undecided."
    )
    return Table("The paper's order", text, rows)


def _held(better: Cost, worse: Cost, tokens: Sequence[int]) -> str:
    """Whether a claim that one data type is better holds, and by how much."""
    if not better.nats:
        answer = "yes" if worse.error > better.error else "no"
        return f"{answer}: {worse.error / better.error - 1:+.0%}"
    more = difference(worse.nats, better.nats, tokens)
    if not abs(more.nats) > 2 * more.error:
        return f"undecided: {_with_error(more)}"
    return f"{'yes' if more.nats > 0 else 'no'}: {_with_error(more)}"


def _free(double: Cost, single: Cost, tokens: Sequence[int]) -> str:
    if not single.nats:
        more = double.error / single.error - 1
        return f"{'yes' if more < _FREE_ERROR else 'no'}: {more:+.1%}"
    more = difference(double.nats, single.nats, tokens)
    return f"{'no' if more.nats > 2 * more.error else 'yes'}: {_with_error(more)}"


def _with_error(more: Difference) -> str:
    return f"{more.nats:+.4f} ± " + (f"{more.error:.4f}" if more.error == more.error else "?")


def _perplexity(cost: Cost, tokens: Sequence[int]) -> float:
    return math.exp(sum(cost.nats) / sum(tokens))


def _draw(path: pathlib.Path, costs: Sequence[Cost], tokens: Sequence[int]) -> None:
    sources = list(dict.fromkeys(cost.source for cost in costs))
    # A Figure of its own, not pyplot's: no window system is asked for, and nothing is kept.
    figure = Figure(figsize=(4.2 * len(sources), 4), layout="constrained")
    for axes, source in zip(np.ravel(figure.subplots(1, len(sources))), sources, strict=True):
        _draw_source(axes, source, [cost for cost in costs if cost.source == source], tokens)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.savefig(path, dpi=100)


def _draw_source(axes: Axes, source: str, costs: Sequence[Cost], tokens: Sequence[int]) -> None:
    def height(cost: Cost) -> float:
        return _perplexity(cost, tokens) if cost.nats else cost.error

    for name, datatype in DATATYPES.items():
        line = [cost for cost in costs if cost.datatype == name]
        if datatype.bits == 4:  # 8 bits would press all others into a corner
            axes.plot(
                [cost.bits for cost in line], list(map(height, line)), marker="o", label=name,
                markersize=4, linestyle="--" if datatype.double_quant else "-",
            )  # fmt: skip
    axes.set(title=source, xlabel="bits per weight of the linear layers")
    if costs[0].nats:
        axes.set(ylabel="perplexity", title=source.rsplit("/", 1)[-1])
        axes.axhline(height(costs[0]), color="black", linewidth=1)
        axes.annotate(
            SIXTEEN_BITS, (0.98, height(costs[0])), xycoords=("axes fraction", "data"),
            ha="right", va="bottom",
        )  # fmt: skip
    else:
        axes.set(ylabel="relative squared error", yscale="log")
    axes.grid(alpha=0.3, which="both")


def _as_markdown(tables: Sequence[Table], notes: Sequence[str]) -> str:
    def row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"

    parts = ["# What data types cost\n", *(f"\n{note}\n" for note in notes)]
    for table in tables:
        head, *rows = table.rows
        parts.append(f"\n## {table.title}\n\n{table.text}\n\n")
        parts.append(row(head) + row(["---"] * len(head)) + "".join(map(row, rows)))
    parts.append("\n![error or perplexity against bits](datatypes.png)\n")
    return "".join(parts)
