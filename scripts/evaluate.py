r"""Evaluates a model, or makes a tournament of systems from judges' verdicts.

    python scripts/evaluate.py --suite=mmlu --workdir=runs/x --data=test/ --solved=dev/ --out=report
    python scripts/evaluate.py --suite=perplexity --model=models/llama --data=book.txt --out=report
    python scripts/evaluate.py --suite=crows_pairs --workdir=runs/x --data=crows.csv --out=report
    python scripts/evaluate.py --suite=lm_eval --workdir=runs/x --tasks=arc_easy --out=report
    python scripts/evaluate.py --suite=chat --workdir=runs/x --data=questions.jsonl --out=report
    python scripts/evaluate.py --suite=judge --answers=a.jsonl --answers=b.jsonl \
        --endpoint=https://api.openai.com/v1 --judge=gpt-4o --out=verdicts
    python scripts/evaluate.py --suite=datatypes --model=models/llama --data=book.txt --out=report
    python scripts/evaluate.py --suite=finetuning --config=configs/smollm2_135m.py --out=report
    python scripts/evaluate.py --suite=elo --ratings=ratings/ --out=report
    python scripts/evaluate.py --suite=agreement --ratings=votes.jsonl --ratings=gpt/ --out=report

The folder --out gets the figures as JSON with all that is needed to repeat them; a model's answers
are kept there one by one, so that the same command goes on where it was stopped. docs/evaluation.md
says what is measured, and how.
"""

import json
import math
import pathlib
from collections.abc import Iterable, Mapping

import evaluate_chat
import evaluate_datatypes
import evaluate_finetuning
import evaluate_judge
from absl import flags
from rich.console import Console
from rich.table import Table

from qlora_jax import command_line, model_flags
from qlora_jax.errors import ConfigError
from qlora_jax.evaluation import agreement, elo_report, read_ratings, suites

_SUITES = [
    "mmlu", "perplexity", "crows_pairs", "lm_eval", "datatypes", "finetuning", "chat", "judge",
    "elo", "agreement",
]  # fmt: skip
_SUITE = flags.DEFINE_enum("suite", None, _SUITES, "what to evaluate", required=True)
_OUT = flags.DEFINE_string("out", None, "the folder that gets the report", required=True)
_MODEL = model_flags.define()
_DATA = flags.DEFINE_string("data", None, "questions, text or pairs: a file or a folder")
_SOLVED = flags.DEFINE_string("solved", "", "mmlu: the questions that are shown with their answers")
_SHOTS = flags.DEFINE_integer("shots", 5, "mmlu: solved questions before each one", lower_bound=0)
_TASKS = flags.DEFINE_list("tasks", [], "lm_eval: names of its tasks")
_TASK_FOLDER = flags.DEFINE_string("task_folder", None, "lm_eval: a folder with tasks of your own")
_STRIDE = flags.DEFINE_integer("stride", None, "perplexity: tokens from window to window (half)")
_MAX_LEN = flags.DEFINE_integer(
    "max_len", None, "longest prompt or window, in tokens (what the model sees, at most 2048)"
)
_BATCH_TOKENS = flags.DEFINE_integer("batch_tokens", 4096, "tokens of a batch", lower_bound=1)
_RATINGS = flags.DEFINE_multi_string(
    "ratings", [], "elo, agreement: a file or folder of verdicts; can be repeated"
)
_ORDERINGS = flags.DEFINE_integer("orderings", 10_000, "elo: random orderings", lower_bound=2)
_MATCHES = flags.DEFINE_integer("matches", None, "elo: drawn by each ordering (all)", lower_bound=1)
_SIZES = flags.DEFINE_string(
    "sizes", "{}", "elo: JSON, billions of parameters of systems whose names do not tell"
)
_SEED = flags.DEFINE_integer("seed", 0, "chat, elo: of random choices", lower_bound=0)


def main() -> None:
    """Runs the suite and prints its figures."""
    if _SUITE.value == "elo":
        _elo()
        return
    if _SUITE.value == "agreement":
        _agreement()
        return
    if _SUITE.value == "judge":
        evaluate_judge.run(_OUT.value, _DATA.value)
        return
    if _SUITE.value == "finetuning":
        evaluate_finetuning.run(pathlib.Path(_OUT.value).expanduser())
        return
    if _SUITE.value == "datatypes":
        evaluate_datatypes.main(
            _MODEL,
            _DATA.value,
            pathlib.Path(_OUT.value).expanduser(),
            stride=_STRIDE.value,
            max_len=_MAX_LEN.value,
            batch_tokens=_BATCH_TOKENS.value,
        )
        return
    if _SUITE.value == "lm_eval":
        if not _TASKS.value:
            raise ConfigError("--suite=lm_eval needs tasks, for example --tasks=arc_easy,hellaswag")
    elif not _DATA.value:
        raise ConfigError(f"--suite={_SUITE.value} needs --data: a file or a folder")
    if _SUITE.value == "mmlu" and _SHOTS.value and not _SOLVED.value:
        raise ConfigError(
            f"--shots={_SHOTS.value} needs --solved: MMLU's dev questions; or give --shots=0"
        )
    candidate = _candidate()
    if _SUITE.value == "mmlu":
        found = suites.run_mmlu(candidate, _DATA.value, _SOLVED.value, shots=_SHOTS.value)
        rows = ((n, f"{a.value:.2%}", f"± {a.error:.2%}", a.questions) for n, a in found.items())
        _print(
            f"MMLU, {_SHOTS.value}-shot: {candidate.name}",
            ["subject", "right", "error", "questions"],
            rows,
        )
    elif _SUITE.value == "crows_pairs":
        found = suites.run_crows_pairs(candidate, _DATA.value)
        _crows(candidate.name, found)
    elif _SUITE.value == "perplexity":
        found = suites.run_perplexity(candidate, _DATA.value, stride=_STRIDE.value)
        _print(
            f"Perplexity: {candidate.name}",
            ["tokens", "nats per token", "perplexity", "bits per byte"],
            [
                (
                    found.tokens,
                    f"{found.loss:.4f}",
                    f"{found.perplexity:.3f}",
                    f"{found.bits_per_byte:.4f}",
                )
            ],
        )
    elif _SUITE.value == "chat":
        evaluate_chat.run(candidate, _DATA.value, seed=_SEED.value)
    else:
        _lm_eval(candidate)


def _candidate() -> suites.Candidate:
    """The model that the flags name."""
    model, tokenizer = _MODEL.load()
    out = pathlib.Path(_OUT.value).expanduser()
    return suites.Candidate(model, tokenizer, _MODEL.name, out, _MAX_LEN.value, _BATCH_TOKENS.value)


def _crows(name: str, found: Mapping) -> None:
    rows = [
        (category, each.pairs, *(f"{by[category].percent:.1f}" for by in found.values()))
        for category, each in found["all"].items()
    ]
    _print(
        f"CrowS-Pairs, stereotype preferred, in percent (50 is neutral): {name}",
        ["category", "pairs", *found],
        rows,
    )


def _print(title: str, columns: Iterable[str], rows: Iterable[Iterable]) -> None:
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="right" if table.columns else "left")
    for row in rows:
        table.add_row(*map(str, row))
    Console().print(table)


def _lm_eval(candidate: suites.Candidate) -> None:
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager

        from qlora_jax.evaluation.lm_eval_model import LmEvalModel
    except ImportError as error:
        raise ConfigError(
            f"--suite=lm_eval needs the extra lm_eval ({error}); install it with: "
            'pip install "qlora-jax[lm_eval]"'
        ) from None
    model = LmEvalModel(
        candidate.model,
        candidate.tokenizer,
        max_len=candidate.max_len,
        batch_tokens=candidate.batch_tokens,
    )
    manager = TaskManager(include_path=_TASK_FOLDER.value)
    results = lm_eval.simple_evaluate(
        model, tasks=_TASKS.value, task_manager=manager, log_samples=False
    )
    candidate.out.mkdir(parents=True, exist_ok=True)
    path = candidate.out / "lm_eval.json"
    path.write_text(json.dumps({"model": candidate.name, **results}, indent=1, default=str) + "\n")
    print(lm_eval.utils.make_table(results))


def _elo() -> None:
    if not _RATINGS.value:
        raise ConfigError("--suite=elo needs --ratings: a file or folder of verdicts")
    report = elo_report.write(
        read_ratings(*_RATINGS.value),
        _OUT.value,
        orderings=_ORDERINGS.value,
        matches=_MATCHES.value,
        seed=_SEED.value,
        source=", ".join(_RATINGS.value),
        sizes=_sizes(),
    )
    print(f"wrote {report}")


def _sizes() -> dict[str, float]:
    try:
        sizes = json.loads(_SIZES.value)
    except ValueError:
        sizes = None
    if not isinstance(sizes, dict):
        raise ConfigError(f'--sizes={_SIZES.value}: not a JSON object, such as {{"mine": 7}}')
    return sizes


def _agreement() -> None:
    if not _RATINGS.value:
        raise ConfigError("--suite=agreement needs --ratings, once for each rater")
    sources = [(pathlib.Path(path).stem, read_ratings(path)) for path in _RATINGS.value]
    raters = agreement.by_rater(sources)
    found = agreement.compare_raters(raters, orderings=_ORDERINGS.value, seed=_SEED.value)

    def text(value: float) -> str:
        return f"{value:.3f}" if math.isfinite(value) else "–"

    _print(
        "Each rater with itself",
        ["rater", "ratings", "items rated again", "Fleiss' kappa"],
        ((name, one.ratings, one.repeated, text(one.kappa)) for name, one in found.alone.items()),
    )
    if found.pairs:
        columns = ["raters", "items", "same", "Fleiss' kappa", "systems"]
        _print(
            "Two raters",
            [*columns, "Kendall's tau", "Spearman's rho"],
            (
                (" / ".join(two), one.items, text(one.same), text(one.kappa), one.systems)
                + (text(one.tau), text(one.rho))
                for two, one in found.pairs.items()
            ),
        )
    if len(found.alone) > 2:
        every = found.together
        print(f"all raters, {every.items} items: Fleiss' kappa {text(every.kappa)}")
    print(f"wrote {agreement.write(found, _OUT.value, _RATINGS.value)}")


if __name__ == "__main__":
    command_line.run(main)
