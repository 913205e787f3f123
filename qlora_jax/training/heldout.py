"""The held-out loss of a run: before, within and after training.

Within training a signal has it dropped, so that the step is saved before the machine is gone; the
run that goes on measures it again, and its metrics have no gap.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from flax import nnx
from ml_collections import config_dict

from qlora_jax import phases
from qlora_jax.checkpoint import HELDOUT_LOSS
from qlora_jax.data.batches import eval_batches
from qlora_jax.data.masking import Example
from qlora_jax.metrics import read_metrics
from qlora_jax.training.family import Family
from qlora_jax.training.interrupts import stop_requested
from qlora_jax.training.step import TrainState, evaluate_loss
from qlora_jax.training.workdir import Workdir


class Heldout:
    """The held-out records of a run, and the loss on them.

    Attributes:
        graphdef: of the model in evaluation mode.
    """

    def __init__(
        self,
        config: config_dict.ConfigDict,
        records: Sequence[Example],
        graphdef: nnx.GraphDef,
        frozen: nnx.State,
        family: Family,
    ):
        """Takes what a loss needs beside the adapters.

        Args:
            config: a whole configuration.
            records: maybe none.
            graphdef: of the model in evaluation mode.
            frozen: the frozen part of the model.
            family: of the model.
        """
        self._config, self._records, self._family = config, records, family
        self.graphdef, self._frozen = graphdef, frozen
        self._measured: tuple[int, float] | None = None
        self.every = config.eval.every if records else 0

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

    def within_training(self, state: TrainState) -> float | None:
        """The loss after a step; None when a signal came before it was known."""
        loss = self.loss(state)
        phases.enter("training")
        if stop_requested():
            return None
        self._measured = int(state.step), loss
        return loss

    def of_step(self, step: int) -> float | None:
        """The loss after a step, if that was the last one to be measured."""
        return self._measured[1] if self._measured and self._measured[0] == step else None

    def is_missing(self, step: int, directory: Workdir) -> bool:
        """Whether the run was stopped while it measured the step that it goes on from."""
        if not self.every or step == 0 or step % self.every:
            return False
        rows = read_metrics(directory.path)
        return not any(HELDOUT_LOSS in row for row in rows if row["step"] == step)
