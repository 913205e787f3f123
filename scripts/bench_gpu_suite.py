"""The parts of the suite `gpu`, each a method: who is asked what, in which turns, for how long."""

from __future__ import annotations

import concurrent.futures
import itertools
import os
import pathlib
import sys
import time
from collections.abc import Iterable
from typing import Any

import bench_gpu_cases as cases
import bench_gpu_machine
import bench_gpu_report as report
import bench_gpu_tune
from bench_gpu_check import APIS
from bench_workers import ROOT, Worker, WorkerError
from rich.console import Console

from qlora_jax.errors import UserError

_CHECK_WORKERS = min(12, max(2, (os.cpu_count() or 2) - 2))
_BATCH = 8
_CHECK_S, _START_S, _CALL_S, _COMPILE_S, _LEAST_S = 60.0, 120.0, 60.0, 180.0, 10.0
# Of the time for whole steps; we compile, the rival does not.
_OUR_SHARE = 0.6
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
        self.failed: set[tuple[str, str]] = set()
        self.facts: dict[str, dict[str, Any]] = {}
        self.limits = bench_gpu_machine.limits("")
        self.deadline = float("inf")

    def ours(self, script: str, *, whole_device: bool = False) -> Worker:
        """A process of ours. Unless it has the device for itself, it takes memory as it needs."""
        if whole_device:
            env = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.93"}
        else:  # one of several: also on the processor
            env = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "OPENBLAS_NUM_THREADS": "2"}
        flags = []
        if self.dry_run:
            # Pallas's interpreter takes a thread of JAX's pool for each of a kernel's, which wait
            # for one another: with as few threads as a small machine has cores, for ever.
            env |= {"JAX_PLATFORMS": "cpu", "NPROC": "64"}
            flags = ["--dry-run", "--interpret"]
        return Worker([sys.executable, ROOT / "scripts" / script, *flags], env)

    def rival(self, script: str) -> Worker | None:
        """A process of the rival; None without one."""
        if self._rival_python is None:
            return None
        flags = ["--dry-run"] if self.dry_run else []
        return Worker([self._rival_python, ROOT / "scripts" / script, *flags])

    @property
    def rotate_bytes(self) -> float:
        """What inputs and results rotate through."""
        return 1e5 if self.dry_run else 2.0 * self.limits["l2_bytes"]

    def look(self) -> None:
        """Asks both sides what device they see. A rival that sees no GPU is left out.

        Raises:
            UserError: ours sees no GPU.
        """
        question, workers = {"facts": True}, {"ours": self.ours("bench_gpu_ours.py")}
        if self._rival_python is not None:
            workers["rival"] = self.rival("bench_gpu_rival.py")

        def ask(worker: Worker) -> dict[str, Any]:
            with worker:
                return _ask(worker, question, _START_S)

        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            self.facts = dict(zip(workers, pool.map(ask, workers.values()), strict=True))
        self.limits = bench_gpu_machine.limits(self.facts["ours"].get("device_kind", ""))
        if "l2_bytes" in self.facts.get("rival", {}):
            self.limits["l2_bytes"] = self.facts["rival"]["l2_bytes"]
        if self.dry_run:
            return
        if self.facts["ours"].get("platform") != "gpu":
            raise UserError(
                f"JAX sees no GPU: {self.facts['ours']}; install jax[cuda13], or try --dry-run"
            )
        if "rival" in self.facts and "name" not in self.facts["rival"]:
            self.console.print(f"the rival sees no GPU and is left out: {self.facts['rival']}")
            self._rival_python = None

    def left(self) -> float:
        """Seconds that are left to the current part."""
        return self.deadline - time.monotonic()

    def check(self) -> list[dict[str, Any]]:
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
            results = pool.map(self._check_group, groups)
            rows = list(itertools.chain.from_iterable(results))
        self.failed = {
            (row["operation"], row["implementation"])
            for row in rows
            if row["verdict"] in ("wrong", "error", "crashed")
        }
        report.print_checks(rows, self.console)
        return rows

    def _check_group(self, group: list[Any]) -> list[dict[str, Any]]:
        rows, crashes = [], 0
        with self.ours("bench_gpu_check.py") as worker:
            for case, name in group:
                asked = case | {"implementation": None if name == cases.DEFAULT else name}
                if self.left() < 1:
                    answer = {"verdict": "left out", "detail": _SHORT_OF_TIME}
                elif crashes >= 3:
                    answer = {"verdict": "left out", "detail": "crashed three times before"}
                else:
                    try:
                        answer = worker.ask(asked, timeout_s=min(self.left(), _CHECK_S))
                    except WorkerError as error:
                        crashes += 1
                        answer = {"verdict": "crashed", "detail": str(error)}
                    if answer["verdict"] == "error":  # the device's state may be lost with it
                        worker.stop()
                rows.append(case | {"implementation": name} | answer)
        return rows

    def kernels(self) -> dict[str, Any]:
        """Samples of every case by every implementation, ours and theirs in turns."""
        rival = self.rival("bench_gpu_rival.py")
        wanted = [(case, self._names(case)) for case in cases.timing_cases(self.sizes)]
        result: dict[str, Any] = {"rows": [], "left_out": [], "clocks": [], "limits": self.limits}
        with self.ours("bench_gpu_ours.py") as ours:
            sides = {"ours": ours} | ({} if rival is None else {"rival": rival})
            try:
                if rival is not None:
                    question = {"ceilings": True, "calls": 20}
                    result["ceilings"] = _ask(rival, question, _START_S)
                for first in range(0, len(wanted), _BATCH):
                    self._time_batch(wanted[first : first + _BATCH], sides, result)
                    result["clocks"].append(bench_gpu_machine.read_gpu())
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

    def _time_batch(self, batch: list[Any], sides: Any, result: Any) -> None:
        if self.left() > 0:
            pairs = [(case, name) for case, names in batch for name in names]
            self.compile(sides["ours"], pairs)
        for case, names in batch:
            if self.left() < 0:
                result["left_out"].append(cases.case_name(case))
                continue
            theirs = [cases.RIVAL] + ([cases.TORCH_DENSE] if case["rows"] else [])
            asked = [("ours", name) for name in names]
            asked += [("rival", name) for name in theirs if "rival" in sides]
            result["rows"].append(self.time_case(case, asked, sides))

    def compile(self, worker: Worker, pairs: list[tuple[cases.Case, str]]) -> None:
        """Compiles pairs of a case and an implementation at once; a mistake shows when timed."""
        _ask(worker, {"compile": pairs}, min(_COMPILE_S, max(self.left(), _LEAST_S)))

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
                answer = _ask(sides[side], question, min(_CALL_S, max(self.left(), _LEAST_S)))
                if "seconds" not in answer:
                    row["not"][name] = answer.get("unsupported") or answer["error"]
                    continue
                row["seconds"].setdefault(name, []).extend(answer["seconds"])
                row["clock"][name], row["kernels"][name] = answer["clock"], answer["kernels"]
        return row

    def steps(self) -> dict[str, Any]:
        """Answers of whole steps by side and question, ours in the order of memory."""
        ours = self.ours("bench_gpu_steps.py", whole_device=True)
        answers = self._ask_steps(
            "ours",
            ours,
            [
                "decode",
                *("paged 100", "paged 50"),
                *("train full", "train projections", "train none"),
                *("short 100", "short 0"),
                "decode large",
            ],
            self.left() * (_OUR_SHARE if self._rival_python else 1.0),
        )
        # The device has room for one of the two: ours is gone before the rival starts.
        if rival := self.rival("bench_gpu_rival_steps.py"):
            questions = ["decode", "train checkpointing", "train no checkpointing", "decode static"]
            answers |= self._ask_steps("rival", rival, questions, self.left())
        report.print_steps(answers, self.sizes, self.console)
        return answers

    def _ask_steps(
        self, who: str, worker: Worker, questions: list[str], seconds: float
    ) -> dict[str, Any]:
        end, answers = time.monotonic() + seconds, {}
        with worker:
            for question in questions:
                left = end - time.monotonic()
                if left < 5:
                    answers[f"{who} {question}"] = {"error": _SHORT_OF_TIME}
                    continue
                # After training adapters are on the model; and the large one needs the memory.
                if question in ("decode static", "decode large"):
                    worker.stop()
                run, _, setting = question.partition(" ")
                answer = _ask(worker, {"run": run, "setting": setting}, left)
                answers[f"{who} {question}"] = answer
        return answers

    def tune(self) -> dict[str, Any]:
        """The best tiles of each kernel, and the crossovers; see bench_gpu_tune."""
        with self.ours("bench_gpu_ours.py") as worker:
            return bench_gpu_tune.tune(self, worker)


def _ask(worker: Worker, question: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    """The answer, or {"error": …}; a worker that failed is started anew by the next question."""
    try:
        answer = worker.ask(question, timeout_s=timeout_s)
    except WorkerError as error:
        return {"error": str(error)}
    if "error" in answer:
        worker.stop()
    return answer
