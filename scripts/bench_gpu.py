"""The suite `gpu` of scripts/bench.py: is every kernel right, how fast is it, and whole steps.

`check`: each operation by each implementation against NumPy, in processes of their own, so that a
kernel that crashes or hangs costs one row. `kernels`: device time of each operation against
bitsandbytes and dense bfloat16 products, in turns. `steps`: LLaMA-7B, a QLoRA training step of
4 x 2048 tokens and decoding, against transformers + peft + bitsandbytes. `tune` (only when asked
for): see scripts/bench_gpu_tune.py.

All fits into `--budget_s` seconds: each part gets its share of what is left, and what it did not
come to is named. With `--dry-run` the same code runs on the CPU with tiny shapes, Pallas's and
Triton's kernels in their interpreters; its times mean nothing.
"""

from __future__ import annotations

import concurrent.futures
import importlib.util
import itertools
import pathlib
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import bench_gpu_cases as cases
import bench_gpu_machine
import bench_gpu_report as report
import bench_gpu_tune
from bench_gpu_check import APIS
from bench_workers import ROOT, Worker, WorkerError, find_python
from rich.console import Console

from qlora_jax.training.card import versions

DEFAULT_PARTS = ("check", "kernels", "steps")
PARTS = (*DEFAULT_PARTS, "tune")
BUDGET_S, DRY_RUN_S = 460.0, 170.0
# How a run's time is divided among its parts.
_WEIGHTS = {"check": 2.0, "kernels": 4.0, "steps": 4.0, "tune": 6.0}
_CHECK_WORKERS = 6
_BATCH = 8
_CHECK_S, _START_S, _CALL_S, _COMPILE_S = 60.0, 120.0, 60.0, 180.0
_SHORT_OF_TIME = "left out: no time left"


class Suite:
    """One run of the suite."""

    def __init__(
        self,
        *,
        dry_run: bool,
        rival_python: pathlib.Path | None,
        console: Console,
        sizes: cases.Sizes | None = None,
    ):
        """Starts nothing.

        Args:
            dry_run: on the CPU.
            rival_python: a Python with torch and bitsandbytes, or None.
            console: for progress and tables.
            sizes: all sizes; by default those of `bench_gpu_cases`.
        """
        self.dry_run, self.console = dry_run, console
        self.sizes = sizes or (cases.DRY_RUN if dry_run else cases.FULL)
        self._rival_python = rival_python
        self.rotate_bytes = 1e5 if dry_run else 2.0 * bench_gpu_machine.limits("")["l2_bytes"]
        self.failed: set[tuple[str, str]] = set()

    def ours(self, script: str, *, whole_device: bool = False) -> Worker:
        """A process of ours. Unless it has the device for itself, it takes memory as it needs."""
        env = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.93"} if whole_device else {}
        if not whole_device:
            env["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        flags = []
        if self.dry_run:
            env["JAX_PLATFORMS"] = "cpu"
            flags = ["--dry-run", "--interpret"]
        return Worker([sys.executable, ROOT / "scripts" / script, *flags], env)

    def rival(self, script: str) -> Worker | None:
        """A process of the rival; None without one."""
        if self._rival_python is None:
            return None
        flags = ["--dry-run"] if self.dry_run else []
        return Worker([self._rival_python, ROOT / "scripts" / script, *flags])

    def check(self, deadline: float) -> list[dict[str, Any]]:
        """A row for every check; `failed` remembers the implementations that are not right."""
        groups = []
        for operation in cases.OPERATIONS:
            names = [*APIS[operation].IMPLEMENTATIONS, cases.DEFAULT]
            wanted = cases.check_cases(self.sizes, operation)
            groups += [[(case, name) for case in wanted] for name in names]
        if self.dry_run:  # a process each would start longer than it checks
            turns = itertools.zip_longest(*groups)
            groups = [[pair for pair in itertools.chain.from_iterable(turns) if pair]]
        with concurrent.futures.ThreadPoolExecutor(_CHECK_WORKERS) as pool:
            results = pool.map(lambda group: self._check_group(group, deadline), groups)
            rows = list(itertools.chain.from_iterable(results))
        self.failed = {
            (row["operation"], row["implementation"])
            for row in rows
            if row["verdict"] in ("wrong", "error", "crashed")
        }
        report.print_checks(rows, self.console)
        return rows

    def _check_group(self, group: list[Any], deadline: float) -> list[dict[str, Any]]:
        rows, crashes = [], 0
        with self.ours("bench_gpu_check.py") as worker:
            for case, name in group:
                left = deadline - time.monotonic()
                asked = case | {"implementation": None if name == cases.DEFAULT else name}
                if left < 1:
                    answer = {"verdict": "left out", "detail": _SHORT_OF_TIME}
                elif crashes >= 3:
                    answer = {"verdict": "left out", "detail": "crashed three times before"}
                else:
                    try:
                        answer = worker.ask(asked, timeout_s=min(left, _CHECK_S))
                    except WorkerError as error:
                        crashes += 1
                        answer = {"verdict": "crashed", "detail": str(error)}
                    if answer["verdict"] == "error":  # the device's state may be lost with it
                        worker.stop()
                rows.append(case | {"implementation": name} | answer)
        return rows

    def kernels(self, deadline: float) -> dict[str, Any]:
        """Samples of every case by every implementation, ours and theirs in turns."""
        rival = self.rival("bench_gpu_rival.py")
        wanted = [(case, self._names(case)) for case in cases.timing_cases(self.sizes)]
        result: dict[str, Any] = {"rows": [], "left_out": []}
        with self.ours("bench_gpu_ours.py") as ours:
            sides = {"ours": ours} | ({} if rival is None else {"rival": rival})
            try:
                result["facts"] = {
                    who: _ask(worker, {"facts": True}, _START_S) for who, worker in sides.items()
                }
                if rival is not None:
                    question = {"ceilings": True, "calls": 20}
                    result["ceilings"] = _ask(rival, question, _START_S)
                kind = result["facts"]["ours"].get("device_kind", "")
                result["limits"] = bench_gpu_machine.limits(kind)
                if not self.dry_run:
                    self.rotate_bytes = 2.0 * result["limits"]["l2_bytes"]
                for first in range(0, len(wanted), _BATCH):
                    self._time_batch(wanted[first : first + _BATCH], sides, deadline, result)
            finally:
                if rival is not None:
                    rival.stop()
        report.print_kernels(result, self.console)
        return result

    def _names(self, case: cases.Case) -> list[str]:
        """Which of ours to time: not what is wrong, nor what a case is not made for."""
        operation, rows = case["operation"], case["rows"]
        names = [cases.DEFAULT]
        for name in APIS[operation].IMPLEMENTATIONS:
            fits = rows <= 64 and not (name == "xla" and rows > 1)
            if fits and (operation, name) not in self.failed:
                names.append(name)
        return names + ([cases.JAX_DENSE] if rows else [])

    def _time_batch(self, batch: list[Any], sides: Any, deadline: float, result: Any) -> None:
        if time.monotonic() > deadline:
            result["left_out"] += [cases.case_name(case) for case, _ in batch]
            return
        pairs = [[case, name] for case, names in batch for name in names]
        _ask(sides["ours"], {"compile": pairs}, _COMPILE_S)
        for case, names in batch:
            if time.monotonic() > deadline:
                result["left_out"].append(cases.case_name(case))
                continue
            theirs = [cases.RIVAL] + ([cases.TORCH_DENSE] if case["rows"] else [])
            asked = [("ours", name) for name in names]
            asked += [("rival", name) for name in theirs if "rival" in sides]
            result["rows"].append(self.time_case(case, asked, sides))

    def time_case(self, case: cases.Case, asked: Iterable[Any], sides: Any) -> dict[str, Any]:
        """Samples of one case, all in turns.

        Args:
            case: see `bench_gpu_cases`.
            asked: pairs of a side and an implementation's name.
            sides: the workers by side.
        """
        row: dict[str, Any] = {"case": case, "seconds": {}, "clock": {}, "kernels": {}, "not": {}}
        for _ in range(self.sizes.turns):
            for side, name in asked:
                if name in row["not"]:
                    continue
                question = {
                    "case": case,
                    "implementation": name,
                    "calls": self.sizes.calls,
                    "warm_up": self.sizes.warm_up,
                    "rotate_bytes": self.rotate_bytes,
                }
                answer = _ask(sides[side], question, _CALL_S)
                if "seconds" not in answer:
                    row["not"][name] = answer.get("unsupported") or answer["error"]
                    continue
                row["seconds"].setdefault(name, []).extend(answer["seconds"])
                row["clock"][name], row["kernels"][name] = answer["clock"], answer["kernels"]
        return row

    def steps(self, deadline: float) -> dict[str, Any]:
        """Answers of whole steps by side and question."""
        plans = {
            "ours": (
                self.ours("bench_gpu_steps.py", whole_device=True),
                ["decode", "train full", "train none", "train projections"],
            ),
            "rival": (
                self.rival("bench_gpu_rival_steps.py"),
                ["decode", "train checkpointing", "train no checkpointing"],
            ),
        }
        answers: dict[str, Any] = {}
        for place, (who, (worker, questions)) in enumerate(plans.items()):
            if worker is None:
                continue
            # The device has room for one of the two: the other is gone before.
            half = time.monotonic() + (deadline - time.monotonic()) / (len(plans) - place)
            with worker:
                for question in questions:
                    left = half - time.monotonic()
                    if left < 5:
                        answers[f"{who} {question}"] = {"error": _SHORT_OF_TIME}
                        continue
                    if question == "train projections":
                        # Needs less than the run before, and JAX never lowers its peak.
                        worker.stop()
                    run, _, setting = question.partition(" ")
                    answer = _ask(worker, {"run": run, "setting": setting}, left)
                    answers[f"{who} {question}"] = answer
        report.print_steps(answers, self.sizes, self.console)
        return answers

    def tune(self, deadline: float) -> dict[str, Any]:
        """The best tiles of each kernel, and the crossovers; see bench_gpu_tune."""
        with self.ours("bench_gpu_ours.py") as worker:
            facts = _ask(worker, {"facts": True}, _START_S)
            if not self.dry_run:
                limits = bench_gpu_machine.limits(facts.get("device_kind", ""))
                self.rotate_bytes = 2.0 * limits["l2_bytes"]
            return bench_gpu_tune.tune(self, worker, facts, deadline)


def _ask(worker: Worker, question: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    """The answer, or {"error": …}; a worker that failed is started anew by the next question."""
    try:
        answer = worker.ask(question, timeout_s=timeout_s)
    except WorkerError as error:
        return {"error": str(error)}
    if "error" in answer:
        worker.stop()
    return answer


def default_rival(python: str | None) -> pathlib.Path | None:
    """The rival's Python: as given, else this one if torch and bitsandbytes are in it.

    Raises:
        UserError: the given one cannot import the rival's packages.
    """
    if python is not None:
        return find_python(python, "torch, transformers, peft, bitsandbytes")
    here = all(importlib.util.find_spec(name) for name in ("torch", "bitsandbytes"))
    return pathlib.Path(sys.executable) if here else None


def run(
    *,
    parts: list[str],
    dry_run: bool,
    rival_python: str | None,
    budget_s: float | None,
    console: Console,
    save: Callable[[dict[str, Any]], None],
    sizes: cases.Sizes | None = None,
) -> dict[str, Any]:
    """Runs the parts one after the other, and prints the goals beside what was measured.

    Args:
        parts: of `PARTS`.
        dry_run: on the CPU, with tiny shapes.
        rival_python: see `default_rival`.
        budget_s: seconds for everything; None for `BUDGET_S` or `DRY_RUN_S`.
        console: for progress and tables.
        save: called after each part with what there is so far.
        sizes: see `Suite`.

    Raises:
        UserError: there is no GPU, or `rival_python` is none.
    """
    gpu = None if dry_run else bench_gpu_machine.require_gpu()
    rival = default_rival(rival_python)
    if rival is None:
        console.print("no torch and bitsandbytes in this Python, and no --rival_python: ours alone")
    suite = Suite(dry_run=dry_run, rival_python=rival, console=console, sizes=sizes)
    result: dict[str, Any] = {"dry_run": dry_run, "gpu": gpu, "versions": versions(), "clocks": []}
    end = time.monotonic() + (budget_s or (DRY_RUN_S if dry_run else BUDGET_S))
    for index, part in enumerate(parts):
        now = time.monotonic()
        share = _WEIGHTS[part] / sum(_WEIGHTS[other] for other in parts[index:])
        console.print(f"[bold]{part}[/] (at most {(end - now) * share:.0f} s)")
        result[part] = getattr(suite, part)(now + (end - now) * share)
        result["clocks"].append({"after": part, "gpu": bench_gpu_machine.read_gpu()})
        save(result)
    result["goals"] = report.goals(result)
    report.print_goals(result["goals"], console, dry_run=dry_run)
    save(result)
    return result
