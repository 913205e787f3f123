"""Verdicts of the game: appended to a file that the evaluation reads, and added up.

A line is a record of `qlora_jax.evaluation.ratings`, with what was judged beside it:

    {"model_a": "base", "model_b": "mine", "winner": "model_b", "judge": "human",
     "question_id": "…", "question": "…", "answer_a": "…", "answer_b": "…", …}

`model_a` was shown first (or left); which of the two that is, was drawn. So the position of the
answers is recorded, and its influence can be measured.
"""

import json
import os
import pathlib
import threading
from collections import Counter
from typing import Any

from qlora_jax.errors import ConfigError, DataError
from qlora_jax.evaluation import read_ratings


class Votes:
    """A file of verdicts.

    Attributes:
        path: of the file, which need not exist.
        count: how many verdicts it holds.
    """

    def __init__(self, path: str | pathlib.Path):
        """Adds up what the file holds already.

        Args:
            path: of the file.

        Raises:
            DataError: the file holds something else.
            ConfigError: it cannot be written.
        """
        self.path = pathlib.Path(path).expanduser()
        self._lock = threading.Lock()
        self._results: dict[str, Counter[str]] = {}
        self.count = 0
        if not self.path.parent.is_dir() or self.path.is_dir():
            raise ConfigError(f"--votes={path}: not a file in a folder that exists")
        if self.path.exists() and self.path.stat().st_size:
            if not self.path.read_bytes().endswith(b"\n"):
                raise DataError(f"{self.path}: its last line has no end; complete or remove it")
            ratings = read_ratings(self.path)
            for a, b, score in zip(ratings.first, ratings.second, ratings.score, strict=True):
                self._count(ratings.systems[a], ratings.systems[b], float(score))

    def append(self, record: dict[str, Any]) -> None:
        """Writes one verdict, to the disk, and counts it.

        Args:
            record: with model_a, model_b and winner.

        Raises:
            OSError: it cannot be written.
        """
        line = json.dumps(record, ensure_ascii=False) + "\n"
        with self._lock:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            score = {"model_a": 1.0, "model_b": 0.0}.get(record["winner"], 0.5)
            self._count(record["model_a"], record["model_b"], score)

    def _count(self, a: str, b: str, score: float) -> None:
        self.count += 1
        for name, own in ((a, score), (b, 1 - score)):
            result = {1.0: "wins", 0.5: "ties", 0.0: "losses"}[own]
            self._results.setdefault(name, Counter())[result] += 1

    def score(self) -> list[dict[str, Any]]:
        """Wins, ties and losses of each system, the most successful first."""
        with self._lock:
            rows = [
                {"model": name, **{key: results[key] for key in ("wins", "ties", "losses")}}
                for name, results in self._results.items()
            ]
        return sorted(rows, key=lambda row: (row["losses"] - row["wins"], row["model"]))
