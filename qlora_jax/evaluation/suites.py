"""Whole benchmarks of one model: journal, figures, and what is needed to repeat them.

Every function leaves two files in its folder: `<name>.jsonl`, a journal with one record for each
question, which a second start continues, and `<name>.json` with the figures, the settings, the
identity of the model and the versions.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from flax import nnx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from qlora_jax.data.data_files import find_files
from qlora_jax.data.records import load_records
from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.errors import DataError, EvaluationError
from qlora_jax.evaluation import crows_pairs, mmlu, perplexity
from qlora_jax.evaluation.journal import Journal
from qlora_jax.evaluation.scoring import Scorer
from qlora_jax.files import fingerprint
from qlora_jax.loading import base_fingerprint, hash_arrays
from qlora_jax.training.card import versions
from qlora_jax.tree import join_path

# Windows and pairs that are scored before the journal is written.
_GROUP = 64


@dataclasses.dataclass(frozen=True)
class Candidate:
    """What is evaluated, and where the answers go.

    Attributes:
        model: a decoder, adapters or not.
        tokenizer: the model's.
        name: how the user calls it.
        out: the folder of the answers.
        max_len: see `Scorer`.
        batch_tokens: see `Scorer`; it has no say in the figures.
    """

    model: nnx.Module
    tokenizer: Tokenizer
    name: str
    out: pathlib.Path
    max_len: int | None = None
    batch_tokens: int = 4096

    def scorer(self) -> Scorer:
        """A scorer of the model."""
        return Scorer(self.model, max_len=self.max_len, batch_tokens=self.batch_tokens)

    def identity(self) -> dict[str, str]:
        """What tells this model from another one with the same name."""
        adapters = nnx.to_flat_state(nnx.state(self.model, nnx.LoRAParam))
        return {
            "base": base_fingerprint(self.model),
            "adapter": hash_arrays({join_path(p): v.get_value() for p, v in adapters}),
            "tokenizer": self.tokenizer.fingerprint,
            "compute_dtype": self.model.dtype.name,
        }


def run_mmlu(
    candidate: Candidate, data: str, solved: str = "", *, shots: int = 5
) -> Mapping[str, mmlu.Accuracy]:
    """MMLU, see `evaluation.mmlu`.

    Args:
        candidate: the model.
        data: file or folder of the questions.
        solved: file or folder of those that are shown with their answers; needed for shots.
        shots: solved questions in front of each question.

    Returns:
        Accuracies of the subjects, "micro" and "macro".

    Raises:
        DataError: a file cannot be understood, or there are no solved questions for a subject.
        EvaluationError: the folder holds another evaluation.
    """
    if shots and not solved:
        raise DataError(f"{shots=} needs solved questions; give MMLU's dev questions, or shots=0")
    questions = mmlu.read_questions(data)
    examples = mmlu.read_questions(solved) if shots else []
    scorer = candidate.scorer()
    settings = {
        "suite": "mmlu",
        "model": candidate.identity(),
        "questions": content_hash(data),
        "solved": content_hash(solved) if shots else "",
        "shots": shots,
        "max_len": scorer.max_len,
    }
    with Journal(candidate.out / "mmlu.jsonl", settings) as journal, progress_bar() as bar:
        task = bar.add_task("MMLU", total=len(questions), completed=len(journal.records))
        letters = mmlu.letter_ids(candidate.tokenizer)
        groups = mmlu.write_prompts(
            candidate.tokenizer,
            questions,
            examples,
            shots=shots,
            max_len=scorer.max_len,
            done=journal.records,
        )
        for prompts in groups:
            answers = mmlu.ask(
                scorer, letters, prompts, progress=lambda count: bar.advance(task, count)
            )
            journal.write((answer.key, answer[1:]) for answer in answers)
        answers = [mmlu.Answer(key, *record) for key, record in journal.records.items()]
    found = mmlu.summarize(answers)
    figures = {name: accuracy._asdict() for name, accuracy in found.items()}
    write_figures(candidate, "mmlu", settings, figures)
    return found


def run_crows_pairs(
    candidate: Candidate, data: str
) -> dict[str, dict[str, crows_pairs.Preference]]:
    """CrowS-Pairs in all conventions, see `evaluation.crows_pairs`.

    Args:
        candidate: the model.
        data: the file.

    Returns:
        By convention ("all", "shared", and both without start token: "all, no start token", ...),
        the preference of each category and "overall".

    Raises:
        DataError: the file cannot be understood.
        EvaluationError: the folder holds another evaluation.
    """
    pairs = crows_pairs.read_pairs(data)
    scorer = candidate.scorer()
    settings = {"suite": "crows_pairs", "model": candidate.identity(), "pairs": content_hash(data)}
    found = {}
    with Journal(candidate.out / "crows_pairs.jsonl", settings) as journal, progress_bar() as bar:
        task = bar.add_task("CrowS-Pairs", total=2 * len(pairs), completed=len(journal.records))
        for start_token, suffix in ((True, ""), (False, ", no start token")):
            keys = [f"{i}{suffix}" for i in range(len(pairs))]
            left = [
                each for each in zip(keys, pairs, strict=True) if each[0] not in journal.records
            ]
            for part in itertools.batched(left, _GROUP):
                scores = crows_pairs.score_pairs(
                    scorer,
                    candidate.tokenizer,
                    [pair for _, pair in part],
                    start_token=start_token,
                    progress=lambda sentences: bar.advance(task, sentences / 2),
                )
                journal.write(zip((key for key, _ in part), scores, strict=True))
            scores = [crows_pairs.PairScore(*journal.records[key]) for key in keys]
            for convention in ("all", "shared"):
                found[convention + suffix] = crows_pairs.preferences(scores, convention)
    figures = {
        convention: {name: each._asdict() for name, each in preferences.items()}
        for convention, preferences in found.items()
    }
    write_figures(candidate, "crows_pairs", settings, figures)
    return found


def run_perplexity(
    candidate: Candidate, data: str, *, stride: int | None = None
) -> perplexity.Perplexity:
    """Perplexity of texts, see `evaluation.perplexity`.

    Args:
        candidate: the model.
        data: a text file, which is one document, or a file or folder of records with "text".
        stride: tokens from window to window; None: half a window.

    Raises:
        DataError: there is no text.
        EvaluationError: the folder holds another evaluation.
    """
    texts = read_texts(data)
    scorer = candidate.scorer()
    parts, size = perplexity.cut(candidate.tokenizer, texts, scorer.max_len, stride)
    settings = {
        "suite": "perplexity",
        "model": candidate.identity(),
        "texts": content_hash(data),
        "window": scorer.max_len,
        "stride": scorer.max_len // 2 if stride is None else stride,
    }
    with Journal(candidate.out / "perplexity.jsonl", settings) as journal, progress_bar() as bar:
        done = len(journal.records) * _GROUP
        task = bar.add_task("perplexity", total=len(parts), completed=min(done, len(parts)))
        for i, part in enumerate(itertools.batched(parts, _GROUP)):
            if str(i) not in journal.records:
                scores = scorer.log_likelihoods(
                    part, progress=lambda windows: bar.advance(task, windows)
                )
                nats = -sum(one.total for one in scores)
                journal.write([(str(i), (nats, sum(len(one.tokens) for one in scores)))])
        nats, tokens = map(sum, zip(*journal.records.values(), strict=True))
    found = perplexity.Perplexity(nats, tokens, size)
    figures = found._asdict() | {
        "loss": found.loss,
        "perplexity": found.perplexity,
        "bits_per_byte": found.bits_per_byte,
    }
    write_figures(candidate, "perplexity", settings, figures)
    return found


def read_texts(data: str) -> list[str]:
    """Text files, each one document, or the "text" of records."""
    files = find_files(data)
    if all(file.suffix == ".txt" for file in files):
        try:
            return [file.read_text(encoding="utf-8") for file in files]
        except UnicodeDecodeError as error:
            raise DataError(f"{data} is not UTF-8 text: {error.reason}") from None
    return [record.text for record in load_records(data, "text")]


def content_hash(data: str) -> str:
    """What a data set holds, whatever it is called."""
    return ",".join(fingerprint(file) for file in find_files(data))


def progress_bar() -> Progress:
    """Progress and time left; on standard error, which leaves the figures alone on the other."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def write_figures(
    candidate: Candidate, suite: str, settings: Mapping[str, Any], figures: Mapping[str, Any]
) -> None:
    """Writes what was found, and what is needed to repeat it, to `<suite>.json`.

    Raises:
        EvaluationError: the disk is full or gone.
    """
    path = candidate.out / f"{suite}.json"
    content = {
        "model": candidate.name,
        "settings": settings,
        "figures": figures,
        "versions": versions(),
    }
    try:
        path.write_text(json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise EvaluationError(f"{path} cannot be written: {error.strerror}") from error
