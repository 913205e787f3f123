"""The part `mmlu` of scripts/bench.py: how near scoring MMLU is to the bare forward pass.

SmolLM2-135M in NF4 is asked the questions that the package lm-eval carries, in three ways: without
solved questions, behind five that are read anew for every question (of twelve subjects, as while a
model is trained), and behind five that are read once (of one subject).

The ceiling is the forward pass of the same batches by itself: a jitted `hidden_states` of rows of
the same shapes, each row one text without padding, and `head` for as many positions. Both run in
turns, in one process, compiled before. The share of the ceiling is given in seconds and in CPU
seconds, which tell a slow program from a busy machine.

    through the model   tokens of prompts that were computed a second; one that is read once counts
                        once, and padding does not count. This is what the ceiling compares with
    in effect           tokens of all prompts a second, as if nothing were shared
"""

from __future__ import annotations

import dataclasses
import functools
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import bench_ours
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

from qlora_jax.data.records import load_records
from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.evaluation import mmlu
from qlora_jax.evaluation.mmlu import Question
from qlora_jax.evaluation.packed_prompts import pack, places_of
from qlora_jax.evaluation.scoring import Scorer, prefix_length, shared_beginning
from qlora_jax.files import resolve_path
from qlora_jax.loading import load_model
from qlora_jax.training.building import choose_compute_dtype

# Turns of scoring and forward pass.
ROUNDS = 3
_SHOTS = 5
_SUBJECT = "anatomy"  # the one whose solved questions are shown
_OPTIONS = re.compile(r"(?s).*?\n\n(.*)\n\(A\) (.*?)\n\(B\) (.*?)\n\(C\) (.*?)\n\(D\) (.*)")

Samples = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Task:
    """Prompts that are scored together.

    Attributes:
        name: of the way.
        groups: token ids of the prompts of each subject.
        shared: whether a common beginning is read once.
    """

    name: str
    groups: list[list[list[int]]]
    shared: bool

    def shapes(self, scorer: Scorer) -> Iterator[tuple[int, int]]:
        """Rows and width of every batch."""
        for group in self.groups:
            shared = self.beginning(group)
            if shared:
                yield 1, prefix_length(shared)
            lengths = [len(ids) - shared for ids in group]
            for batch in pack(lengths, scorer.batch_tokens, scorer.max_len):
                yield batch.size, batch.width

    def beginning(self, group: Sequence[Sequence[int]]) -> int:
        """Tokens of a group that are read once."""
        return shared_beginning(group) if self.shared else 0

    def tokens(self, *, in_effect: bool) -> int:
        """Tokens of all prompts, or of them those that go through the model."""
        whole = sum(len(ids) for group in self.groups for ids in group)
        twice = sum((len(group) - 1) * self.beginning(group) for group in self.groups)
        return whole if in_effect else whole - twice


def questions() -> dict[str, list[Question]]:
    """The four-choice questions of the package lm-eval, by subject."""
    found: dict[str, list[Question]] = {}
    for record in load_records(bench_ours.DATA, "mmlu_cot"):
        subject = record.record_id.split(":")[-2]
        match = _OPTIONS.fullmatch(record.messages[0]["content"])
        if match and "\n(E) " not in match[5]:
            text, *choices = match.groups()
            letter = re.search(r"\(([A-D])\)\.\s*\Z", record.messages[-1]["content"])[1]
            answer = mmlu.LETTERS.index(letter)
            found.setdefault(subject, []).append(Question(subject, text, tuple(choices), answer))
    return found


def tasks(tokenizer: Tokenizer, max_len: int) -> list[Task]:
    """What is scored; behind solved questions of a subject those of all others are asked."""
    by_subject = questions()
    everything = [question for group in by_subject.values() for question in group]

    def prompts(asked: Sequence[Question], solved: Sequence[Question] = ()) -> list[list[int]]:
        groups = mmlu.write_prompts(tokenizer, asked, solved, shots=len(solved), max_len=max_len)
        return [prompt.ids for group in groups for prompt in group]

    def behind(subject: str, count: int) -> list[list[int]]:
        solved = by_subject[subject][:_SHOTS]
        others = [q for q in everything if q.subject != subject][:: len(everything) // count]
        return prompts([dataclasses.replace(q, subject=subject) for q in others], solved)

    whole = [ids for subject in list(by_subject)[::5] for ids in behind(subject, 1)[:1]]
    return [
        Task("none", [prompts(everything[::2])], shared=False),
        Task("five, read every time", [whole], shared=False),
        Task("five, read once", [behind(_SUBJECT, 48)], shared=True),
    ]


def forward_pass(model: nnx.Module) -> Callable[[tuple[int, int]], None]:
    """A call that computes rows of a shape, and what comes next at as many places as they have."""
    model.eval()
    graphdef, state = nnx.split(model)

    @functools.partial(jax.jit, static_argnames="places")
    def forward(state: nnx.State, tokens: jax.Array, places: int) -> jax.Array:
        model = nnx.merge(graphdef, state)
        hidden = model.hidden_states(tokens)
        last = hidden.reshape(-1, hidden.shape[-1])[-places:]
        return jax.nn.log_softmax(model.head(last).astype(jnp.float32))[:, :4]

    def call(shape: tuple[int, int]) -> None:
        tokens = np.arange(shape[0] * shape[1], dtype=np.int32).reshape(shape) % 1000
        np.asarray(forward(state, tokens, shape[0] * places_of(shape[1])))

    return call


def bench(console: Console) -> Samples:
    """Seconds of every turn by way, with the tokens behind them."""
    dtype, _ = choose_compute_dtype("auto", jax.devices()[0])
    model, tokenizer = load_model(resolve_path(bench_ours.MODEL), dtype=dtype)
    letters, forward = mmlu.letter_ids(tokenizer), forward_pass(model)
    samples: Samples = {}
    for task in tasks(tokenizer, max_len=2048):
        scorer = Scorer(model, max_len=2048, share_prefixes=task.shared)
        shapes = list(task.shapes(scorer))

        def score(task=task, scorer=scorer) -> None:
            for group in task.groups:
                scorer.choose_next(group, letters)

        def ceiling(shapes=shapes) -> None:
            for shape in shapes:
                forward(shape)

        seconds: dict[str, list[float]] = {"scoring": [], "ceiling": []}
        cpu_seconds: dict[str, list[float]] = {"scoring": [], "ceiling": []}
        with console.status(f"MMLU, {task.name}"):
            for turn in range(ROUNDS + 1):
                for name, call in (("scoring", score), ("ceiling", ceiling)):
                    started, cpu_started = time.perf_counter(), time.process_time()
                    call()
                    if turn:  # the first one compiles
                        seconds[name].append(time.perf_counter() - started)
                        cpu_seconds[name].append(time.process_time() - cpu_started)
        samples[task.name] = {
            "questions": sum(map(len, task.groups)),
            "shapes": shapes,
            "through": task.tokens(in_effect=False),
            "in_effect": task.tokens(in_effect=True),
            "computed": sum(rows * width for rows, width in shapes),
            "dtype": dtype.name,
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
        }
    return samples


def summarize(samples: Samples) -> dict[str, dict[str, float]]:
    """Of each way tokens a second, and the share of the ceiling: medians over the turns."""
    summary = {}
    for name, found in samples.items():
        used = found["through"] / found["computed"]
        shares = {
            kind: statistics.median(
                used * bare / mine for mine, bare in zip(*found[kind].values(), strict=True)
            )
            for kind in ("seconds", "cpu_seconds")
        }
        scoring, ceiling = (statistics.median(turns) for turns in found["seconds"].values())
        summary[name] = {
            "questions": found["questions"],
            "programs": len(set(map(tuple, found["shapes"]))),
            "not_padding": used,
            "through_per_second": found["through"] / scoring,
            "in_effect_per_second": found["in_effect"] / scoring,
            "ceiling_per_second": found["computed"] / ceiling,
            "share_of_ceiling": shares["seconds"],
            "share_of_ceiling_cpu": shares["cpu_seconds"],
            "in_effect_of_ceiling": shares["seconds"] * found["in_effect"] / found["through"],
        }
    return summary


def print_table(summary: dict[str, dict[str, float]], console: Console) -> None:
    """One row a way."""
    table = Table(title="MMLU on SmolLM2-135M in NF4, tokens a second")
    columns = ("solved questions", "questions", "not padding", "through the model", "in effect")
    shares = ("through / ceiling", "in CPU seconds", "in effect / ceiling")
    for column in (*columns, "ceiling", *shares):
        table.add_column(column, justify="left" if column == columns[0] else "right")
    for name, row in summary.items():
        table.add_row(
            name,
            str(row["questions"]),
            f"{row['not_padding']:.0%}",
            *(f"{row[f'{key}_per_second']:,.0f}" for key in ("through", "in_effect", "ceiling")),
            *(
                f"{row[key]:.2f}"
                for key in ("share_of_ceiling", "share_of_ceiling_cpu", "in_effect_of_ceiling")
            ),
        )
    console.print(table)
