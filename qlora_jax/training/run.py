"""A whole fine-tuning run: from a configuration and an empty directory to an adapter.

A run can be stopped anywhere (Ctrl-C, a crash, a machine that is taken away) and continued by the
same call: a checkpoint holds the adapter, the optimizer's moments, the PRNG key, the step and the
position in the data, and every random number is a function of these. What the uninterrupted run
would have computed, the continued run computes, to the bit. The base is not in a checkpoint, only
its fingerprint.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
from ml_collections import config_dict

from qlora_jax import config as config_lib
from qlora_jax import hub, phases
from qlora_jax.checkpoint import HELDOUT_LOSS
from qlora_jax.data.batches import row_lengths
from qlora_jax.errors import TrainingError
from qlora_jax.generation import generate
from qlora_jax.metrics import MetricsWriter, plot_loss, read_metrics
from qlora_jax.neftune import add_embedding_noise
from qlora_jax.placement import tree_bytes
from qlora_jax.report import Report, describe_frozen, format_bytes, format_count, measure
from qlora_jax.training.bad_steps import BadSteps
from qlora_jax.training.building import (
    build_model,
    build_optimizer,
    choose_compute_dtype,
    describe_base,
    split_model,
)
from qlora_jax.training.card import CardFacts, generate_command, model_card, this_python
from qlora_jax.training.crash import Progress, TrackedBatches, crash_reported
from qlora_jax.training.data import describe_data, load_training_data, question_text
from qlora_jax.training.family import family_of
from qlora_jax.training.heldout import OTHER_QUESTIONS, Heldout, as_row
from qlora_jax.training.interrupts import sigterm_raises
from qlora_jax.training.loop import Hooks, Intervals, run_steps
from qlora_jax.training.mmlu import compare, read_training_questions
from qlora_jax.training.result import TrainResult, finished_result
from qlora_jax.training.saving import Resume, RunCheckpoints, check_resume
from qlora_jax.training.step import TrainState, init_state
from qlora_jax.training.stepping import Steps
from qlora_jax.training.workdir import Workdir, explain_os_error

OnStep = Callable[[int, Mapping[str, float]], None]


def train(
    config: config_dict.ConfigDict,
    workdir: str | os.PathLike,
    *,
    resume: Resume = "auto",
    on_step: OnStep | None = None,
    report: Report | None = None,
) -> TrainResult:
    """Fine-tunes a model, or continues to.

    Args:
        config: from `qlora_jax.config.get_config()` or a recipe.
        workdir: a new directory, or that of a run to continue.
        resume: "auto" continues where there is a checkpoint and else begins; "must" refuses to
            begin; "never" refuses to continue. Nothing is ever removed for it.
        on_step: called after each step with its number and metrics (`loss`, `learning_rate`,
            `grad_norm`, `tokens_per_second`, ...), for live plots.
        report: where to print; None: standard output.

    Returns:
        The result, which `result.json` holds too.

    Raises:
        ConfigError: a field cannot be used, or differs from the run that `workdir` holds.
        TrainingError: the directory cannot be written to, another process trains there, or too
            many losses in a row are not finite numbers.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, when what there is to save is saved.

    >>> result = train(config, "runs/first")  # doctest: +SKIP
    """
    config_lib.validate(config)
    check_resume(resume, pathlib.Path(workdir).expanduser())
    directory, report = Workdir(workdir), report or Report()
    if result := finished_result(directory, config):
        report.finished(result.workdir, result.steps)
        return result
    progress = Progress()
    try:
        with sigterm_raises(), crash_reported(directory, progress):
            return _run_alone(config, directory, report, on_step, progress)
    except KeyboardInterrupt:
        report.stopped(phases.current())
        raise


def _run_alone(
    config: config_dict.ConfigDict,
    directory: Workdir,
    report: Report,
    on_step: OnStep | None,
    progress: Progress,
) -> TrainResult:
    """Trains with the lock of the directory."""
    try:
        with directory.lock() as warning:
            if warning:
                report.line(warning, style="bold red")
            directory.clean()
            return _Run(config, directory, report, on_step, progress).execute()
    except OSError as error:
        if error.filename and not pathlib.Path(error.filename).is_relative_to(directory.path):
            raise
        raise TrainingError(explain_os_error(error, directory.path)) from error


class _Run:
    """One call of `train`: what is loaded once and used from beginning to end."""

    def __init__(
        self,
        config: config_dict.ConfigDict,
        directory: Workdir,
        report: Report,
        on_step: OnStep | None,
        progress: Progress,
    ):
        self.config, self.directory, self.report = config, directory, report
        self.on_step, self.progress = on_step, progress
        self.checkpoints = RunCheckpoints(config, directory, report)
        phases.enter("tokenizing")
        device = jax.devices()[0]
        self.dtype, self.dtype_reason = choose_compute_dtype(config.model.compute_dtype, device)
        # First what takes seconds: nobody should wait for the weights of 65B, and then read that
        # a path to the data is wrong.
        base = describe_base(config)
        self.tokenizer = base.tokenizer
        questions = read_training_questions(config, base)
        self.family = family_of(base.shape, config)
        with report.busy("tokenizing the data") as notes:
            self.data = load_training_data(
                config, base.tokenizer, base.shape.vocab_size, self.family.tokenize
            )
            notes += ["found from an earlier start"] if self.data.cached else []
        phases.enter("loading")
        with report.busy(f"loading {config.model.path} and quantizing it"):
            model, _, self.fingerprint = build_model(
                config,
                dtype=self.dtype,
                workdir=directory.path,
                again=self.checkpoints.exist,
            )
        add_embedding_noise(model, config.train.neftune_alpha, config.seed)
        model.eval()
        eval_graphdef, _, _ = split_model(model)
        model.train()
        self.graphdef, lora, self.frozen = split_model(model)
        self.size = measure(lora, self.frozen)
        self.heldout = Heldout(
            config, self.data.heldout, eval_graphdef, self.frozen, self.family, questions
        )
        self.batches = self.data.batches(config, self.family.build)
        self.steps = config.train.steps or self.batches.num_batches(config.train.epochs)
        _, self.schedule = build_optimizer(config, self.steps)
        self.checkpoints.describe(
            base=self.fingerprint,
            data=self.data.fingerprint,
            tokenizer=self.tokenizer,
            dtype=self.dtype,
        )
        self.lora = lora
        self.state: TrainState | None = None  # until it is known where it fits
        # measured before the first step; travels in the metadata of the checkpoints
        self.before: dict[str, Any] | None = None
        self.train_loss: float | None = None

    def execute(self) -> TrainResult:
        """The run in the order in which it is printed."""
        self._describe()
        self._prepare_directory()
        shown = min(self.data.train[:20], key=lambda example: len(example.tokens))
        self.report.sample(shown, self.tokenizer)
        steps = self._compile()
        self._start(steps)
        if int(self.state.step) < self.steps:
            if self.before is None:
                self.before = self._measure("before training")
            self._train(steps)
        after = self._measure("after training")
        return self._conclude(after)

    def _describe(self) -> None:
        config, size, data = self.config, self.size, self.data
        device, train = jax.devices()[0], config.train
        rows = train.batch_size * train.grad_accum
        epochs = self.steps * rows / self.batches.rows_per_epoch
        facts = [
            ("model", hub.describe(config.model.path, "model")),
            ("fingerprint", self.fingerprint),
            ("frozen", describe_frozen(size, self.frozen, config.model.quant_type)),
            (
                "trainable",
                f"{format_count(size.trainable)} parameters in {format_bytes(size.trainable_bytes)}"
                f": LoRA of rank {config.lora.rank} in {config.lora.dtype}",
            ),
            ("compute", f"{self.dtype.name} on {device.device_kind}: {self.dtype_reason}"),
            ("data", describe_data(config)),
            ("records", f"{len(data.train):,} to train on, {len(data.heldout):,} held out"),
            (
                "run",
                f"{self.steps} steps of {rows} rows of {config.data.max_len} tokens, {epochs:.2f} "
                "epochs",
            ),
        ]
        self.report.facts("QLoRA fine-tuning", facts)
        if data.report.skipped or data.report.dropped or data.report.truncated:
            for line in data.report.lines():
                self.report.line(f"  {line}", style="yellow")

    def _prepare_directory(self) -> None:
        tx, _ = build_optimizer(self.config, self.steps)
        state = jax.eval_shape(lambda lora: init_state(lora, tx, self.config.seed), self.lora)
        # one more than is kept: a new checkpoint is whole before the oldest goes
        kept = self.config.checkpoint.keep + self.config.checkpoint.keep_best
        self.directory.check_space((kept + 1) * tree_bytes(state) + 2**24)
        (self.directory / "result.json").unlink(missing_ok=True)
        self.directory.write_text("config.json", config_lib.to_json(self.config))

    def _compile(self) -> Steps:
        """Compiles the step before its first use, so that the wait has a name and a duration."""
        phases.enter("compiling")
        seq_len = self.config.data.max_len
        lengths = row_lengths(seq_len) if self.config.data.group_by_length else [seq_len]
        once = "once" if len(lengths) == 1 else f"once for each of {len(lengths)} lengths of rows"
        with self.report.busy(f"compiling ({once})") as notes:
            steps = Steps(
                self.config,
                self.graphdef,
                self.lora,
                self.frozen,
                lengths=lengths,
                total_steps=self.steps,
                family=self.family,
                report=self.report,
            )
            notes.append(f"a step needs {format_bytes(steps.longest.peak_bytes)}")
        if steps.longest.host_bytes:
            for line in steps.describe():
                self.report.line(f"  {line}")
        return steps

    def _start(self, steps: Steps) -> None:
        """A new state, or that of the newest checkpoint, in the memory where the steps want it."""
        found = self.checkpoints.restore(steps.restored_like())
        if found is None:
            self.state = steps.start(self.lora)
            return
        self.batches.restore(found.metadata["batches"])
        self.state, self.before = found.tree, found.metadata["before"]
        self.train_loss, self.progress.step = found.metadata["train_loss"], found.step
        self.report.line(f"\ncontinuing after step {found.step} of {self.steps}", style="bold")
        if self.heldout.has_other_questions(self.before):
            self.report.line(OTHER_QUESTIONS, style="yellow")

    def _train(self, step_fn: Callable) -> None:
        """Takes the steps that are missing."""
        config = self.config
        phases.enter("training")
        self.report.step_legend()
        writer = MetricsWriter(self.directory.path, resume_step=int(self.state.step))
        writer.write(0, as_row(self.before))
        bad_steps = BadSteps(
            self.directory.path,
            most_skipped=config.train.max_skipped_steps,
            report=self.report,
            resume_step=int(self.state.step),
            rows=read_metrics(self.directory.path),
        )

        batches = TrackedBatches(self.batches, self.progress)
        if self.heldout.is_missing(int(self.state.step), self.directory):
            writer.write(int(self.state.step), self.heldout.measure(self.state))

        def record(step: int, row: Mapping[str, float]) -> None:
            writer.write(step, row)
            self.progress.step = step
            if self.on_step:
                self.on_step(step, row)

        try:
            self.state, self.train_loss = run_steps(
                batches.tracked(step_fn),
                self.state,
                self.frozen,
                batches,
                total=self.steps,
                schedule=self.schedule,
                intervals=Intervals(
                    log=config.train.log_every,
                    save=config.checkpoint.every,
                    evaluate=self.heldout.every,
                ),
                hooks=Hooks(self._save, self.heldout.within_training, record),
                report=self.report,
                bad_steps=bad_steps,
            )
        finally:
            writer.close()

    def _save(
        self, step: int, state: TrainState, position: dict[str, int], loss: float | None
    ) -> None:
        found = {"batches": position, "before": self.before, "train_loss": loss}
        self.checkpoints.save(step, state, found | {HELDOUT_LOSS: self.heldout.of_step(step)})

    def _measure(self, when: str) -> dict[str, Any]:
        """Held-out loss, MMLU and one answer, as far as there are records and questions."""
        found: dict[str, Any] = {"loss": None, "mmlu": None, "answer": None}
        if self.data.heldout:
            with self.report.busy(f"held-out loss {when}") as notes:
                found["loss"] = self.heldout.loss(self.state)
                notes.append(f"loss {found['loss']:.4f}")
        if self.heldout.questions:
            with self.report.busy(f"MMLU {when}") as notes:
                found["mmlu"] = self.heldout.accuracy(self.state)
                notes.append(f"{found['mmlu']['value']:.2%} right")
        if self.config.sample.enabled and self.data.question is not None:
            with self.report.busy(f"answering a held-out question {when}"):
                found["answer"] = generate(
                    self.heldout.model(self.state),
                    self.tokenizer,
                    [self.data.question],
                    max_new_tokens=self.config.sample.max_new_tokens,
                )[0]
        return found

    def _conclude(self, after: Mapping[str, Any]) -> TrainResult:
        """Compares before and after, and writes the result, the plot and the card."""
        phases.enter("finishing")
        before = self.before or after
        asked = before["answer"] is not None and after["answer"] is not None
        mmlu = compare(before.get("mmlu"), after["mmlu"])
        result = TrainResult(
            workdir=str(self.directory.path),
            steps=int(self.state.step),
            train_loss=self.train_loss,
            heldout_before=before["loss"],
            heldout_after=after["loss"],
            question=question_text(self.data.question) if asked else None,
            answer_before=before["answer"] if asked else None,
            answer_after=after["answer"] if asked else None,
            mmlu_before=mmlu[0] if mmlu else None,
            mmlu_after=mmlu[1] if mmlu else None,
        )
        heldout = answers = None
        if before["loss"] is not None and after["loss"] is not None:
            heldout = before["loss"], after["loss"]
            self.report.heldout(*heldout, records=len(self.data.heldout))
        if mmlu:
            self.report.mmlu(*mmlu)
        if row := as_row(after):
            with MetricsWriter(self.directory.path, resume_step=result.steps) as writer:
                writer.write(result.steps, row)
        if asked:
            answers = result.question, result.answer_before, result.answer_after
            self.report.answers(*answers)
        plot_loss(self.directory.path)
        facts = CardFacts(
            workdir=self.directory.path,
            config=self.config.to_dict(),
            size=self.size,
            base_fingerprint=self.fingerprint,
            data_fingerprint=self.data.fingerprint,
            records=(len(self.data.train), len(self.data.heldout)),
            compute_dtype=self.dtype.name,
            steps=result.steps,
            train_loss=result.train_loss,
            heldout=heldout,
            answers=answers,
            mmlu=mmlu,
        )
        self.directory.write_text("README.md", model_card(facts))
        self.directory.write_json("result.json", dataclasses.asdict(result))
        self.report.written(
            self.directory.path, [generate_command(self.directory.path, this_python())]
        )
        return result
