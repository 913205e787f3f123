"""The README.md of a work directory: what was trained, on what, how well, and how to use it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import pathlib
import platform
import sys
from collections.abc import Mapping
from typing import Any

import jax

from qlora_jax import hub
from qlora_jax.report import ModelSize, format_bytes, format_count

_PACKAGES = ("qlora-jax", "jax", "flax", "optax", "orbax-checkpoint", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers of a run.

    >>> sorted(versions())[:2]
    ['flax', 'jax']
    """
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


@dataclasses.dataclass(frozen=True)
class CardFacts:
    """What the card says.

    Attributes:
        workdir: of the run.
        config: the resolved configuration, nested dicts.
        size: parameters and bytes.
        base_fingerprint: content hash of the base model.
        data_fingerprint: content hash of the data.
        records: number of records trained on and held out.
        compute_dtype: name of the dtype the run computed in.
        steps: optimizer steps done.
        train_loss: mean loss of the last log line, nats per token; None if no step was taken.
        heldout: held-out loss before and after, or None.
        answers: question, reply before, reply after, or None.
        mmlu: share of right answers before (None where it does not compare) and after, its standard
            error and the number of questions; or None.
    """

    workdir: pathlib.Path
    config: Mapping[str, Any]
    size: ModelSize
    base_fingerprint: str
    data_fingerprint: str
    records: tuple[int, int]
    compute_dtype: str
    steps: int
    train_loss: float | None
    heldout: tuple[float, float] | None
    answers: tuple[str, str, str] | None
    mmlu: tuple[float | None, float, float, int] | None = None


def generate_command(workdir: pathlib.Path, python: str = "python") -> str:
    """How to talk to what was trained.

    >>> generate_command(pathlib.Path("runs/a"))
    'python scripts/generate.py --workdir=runs/a --prompt "…"'
    """
    return f'{python} scripts/generate.py --workdir={workdir} --prompt "…"'


def this_python() -> str:
    """This interpreter as one would type it here: that of an environment in this folder by path."""
    executable = pathlib.Path(sys.executable)
    here = pathlib.Path.cwd()
    return str(executable.relative_to(here)) if executable.is_relative_to(here) else "python"


def model_card(facts: CardFacts) -> str:
    """The card as Markdown."""
    sections = [_title(facts), _results(facts), _use(facts), _training(facts), _versions()]
    return "\n\n".join(section for section in sections if section) + "\n"


def _title(facts: CardFacts) -> str:
    model, lora, size = facts.config["model"], facts.config["lora"], facts.size
    scaling = "alpha / sqrt(rank)" if lora["use_rslora"] else "alpha / rank"
    return "\n".join(
        [
            f"# A QLoRA adapter for {pathlib.PurePath(model['path']).name}",
            "",
            f"{format_count(size.trainable)} trainable parameters "
            f"({'DoRA' if lora['use_dora'] else 'LoRA'} rank {lora['rank']}, alpha "
            f"{lora['alpha']:g}, scaled by {scaling}, dropout {lora['dropout']:g}, on "
            f"`{lora['where']}`) over a frozen base of {format_count(size.frozen)} parameters at "
            f"{size.bits_per_frozen:.2f} bits each ({format_bytes(size.frozen_bytes)}).",
            "",
            "| | |",
            "| --- | --- |",
            f"| base | `{hub.describe(model['path'], 'model')}` |",
            f"| base fingerprint | `{facts.base_fingerprint}` |",
            f"| stored as | {model['quant_type']}, blocks of {model['block_size']}, double "
            f"quantization {'on' if model['double_quant'] else 'off'} |",
            f"| adapters begin as | {lora['init']} |",
            f"| data | `{facts.config['data']['path']}` |",
            f"| data hash (xxh3_128) | `{facts.data_fingerprint}` |",
            f"| records | {facts.records[0]:,} trained on, {facts.records[1]:,} held out |",
        ]
    )


def _results(facts: CardFacts) -> str:
    lines = [
        "## Losses",
        "",
        "Nats per token that carries loss.",
        "",
        "| | loss |",
        "| --- | --- |",
    ]
    if facts.train_loss is not None:
        lines.append(f"| training, last logged steps | {facts.train_loss:.4f} |")
    if facts.heldout is not None:
        before, after = facts.heldout
        lines.append(f"| held out, before | {before:.4f} |")
        lines.append(f"| held out, after {facts.steps} steps | {after:.4f} |")
    if facts.train_loss is not None:
        lines += ["", "![loss](loss.png)"]
    if facts.mmlu is not None:
        lines += ["", _mmlu(facts)]
    if facts.answers is not None:
        names = ("A held-out question", "Before", "After")
        for name, text in zip(names, facts.answers, strict=True):
            lines += ["", f"**{name}**", "", *(f"> {row}" for row in text.strip().splitlines())]
    return "\n".join(lines)


def _mmlu(facts: CardFacts) -> str:
    before, after, error, questions = facts.mmlu
    given = facts.config["eval"]
    was = "" if before is None else f", {before:.2%} before training"
    shots = "behind five solved ones" if given["mmlu_solved"] else "without solved ones"
    return (
        f"**MMLU**: {after:.2%} ± {error:.2%} of {questions:,} questions right{was} "
        f"(`{given['mmlu']}`, {shots})"
    )


def _use(facts: CardFacts) -> str:
    return "\n".join(
        [
            "## How to use it",
            "",
            "The base is not in this directory; it is found by its path and checked by its "
            "fingerprint.",
            "",
            "```",
            generate_command(facts.workdir),
            "```",
            "",
            "```python",
            "from qlora_jax import generation, training",
            "",
            f'model, tokenizer = training.load_trained("{facts.workdir}")',
            'question = [{"role": "user", "content": "…"}]',
            "print(generation.generate(model, tokenizer, [question])[0])",
            "```",
        ]
    )


def _training(facts: CardFacts) -> str:
    optimizer, train, data = (facts.config[name] for name in ("optimizer", "train", "data"))
    rows = train["batch_size"] * train["grad_accum"]
    return "\n".join(
        [
            "## Training",
            "",
            f"{facts.steps} steps of {rows} rows of {data['max_len']} tokens "
            f"({'packed' if data['packing'] else 'one record each'}), computed in "
            f"{facts.compute_dtype} on {jax.devices()[0].device_kind}. AdamW, learning rate "
            f"{optimizer['learning_rate']:g} ({optimizer['schedule']}, "
            f"{optimizer['warmup_steps']} warmup steps), betas {optimizer['b1']:g} and "
            f"{optimizer['b2']:g}, weight decay {optimizer['weight_decay']:g}, gradients clipped "
            f"to {optimizer['max_grad_norm']:g}. Seed {facts.config['seed']}. Everything is in "
            "`config.json`; the same command continues or repeats the run:",
            "",
            "```",
            "python scripts/train.py --config=config.json --workdir=<new directory>",
            "```",
        ]
    )


def _versions() -> str:
    rows = [f"| {name} | {version} |" for name, version in versions().items()]
    return "\n".join(["## Versions", "", "| package | version |", "| --- | --- |", *rows])
