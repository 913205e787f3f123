"""What is made of the suite `gpu`'s samples: tables, and the goals beside what was measured."""

from __future__ import annotations

import collections
import statistics
from collections.abc import Callable, Iterable
from typing import Any

import bench_gpu_cases as cases
from rich.console import Console
from rich.table import Table

Row = dict[str, Any]
_LARGE = 8192 * 8192
_DENSE = (cases.JAX_DENSE, cases.TORCH_DENSE)
_GIB = 1 << 30


def median(row: Row, *names: str) -> float | None:
    """Seconds of the fastest of these implementations (the median of its calls), or None."""
    found = [statistics.median(row["seconds"][name]) for name in names if name in row["seconds"]]
    return min(found, default=None)


def ratio(row: Row, *others: str) -> float | None:
    """The time of the fastest of the others over that of our default: above 1, ours is faster.

    None where one of the two was not timed, or by another clock: launches cost more than a small
    kernel does, and only some clocks count them.
    """
    clock = row["clock"].get(cases.DEFAULT)
    ours = median(row, cases.DEFAULT)
    other = median(row, *(name for name in others if row["clock"].get(name) == clock))
    return None if ours is None or other is None else other / ours


def moved_bytes(case: cases.Case) -> float:
    """The fewest bytes a call reads and writes: packed weight and scales, rows, result.

    >>> moved_bytes({"operation": "dequantize", "shape": [64, 64], "rows": 0})
    10308.0
    """
    n, k = case["shape"]
    blocks = n * k / 64
    if case["operation"] == "quantize":
        return 2.5 * n * k + 4 * blocks
    packed = n * k / 2 + blocks + 4 * max(1.0, blocks / 256)
    if case["operation"] == "dequantize":
        return packed + 2 * n * k
    return packed + 2 * case["rows"] * (n + k)


def bandwidth(result: dict[str, Any]) -> float | None:
    """Bytes a second of the device: of its data sheet, else of a measured copy."""
    return result["limits"]["bytes_per_s"] or result.get("ceilings", {}).get("bytes_per_s")


def share_of_peak(row: Row, result: dict[str, Any]) -> str:
    """How much of the device's limit the default implementation reaches; which limit, by rows.

    Up to 64 rows a product is limited by memory, from there on by the matrix units, whose limit is
    a measured bfloat16 product.
    """
    case, seconds = row["case"], median(row, cases.DEFAULT)
    if seconds is None:
        return "-"
    if case["rows"] <= 64:
        limit = bandwidth(result)
        return f"{moved_bytes(case) / seconds / limit:.0%} memory" if limit else "-"
    limit = result.get("ceilings", {}).get("flops_per_s")
    done = 2 * case["rows"] * case["shape"][0] * case["shape"][1]
    return f"{done / seconds / limit:.0%} product" if limit else "-"


def print_checks(rows: list[Row], console: Console) -> None:
    """How many checks of each implementation were right, and all that were not."""
    counts: dict[tuple[str, str], collections.Counter] = collections.defaultdict(
        collections.Counter
    )
    for row in rows:
        counts[row["operation"], row["implementation"]][row["verdict"]] += 1
    table = Table(title="checks against NumPy")
    for column in ("operation", "implementation", "verdicts"):
        table.add_column(column)
    for (operation, name), found in counts.items():
        verdicts = ", ".join(f"{count} {verdict}" for verdict, count in found.most_common())
        table.add_row(operation, name, verdicts)
    console.print(table)
    for row in rows:
        if row["verdict"] not in ("ok", "left out"):
            format_ = f"{row['quant_type']}, {row['dtype']}, block {row['block_size']}"
            double = "double quantization" if row["double_quant"] else "float32 scales"
            console.print(
                f"{row['verdict']}: {cases.case_name(row)} by {row['implementation']} ({format_}, "
                f"{double}): {row['detail']}",
                highlight=False,
            )


def print_kernels(result: dict[str, Any], console: Console) -> None:
    """Microseconds of every case, and ratios of the default implementation."""
    names = _ordered(name for row in result["rows"] for name in row["seconds"])
    clocks = sorted({clock for row in result["rows"] for clock in row["clock"].values()})
    table = Table(title=f"microseconds a call, medians (clock: {', '.join(clocks) or 'none'})")
    table.add_column("case")
    for column in (*names, "launches, rival's", "of the limit", "vs bitsandbytes", "vs bf16"):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        times = [_format(median(row, name), 1e6, "{:.1f}") for name in names]
        ratios = [_times(ratio(row, cases.RIVAL)), _times(ratio(row, *_DENSE))]
        share = share_of_peak(row, result)
        launches = [len(row["kernels"].get(name, ())) for name in (cases.DEFAULT, cases.RIVAL)]
        counts = ", ".join(str(count or "-") for count in launches)
        table.add_row(cases.case_name(row["case"]), *times, counts, share, *ratios)
    console.print(table)
    refusals = {
        f"{row['case']['operation']} by {name}: {why}"
        for row in result["rows"]
        for name, why in row["not"].items()
    }
    for line in sorted(refusals):
        console.print(f"not timed: {line}", highlight=False)
    if result["left_out"]:
        console.print(f"no time left for {len(result['left_out'])} cases:", result["left_out"])


def _ordered(names: Iterable[str]) -> list[str]:
    order = (cases.DEFAULT, *cases.IMPLEMENTATIONS, cases.RIVAL, cases.JAX_DENSE, cases.TORCH_DENSE)
    return sorted(set(names), key=lambda name: (order.index(name) if name in order else 99, name))


def tokens_per_second(answer: dict[str, Any]) -> float | None:
    """Of decoding: the tokens between two counts over the time between them."""
    if "seconds" not in answer:
        return None
    (few, short), (many, long) = sorted(
        (int(count), statistics.median(seconds)) for count, seconds in answer["seconds"].items()
    )
    return (many - few) / (long - short) if long > short else None


def print_steps(answers: dict[str, Any], sizes: cases.Sizes, console: Console) -> None:
    """Speed and memory of every run of whole steps."""
    table = Table(
        title=f"training {sizes.batch} x {sizes.length} tokens, rank {sizes.rank}; decoding 1 row"
    )
    for column in ("run", "tokens/s", "peak GiB", "predicted GiB", "not run because"):
        table.add_column(column, justify="left" if column.startswith(("run", "not")) else "right")
    for name, answer in answers.items():
        speed = answer.get("tokens_per_second") or tokens_per_second(
            answer if " decode" in name else {}
        )
        table.add_row(
            name,
            _format(speed, 1, "{:.1f}"),
            _format(answer.get("peak_bytes"), 1 / _GIB, "{:.2f}"),
            _format(answer.get("predicted_bytes"), 1 / _GIB, "{:.2f}"),
            answer.get("error") or answer.get("skipped") or "",
        )
    console.print(table)


def goals(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Every goal with what was measured: of several shapes, the worst.

    Returns:
        Dicts of `goal`, `target` (at least; for one, at most), `measured` (None: not), `where` and
        `met` (None: not measured, or in a dry run, whose figures mean nothing).
    """
    kernels = result.get("kernels", {"rows": []})
    rows, steps = kernels["rows"], result.get("steps", {})

    def worst(operation: str, count: int, value: Callable[[Row], Any], least: int = 0, pick=min):
        found = [
            (figure, cases.case_name(row["case"]))
            for row in rows
            if (row["case"]["operation"], row["case"]["rows"]) == (operation, count)
            and row["case"]["shape"][0] * row["case"]["shape"][1] >= least
            and (figure := value(row)) is not None
        ]
        return pick(found, default=(None, ""))

    def vs_rival(row: Row) -> float | None:
        return ratio(row, cases.RIVAL)

    def vs_dense(row: Row) -> float | None:
        return ratio(row, *_DENSE)

    def share(row: Row) -> float | None:
        seconds, limit = median(row, cases.DEFAULT), bandwidth(kernels)
        return moved_bytes(row["case"]) / seconds / limit if seconds and limit else None

    def slower(row: Row) -> float | None:
        inverse = vs_dense(row)
        return 1 / inverse if inverse else None

    def sixteen(row: Row) -> float | None:
        return vs_rival(row) if row["case"]["shape"] == [4096, 4096] else None

    rows_of_goals = [
        _goal("dequantize: memory bandwidth", 0.75, worst("dequantize", 0, share)),
        _goal("dequantize vs bitsandbytes", 1.3, worst("dequantize", 0, vs_rival)),
        _goal("1 row vs bitsandbytes", 1.2, worst("matmul", 1, vs_rival)),
        _goal("1 row vs bf16, from 8192x8192", 2.2, worst("matmul", 1, vs_dense, _LARGE)),
        _goal("16 rows at 4096x4096 vs bitsandbytes", 2.0, worst("matmul", 16, sixteen)),
        _goal(
            "4096 rows: time over bf16", 1.12, worst("matmul", 4096, slower, pick=max), least=False
        ),
        _goal("training step vs the rival's fastest", 1.8, _fastest(steps, "train")),
        _goal("decoding vs the rival's", 5.0, _fastest(steps, "decode")),
        _goal("decoding 7B, tokens/s", 350, _decoding(steps, "ours decode")),
        _goal("decoding 65B, tokens/s", 40, _decoding(steps, "ours decode large")),
        _goal("all moments paged: time over none", 1.03, _paging_cost(steps), least=False),
        _goal("paged adapters equal to the bit", 1, _paging_equal(steps)),
        _goal("paged where unpaged runs out of memory", 1, _trains_in_little(steps)),
    ]
    if result["dry_run"]:
        return [row | {"met": None} for row in rows_of_goals]
    return rows_of_goals


def _decoding(steps: dict[str, Any], name: str) -> tuple[float | None, str]:
    """Tokens a second of one decoding run."""
    return tokens_per_second(steps.get(name, {})), name


def _fastest(steps: dict[str, Any], run: str) -> tuple[float | None, str]:
    """Our fastest setting over the rival's fastest, and which they are."""
    best: dict[str, tuple[float, str]] = {}
    for name, answer in steps.items():
        who, _, question = name.partition(" ")
        if not question.startswith(run) or question.endswith(" large"):  # the rival has none
            continue
        speed = answer.get("tokens_per_second") if run == "train" else tokens_per_second(answer)
        if speed is not None:
            best[who] = max(best.get(who, (0.0, "")), (speed, question))
    if len(best) < 2:
        return None, ""
    return best["ours"][0] / best["rival"][0], f"{best['ours'][1]} / {best['rival'][1]}"


def _paging_cost(steps: dict[str, Any]) -> tuple[float | None, str]:
    """The step with all moments in the host's memory over the same step with none there."""
    speeds = [
        steps.get(f"ours {name}", {}).get("tokens_per_second")
        for name in ("train full", "paged 100")
    ]
    return (speeds[0] / speeds[1] if all(speeds) else None), "train full / paged 100"


def _paging_equal(steps: dict[str, Any]) -> tuple[float | None, str]:
    """1 where paged runs end with the bits of the unpaged one, else 0."""
    digests = {
        name: answer["digest"]
        for name in ("train full", "paged 50", "paged 100", "short 100")
        if "digest" in (answer := steps.get(f"ours {name}", {}))
    }
    if len(digests) < 2:
        return None, ""
    return float(len(set(digests.values())) == 1), ", ".join(digests)


def _trains_in_little(steps: dict[str, Any]) -> tuple[float | None, str]:
    """1 where the paged step trains in memory in which the unpaged one does not, else 0."""
    paged, unpaged = (steps.get(f"ours short {share}", {}) for share in (100, 0))
    if not all("room_bytes" in answer for answer in (paged, unpaged)):
        return None, ""
    room = f"{paged['room_bytes'] / 2**30:.2f} GiB"
    return float("digest" in paged and "ran_out" in unpaged), room


def _goal(name: str, target: float, found: tuple[Any, str], *, least: bool = True) -> Row:
    measured, where = found
    met = None if measured is None else (measured >= target if least else measured <= target)
    return {
        "goal": name,
        "target": f"{'≥' if least else '≤'} {target}",
        "measured": measured,
        "where": where,
        "met": met,
    }


def print_goals(rows: list[Row], console: Console, *, dry_run: bool) -> None:
    """The goals, met or not."""
    table = Table(title="goals" + (" (dry run: these figures mean nothing)" if dry_run else ""))
    for column in ("goal", "target", "measured", "worst at", "met"):
        table.add_column(column)
    for row in rows:
        unknown = "dry run" if dry_run else "not measured"
        met = {True: "yes", False: "NO", None: unknown}[row["met"]]
        measured = _format(row["measured"], 1, "{:.2f}")
        table.add_row(row["goal"], row["target"], measured, row["where"], met)
    console.print(table)


def _format(value: float | None, scale: float, pattern: str) -> str:
    return "-" if value is None else pattern.format(value * scale)


def _times(value: float | None) -> str:
    return _format(value, 1, "{:.2f}x")
