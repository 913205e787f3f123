"""The compiled steps of a run, one for each length of rows, and where the optimizer's state lies.

A batch of longer rows needs more memory: a spike. Each length has a step of its own, compiled with
as much of the optimizer's state on the device as fits beside its activations. Before a batch whose
step wants the state elsewhere, the state is moved; after the spike it comes back.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import optax
from flax import nnx
from jaxtyping import Array, PyTree
from ml_collections import config_dict

from qlora_jax import errors
from qlora_jax.memory_limits import host_limits
from qlora_jax.metrics import device_memory
from qlora_jax.optim.paged import check_paging
from qlora_jax.placement import bytes_by_memory, eval_placed, place, place_abstract
from qlora_jax.report import Report, format_bytes
from qlora_jax.training.building import build_optimizer
from qlora_jax.training.family import Family
from qlora_jax.training.fitting import (
    Fit,
    abstract_batch,
    abstract_run,
    as_flags,
    device_budget,
    find_settings,
    fit_state,
)
from qlora_jax.training.step import (
    Batch,
    TrainState,
    compile_step,
    init_state,
    make_train_step,
)
from qlora_jax.training.workdir import may_change

# Device memory that no plan gets: what is rounded up, and what is split by it.
_SLACK = 64 << 20


class Steps:
    """Calls the step that was compiled for a batch's length.

    Attributes:
        fits: by length, ascending.
    """

    def __init__(
        self,
        config: config_dict.ConfigDict,
        graphdef: nnx.GraphDef,
        lora: PyTree,
        frozen: nnx.State,
        *,
        lengths: list[int],
        total_steps: int,
        family: Family,
        report: Report,
    ):
        """Compiles.

        Args:
            config: a whole configuration.
            graphdef: of the model in training mode.
            lora: its trainable parameters.
            frozen: the others.
            lengths: of rows, ascending.
            total_steps: of the run, for the learning rate.
            family: of the model.
            report: where moves are told.

        Raises:
            TrainingError: the step does not fit into the device's or the host's memory.
        """
        self._config, self._graphdef, self._frozen = config, graphdef, frozen
        self._lora = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), lora)
        self._total_steps, self._family, self._report = total_steps, family, report
        self._lengths = {_shapes(abstract_batch(config, family, n)): n for n in lengths}
        self._device = jax.devices()[0]
        room = self._room(lora, frozen)
        self._budget = device_budget(config, room and room - _SLACK)
        self.fits = {
            length: fit_state(functools.partial(self._compile, length), self._budget)
            for length in lengths
        }
        for length, fit in self.fits.items():
            self._check(length, fit)
        if config.optimizer.check_paging and any(fit.pages for fit in self.fits.values()):
            self._check_paging()

    @property
    def longest(self) -> Fit:
        """The step that needs most."""
        return max(self.fits.values(), key=lambda fit: fit.peak_bytes + fit.host_bytes)

    def describe(self) -> list[str]:
        """Where the memory of the steps is, for a reader; a line a length of rows."""
        lines = []
        for length, fit in self.fits.items():
            line = f"rows of {length} tokens: {format_bytes(fit.peak_bytes)} of device memory"
            if self._budget is not None:
                line += f" (there are {format_bytes(self._budget)})"
            moved = bytes_by_memory(fit.state.opt_state)["pinned_host"]
            if moved:
                line += f"; in the host's {format_bytes(moved)} of optimizer state, read and "
                line += "written once a step"
            if fit.host_bytes > moved:
                line += f"; in the host's {format_bytes(fit.host_bytes - moved)} of activations"
            lines.append(line)
        return lines

    def _compile(self, length: int, state_budget: int | None) -> Fit:
        tx, _ = build_optimizer(self._config, self._total_steps, state_budget)
        state = eval_placed(lambda lora: init_state(lora, tx, self._config.seed), self._lora)
        step = make_train_step(self._graphdef, tx, loss_fn=self._family.loss)
        batch = abstract_batch(self._config, self._family, length)
        return Fit.of(compile_step(step, state, self._frozen, batch), state_budget, state)

    def _check(self, length: int, fit: Fit) -> None:
        """Refuses a step that cannot run, before anything is allocated for it."""
        if self._budget is not None and fit.peak_bytes > self._budget:
            changes = self._find_settings(self._budget)
            remedy = f"It would fit with {as_flags(changes)}" if changes else "Take a larger device"
            raise errors.TrainingError(
                f"a step with rows of {length} tokens needs {format_bytes(fit.peak_bytes)} of "
                f"device memory with all that can be paged in the host's, and there are "
                f"{format_bytes(self._budget)}. {remedy}"
            )
        for name, limit in self._host_limits().items():
            if fit.host_bytes > limit:
                raise errors.TrainingError(
                    f"{format_bytes(fit.host_bytes)} of the optimizer's state and activations "
                    f"belong into the host's memory, and {name} leaves {format_bytes(limit)}. Free "
                    "or raise it, or take smaller adapters (--config.lora.rank)"
                )

    def _check_paging(self) -> None:
        """Refuses a device on which paging changes the result."""

        def make(state_budget: int | None) -> optax.GradientTransformation:
            return build_optimizer(self._config, self._total_steps, state_budget)[0]

        if not check_paging(make):
            raise errors.TrainingError(
                "this device and this version of JAX compute other values from optimizer state in "
                "the host's memory than from state on the device, so a run whose state does not "
                "fit would be wrong. Take another version of JAX, or settings whose state fits: "
                "--config.optimizer.name=adamw8bit, or a smaller --config.lora.rank"
            )

    def _compile_other(self, config: config_dict.ConfigDict, state_budget: int | None) -> Fit:
        run = abstract_run(config, self._device, state_budget)
        compiled = compile_step(run.step, run.state, run.frozen, run.batch)
        return Fit.of(compiled, state_budget, run.state)

    def _host_limits(self) -> dict[str, int]:
        return host_limits(pinned=self._device.platform == "gpu")

    def _find_settings(self, budget: int) -> dict[str, Any]:
        """Settings with which a step would fit; none where nothing that was tried does."""
        host = min(self._host_limits().values())
        return find_settings(self._config, self._compile_other, budget, host)

    def start(self, lora: PyTree) -> TrainState:
        """The state before the first step, where the longest rows want it."""
        tx, _ = build_optimizer(self._config, self._total_steps, self.longest.state_budget)
        state = init_state(lora, tx, self._config.seed)
        return place(state, self.longest.state, self._device)

    def restored_like(self) -> TrainState:
        """What to restore a checkpoint into: the state where the longest rows want it."""
        return place_abstract(self.longest.state, self._device)

    def __call__(
        self, state: TrainState, frozen: nnx.State, batch: Batch
    ) -> tuple[TrainState, dict[str, Array]]:
        """One step, see `make_train_step`; its metrics say where its memory is."""
        length = self._lengths[_shapes(batch)]
        fit = self.fits[length]
        room = self._room(state, frozen)
        if room is not None and fit.peak_bytes > room and fit.state_budget != 0:
            budget = device_budget(self._config, room - _SLACK)
            fit = fit_state(functools.partial(self._compile, length), budget)
            self._evict(length, fit, f"there are only {format_bytes(room)} of device memory left")
        state = place(state, fit.state, self._device)
        while True:
            try:
                state, metrics = fit.compiled(state, frozen, batch)
                break
            except jax.errors.JaxRuntimeError as error:
                self._check_recoverable(length, state, error)
                fit = self._compile(length, 0)  # once
                self._evict(length, fit, "out of device memory")
                state = place(state, fit.state, self._device)
        where = bytes_by_memory(fit.state.opt_state)
        plan = {
            "step_device_bytes": fit.peak_bytes,
            "optimizer_device_bytes": where["device"],
            "optimizer_host_bytes": where["pinned_host"],
        }
        return state, {**metrics, **plan}

    def _room(self, *arguments: PyTree) -> int | None:
        """Bytes of the device that a step with these arguments may take in all.

        Something else may have taken some: arrays of this process that are no arguments, say. None:
        the device does not say.
        """
        memory = device_memory(self._device)
        if memory is None or "limit" not in memory:
            return None
        ours = sum(bytes_by_memory(tree)["device"] for tree in arguments)
        return memory["limit"] - max(0, memory["in_use"] - ours)

    def _check_recoverable(self, length: int, state: TrainState, error: Exception) -> None:
        """Whether a step that failed can be taken again with less memory.

        Raises:
            TrainingError: all state that can is in the host's memory already, or the state is
                lost: the step had begun.
        """
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise error
        begun = any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
        if not begun and self.fits[length].state_budget != 0:
            return
        budget = int(0.9 * self.fits[length].peak_bytes)
        changes = self._find_settings(budget)
        remedy = f"Continue with {as_flags(changes)}" if changes else "Take a larger device"
        if not all(map(may_change, changes)):
            remedy += " (in a new --workdir, where this one has checkpoints)"
        raise errors.TrainingError(
            f"the device ran out of memory in a step with rows of {length} tokens, planned at "
            f"{format_bytes(self.fits[length].peak_bytes)}; does another process use it? "
            f"{remedy}. What was saved last is as it was.\n  {str(error).splitlines()[0]}"
        ) from error

    def _evict(self, length: int, fit: Fit, why: str) -> None:
        """Takes another step for rows of a length, with less of the state on the device."""
        self._check(length, fit)
        self.fits[length] = fit
        moved = bytes_by_memory(fit.state.opt_state)["pinned_host"]
        self._report.line(
            f"{why}; from now on {format_bytes(moved)} of the optimizer's state are in the host's "
            f"memory in steps with rows of {length} tokens",
            style="yellow",
        )


def _shapes(batch: Batch) -> frozenset:
    """What tells batches of one length from those of another."""
    return frozenset((name, array.shape) for name, array in batch.items())
