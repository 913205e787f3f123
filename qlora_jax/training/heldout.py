"""What a run measures of its model: the held-out loss and MMLU, before, within and after training.

Within training a signal has both dropped, so that the step is saved before the machine is gone; the
run that goes on measures it again, and its metrics have no gap.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from flax import nnx
from ml_collections import config_dict

from qlora_jax import phases
from qlora_jax.checkpoint import HELDOUT_LOSS
from qlora_jax.data.batches import eval_batches
from qlora_jax.data.masking import Example
from qlora_jax.metrics import read_metrics
from qlora_jax.training.family import Family
from qlora_jax.training.interrupts import stop_requested
from qlora_jax.training.mmlu import MMLU_ACCURACY, TrainingQuestions
from qlora_jax.training.step import TrainState, evaluate_loss
from qlora_jax.training.workdir import Workdir


def as_row(found: Mapping[str, Any]) -> dict[str, float]:
    """What was measured before or after training, as a row of metrics.

    >>> as_row({"loss": 2.5, "mmlu": {"value": 0.25, "error": 0.1}, "answer": None})
    {'heldout_loss': 2.5, 'mmlu_accuracy': 0.25}
    """
    mmlu = found.get("mmlu") or {}
    row = {HELDOUT_LOSS: found["loss"], MMLU_ACCURACY: mmlu.get("value")}
    return {name: value for name, value in row.items() if value is not None}


OTHER_QUESTIONS = (
    "The questions of MMLU, or those shown with their answers, are others than when this run "
    "began: accuracies from here on do not compare with those before."
)


class Heldout:
    """The held-out records and questions of a run, and how good a model is on them.

    Attributes:
        graphdef: of the model in evaluation mode.
        questions: of MMLU; None: none.
        every: steps from one measurement to the next; 0: none within training.
    """

    def __init__(
        self,
        config: config_dict.ConfigDict,
        records: Sequence[Example],
        graphdef: nnx.GraphDef,
        frozen: nnx.State,
        family: Family,
        questions: TrainingQuestions | None = None,
    ):
        """Takes what a loss needs beside the adapters.

        Args:
            config: a whole configuration.
            records: maybe none.
            graphdef: of the model in evaluation mode.
            frozen: the frozen part of the model.
            family: of the model.
            questions: see above.
        """
        self._config, self._records, self._family = config, records, family
        self.graphdef, self._frozen, self.questions = graphdef, frozen, questions
        self._measured: tuple[int, float | None] | None = None
        measured = {HELDOUT_LOSS: bool(records), MMLU_ACCURACY: questions is not None}
        self._names = {name for name, is_measured in measured.items() if is_measured}
        self.every = config.eval.every if self._names else 0

    def model(self, state: TrainState) -> nnx.Module:
        """The model of a state in evaluation mode; it shares the state's arrays."""
        return nnx.merge(self.graphdef, state.lora, self._frozen)

    def loss(self, state: TrainState) -> float:
        """Mean nats per token that carries loss, over all records."""
        phases.enter("evaluating")
        batches = eval_batches(
            self._records,
            batch_size=self._config.eval.batch_size,
            seq_len=self._config.data.max_len,
            packing=self._config.data.packing,
            build=self._family.build,
        )
        microbatches = ({name: a[0] for name, a in batch.arrays.items()} for batch in batches)
        # A part of them has another loss, which `within_training` drops.
        microbatches = itertools.takewhile(lambda _: not stop_requested(), microbatches)
        return evaluate_loss(self.model(state), microbatches, loss_fn=self._family.loss)

    def accuracy(self, state: TrainState) -> dict[str, Any]:
        """The accuracy on the questions, its standard error, and what makes it comparable.

        Returns:
            `value`, `error`, `questions` and `fingerprint`; empty when a signal came before it was
            known.
        """
        phases.enter("evaluating")
        found = self.questions.ask(self.model(state))
        return found._asdict() | {"fingerprint": self.questions.fingerprint} if found else {}

    def measure(self, state: TrainState) -> dict[str, float]:
        """All that is measured of a state, as a row of metrics; see `within_training`."""
        row = {}
        if HELDOUT_LOSS in self._names:
            row[HELDOUT_LOSS] = self.loss(state)
        if self.questions and not stop_requested():
            row[MMLU_ACCURACY] = self.accuracy(state).get("value")
        phases.enter("training")
        return row

    def within_training(self, state: TrainState) -> dict[str, float]:
        """What is measured after a step; empty when a signal came before it was known."""
        row = self.measure(state)
        if stop_requested():
            return {}
        self._measured = int(state.step), row.get(HELDOUT_LOSS)
        return row

    def of_step(self, step: int) -> float | None:
        """The loss after a step, if that was the last one to be measured."""
        return self._measured[1] if self._measured and self._measured[0] == step else None

    def has_other_questions(self, before: Mapping[str, Any] | None) -> bool:
        """Whether a run began with other questions of MMLU than it has now."""
        then = ((before or {}).get("mmlu") or {}).get("fingerprint")
        return bool(then and self.questions and then != self.questions.fingerprint)

    def is_missing(self, step: int, directory: Workdir) -> bool:
        """Whether the run was stopped while it measured the step that it goes on from."""
        if not self.every or step == 0 or step % self.every:
            return False
        rows = [row for row in read_metrics(directory.path) if row["step"] == step]
        return not self._names <= {name for row in rows for name in row}
