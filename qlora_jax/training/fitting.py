"""Makes a training step fit into the memory of a device.

XLA plans a program's memory when it compiles it. So the step is compiled, its plan is read, and
where it needs more than there is, the optimizer's state moves to the host's memory, the largest
leaves first, and no more of it than must (`qlora_jax.optim.paged`). What the compiler says is
compiled anew until it fits; nothing is estimated.

The same functions serve a run on the device that is there and a plan for one that is not.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import config_dict

from qlora_jax import config as config_lib
from qlora_jax.files import resolve_path
from qlora_jax.layer_formats import quantize_as, said_formats
from qlora_jax.loading import read_config
from qlora_jax.models.kinds import Model, Shape, abstract_model, read_shape
from qlora_jax.models.shapes import model_config
from qlora_jax.placement import bytes_by_memory, eval_placed
from qlora_jax.targets import peak_bytes
from qlora_jax.training.building import (
    adapt_model,
    build_optimizer,
    choose_compute_dtype,
    model_options,
    split_model,
)
from qlora_jax.training.family import Family, family_of
from qlora_jax.training.step import TrainState, init_state, make_train_step
from qlora_jax.weights import open_checkpoint

# Less room than this for state on the device is not worth another compilation.
_LEAST_ROOM = 64 << 20
# Tokens of a long row that a layer is computed for at a time, where that is what makes it fit.
_CHUNK = 4096


class Compiled(Protocol):
    """A compiled program: `jax.stages.Compiled`, or one for another device."""

    def memory_analysis(self) -> Any:
        """Its memory plan."""


@dataclasses.dataclass(frozen=True)
class AbstractRun:
    """A configuration's training step and its arguments, without values.

    Attributes:
        shape: of the model.
        step: as `make_train_step` gives it.
        state: trainable parameters, moments, key; what lies in the host's memory says so.
        frozen: the base.
        batch: int32 [grad_accum, batch_size, width] each; see `Family.widths`.
    """

    shape: Shape
    step: Any
    state: TrainState
    frozen: nnx.State
    batch: dict[str, jax.ShapeDtypeStruct]


@dataclasses.dataclass(frozen=True)
class Fit:
    """A compiled step, and where its memory is.

    Attributes:
        compiled: the step.
        state_budget: bytes of optimizer state that may be on the device; None: all of it.
        state: the arguments' state, abstract; what lies in the host's memory says so.
        peak_bytes: device memory of a step.
        host_bytes: memory of the host, pinned.
    """

    compiled: Any
    state_budget: int | None
    state: TrainState
    peak_bytes: int
    host_bytes: int

    @property
    def pages(self) -> bool:
        """Whether some of the optimizer's state lies in the host's memory."""
        return bytes_by_memory(self.state.opt_state)["pinned_host"] > 0

    @classmethod
    def of(cls, compiled: Compiled, state_budget: int | None, state: TrainState) -> Fit:
        """Reads the memory plan."""
        memory = compiled.memory_analysis()
        peak, host = peak_bytes(memory), peak_bytes(memory, "host_")
        moved = bytes_by_memory(state)["pinned_host"]
        if moved and not host:  # a CPU counts everything as its own
            peak, host = peak - moved, moved
        return cls(compiled, state_budget, state, peak, host)


def device_budget(config: config_dict.ConfigDict, memory_bytes: int | None) -> int | None:
    """Bytes of device memory that a step may take; None: no limit is known.

    Args:
        config: `optimizer.device_budget_gb` is a limit of its own.
        memory_bytes: what the device has for programs, if that is known.
    """
    limits = [] if memory_bytes is None else [memory_bytes]  # 0 is a limit, too
    if config.optimizer.device_budget_gb:
        limits.append(int(config.optimizer.device_budget_gb * 1e9))
    return min(limits, default=None)


def abstract_run(
    config: config_dict.ConfigDict, device: Any, state_budget: int | None = None
) -> AbstractRun:
    """Builds what `train` builds, from shapes alone.

    Args:
        config: a whole configuration; data are not needed.
        device: a `jax.Device`, or what stands for one (`GpuTarget.device`).
        state_budget: bytes of optimizer state on the device; None: all of it.

    Raises:
        ConfigError: a field cannot be used.
        UserError: the model's shape is nowhere to be found.
    """
    model = abstract_trained(config, device)
    shape = model.config
    graphdef, lora, frozen = split_model(model)
    tx, _ = build_optimizer(config, config.train.steps or 2**20, state_budget)
    state = eval_placed(lambda lora: init_state(lora, tx, config.seed), lora)
    family = family_of(shape, config)
    step = make_train_step(graphdef, tx, loss_fn=family.loss)
    return AbstractRun(shape, step, state, frozen, abstract_batch(config, family))


def abstract_trained(config: config_dict.ConfigDict, device: Any) -> Model:
    """The model that `train` would build, with its adapters and without values.

    Arguments and errors are those of `abstract_run`.
    """
    config_lib.validate(config)
    spec = config.model.path
    said = model_config(spec)
    if said is None:
        shape = read_config(open_checkpoint(resolve_path(spec, kind="model")))
    else:
        shape = read_shape(said)
    dtype, _ = choose_compute_dtype(config.model.compute_dtype, device)
    options = model_options(config, device)
    model = abstract_model(shape, dtype=dtype, param_dtype=dtype, **options)
    if packed := said_formats(said or {}, model):
        model = quantize_as(model, packed)
    return adapt_model(model, config, quantize=not packed)


def abstract_batch(
    config: config_dict.ConfigDict, family: Family, length: int | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """A step's batch of rows of `length` tokens (None: the longest), without values."""
    train = config.train
    widths = family.widths(length or config.data.max_len)
    return {
        name: jax.ShapeDtypeStruct((train.grad_accum, train.batch_size, width), jnp.int32)
        for name, width in widths.items()
    }


def fit_state(compile_step: Callable[[int | None], Fit], budget: int | None) -> Fit:
    """Compiles a step with as much of the optimizer's state on the device as fits.

    Args:
        compile_step: compiles it for so many bytes of state on the device (None: all).
        budget: device memory in bytes; None: no limit is known.

    Returns:
        The step with the most state on the device, or, where none fits, with the least.
    """
    everything = compile_step(None)
    if budget is None or everything.peak_bytes <= budget:
        return everything
    nothing = compile_step(0)
    room = budget - nothing.peak_bytes
    if room < _LEAST_ROOM:
        return nothing
    some = compile_step(room)
    return some if some.peak_bytes <= budget else nothing


def smaller_settings(config: config_dict.ConfigDict) -> Iterator[dict[str, Any]]:
    """Settings that need less and less memory.

    First those that leave the result of a step as it is and cost time: recomputation, smaller
    microbatches, the layers' inputs in the host's memory, long rows in chunks. Then the precision
    of the adapters and of the vocabulary, then fewer rows a step, and at last shorter rows.
    """
    changes: dict[str, Any] = {}
    is_decoder = not config.data.source_max_len
    length = config.data.max_len
    if config.model.remat not in ("auto", "full", "offload"):
        changes["model.remat"] = "full"
        yield dict(changes)
    if config.train.batch_size > 1:
        changes["train.batch_size"] = 1
        changes["train.grad_accum"] = config.train.grad_accum * config.train.batch_size
        yield dict(changes)
    if config.model.remat != "offload":
        changes["model.remat"] = "offload"
        yield dict(changes)
    if is_decoder and length > _CHUNK and not 0 < config.model.sequence_chunk <= _CHUNK:
        changes["model.sequence_chunk"] = _CHUNK
        yield dict(changes)
    if config.lora.dtype == "float32":
        changes["lora.dtype"] = "bfloat16"
        yield dict(changes)
    if config.model.vocab_quant_type == "none":
        changes["model.vocab_quant_type"] = "int8"
        yield dict(changes)
    if config.train.grad_accum * config.train.batch_size > 1:
        changes["train.grad_accum"] = 1  # without a second tree of gradients
        yield dict(changes)
    while length > 256 and is_decoder:  # else max_len must hold both parts
        length //= 2
        changes["data.max_len"] = length
        yield dict(changes)


def find_settings(
    config: config_dict.ConfigDict,
    compile_run: Callable[[config_dict.ConfigDict, int | None], Fit],
    budget: int,
    host_budget: float = math.inf,
) -> dict[str, Any]:
    """The first of `smaller_settings` that fits, compiled; empty where none does.

    Args:
        config: of the run that does not fit.
        compile_run: compiles a configuration's step, as `fit_state` wants it.
        budget: device memory in bytes.
        host_budget: the host's pinned memory in bytes.
    """
    instead: dict[str, Any] = {}
    for changes in smaller_settings(config):
        changes |= instead
        other = config.copy_and_resolve_references()
        other.update_from_flattened_dict(changes)
        fit = compile_run(other, 0)
        if fit.host_bytes <= host_budget:
            if fit.peak_bytes <= budget:
                return changes
        elif changes.get("model.remat") == "offload":  # then what comes after it does without
            instead["model.remat"] = "full"
    return {}


def as_flags(changes: dict[str, Any]) -> str:
    """Settings as they are given on a command line.

    >>> as_flags({"train.batch_size": 1, "lora.dtype": "bfloat16"})
    '--config.train.batch_size=1 --config.lora.dtype=bfloat16'
    """
    return " ".join(f"--config.{field}={value}" for field, value in changes.items())
