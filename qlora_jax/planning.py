"""What a run needs, and whether a GPU has it, before there is one.

XLA plans the memory of a program when it compiles it, to the byte. So the training step of a
configuration, the same function that `train.py` runs, is compiled on abstract arrays for the GPU in
question, on any CPU, and its plan is read:

    peak = arguments + temporaries + outputs - what outputs share with arguments (donation)

The arguments are known one by one (base, adapters, moments, batch), the temporaries are gradients,
stored activations and one decoded weight. The time of a step is not measured here: `seconds` is a
roofline, the least that arithmetic and memory traffic can take together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import PyTree
from ml_collections import config_dict

from qlora_jax import config as config_lib
from qlora_jax.files import resolve_path
from qlora_jax.loading import read_config
from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.llama import Llama
from qlora_jax.models.shapes import model_shape
from qlora_jax.report import ModelSize, measure
from qlora_jax.targets import CompiledFor, GpuTarget, compile_for, find_target
from qlora_jax.training.building import (
    adapt_model,
    build_loss,
    build_optimizer,
    choose_compute_dtype,
    choose_remat,
    model_options,
    split_model,
)
from qlora_jax.training.step import TrainState, init_state, make_train_step
from qlora_jax.weights import open_checkpoint

# What the driver, the CUDA context and the libraries' handles take of a card: an assumption.
CONTEXT_BYTES = 768 << 20
# Products of 16-bit matrices with float32 sums, floating-point operations a clock and
# multiprocessor, dense, from NVIDIA's data sheets (GeForce cards run at half the rate).
_TENSOR_FLOPS = {
    "t4": 1024,
    "rtx3090": 512,
    "rtx4090": 512,
    "a6000": 1024,
    "l4": 1024,
    "l40s": 1024,
    "a100_40gb": 2048,
    "a100_80gb": 2048,
    "h100": 4096,
    "h200": 4096,
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """The memory of one training step on one GPU.

    Attributes:
        device: name of the target.
        peak_bytes: device memory that the step needs.
        host_bytes: pinned memory of the host.
        budget_bytes: the device's memory less `CONTEXT_BYTES`.
        verdict: `"fits"` or `"does not fit"`.
        parts: bytes on the device by what they are; they add up to `peak_bytes`.
        flops: floating-point operations of a step.
        traffic_bytes: device memory read and written in a step, at least.
        seconds: a roofline of a step's time; an estimate.
        changes: fields of the configuration with which it would fit, each set compiled; only where
            it does not fit.
    """

    device: str
    peak_bytes: int
    host_bytes: int
    budget_bytes: int
    verdict: str
    parts: dict[str, int]
    flops: int
    traffic_bytes: int
    seconds: float
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def fits(self) -> bool:
        """Whether the run can be done."""
        return self.peak_bytes <= self.budget_bytes


@dataclasses.dataclass(frozen=True)
class AbstractRun:
    """A configuration's training step and its arguments, without values.

    Attributes:
        shape: of the model.
        step: as `make_train_step` gives it.
        state: trainable parameters, moments, key.
        frozen: the base.
        batch: int32 [grad_accum, batch_size, max_len] each.
    """

    shape: LlamaConfig
    step: Any
    state: TrainState
    frozen: nnx.State
    batch: dict[str, jax.ShapeDtypeStruct]


def plan(config: config_dict.ConfigDict, device: str = "h100", *, suggest: bool = True) -> Plan:
    """Compiles the training step of a configuration for a GPU, and says what it needs.

    Args:
        config: a whole configuration. Only `model.path` is looked at, and only for the model's
            shape: a name of `models.shapes.SHAPES`, a `config.json`, or a model on disk. Data are
            not needed.
        device: one of `targets.TARGETS`.
        suggest: where it does not fit, look for settings that do; each is compiled.

    Raises:
        ConfigError: a field cannot be used.
        TargetError: unknown device, or JAX's CUDA plugin is not installed.
        UserError: the model's shape is nowhere to be found.

    >>> plan(config, device="rtx4090").verdict  # doctest: +SKIP
    'fits'
    """
    target = find_target(device)
    run = abstract_run(config, target)
    found = _plan(config, run, compile_run(run, target), target)
    if found.fits or not suggest:
        return found
    for changes in _changes(config):
        other = config_dict.ConfigDict(config)
        other.update_from_flattened_dict(changes)
        run = abstract_run(other, target)
        if compile_run(run, target).peak_bytes <= found.budget_bytes:
            return dataclasses.replace(found, changes=changes)
    return found


def abstract_run(config: config_dict.ConfigDict, target: GpuTarget) -> AbstractRun:
    """Builds what `train` builds, from shapes alone."""
    config_lib.validate(config)
    spec, device = config.model.path, target.device
    shape = model_shape(spec) or read_config(open_checkpoint(resolve_path(spec, kind="model")))
    dtype, _ = choose_compute_dtype(config.model.compute_dtype, device)
    options = model_options(config, device)
    model = nnx.eval_shape(
        lambda: Llama(shape, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype, **options)
    )
    graphdef, lora, frozen = split_model(adapt_model(model, config))
    tx, _ = build_optimizer(config, config.train.steps or 2**20)
    state = jax.eval_shape(lambda lora: init_state(lora, tx, config.seed), lora)
    batch = jax.ShapeDtypeStruct(
        (config.train.grad_accum, config.train.batch_size, config.data.max_len), jnp.int32
    )
    names = ("tokens", "loss_mask", "segment_ids", "positions")
    step = make_train_step(graphdef, tx, loss_fn=build_loss(config))
    return AbstractRun(shape, step, state, frozen, dict.fromkeys(names, batch))


def compile_run(run: AbstractRun, target: GpuTarget) -> CompiledFor:
    """Compiles the step for a GPU."""
    return compile_for(run.step, run.state, run.frozen, run.batch, target=target)


def _plan(
    config: config_dict.ConfigDict, run: AbstractRun, compiled: CompiledFor, target: GpuTarget
) -> Plan:
    size = measure(run.state.lora, run.frozen)
    parts = {
        "base": size.quantized_bytes,
        "embeddings, norms, head": size.dense_bytes,
        "adapters": size.trainable_bytes,
        "moments": _bytes(run.state.opt_state),
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
    }
    peak = compiled.peak_bytes
    parts["batch and metrics"] = peak - sum(parts.values())
    budget = target.memory_bytes - CONTEXT_BYTES
    flops, traffic = _work(config, run, size, target)
    peak_flops = _TENSOR_FLOPS[target.name] * target.core_count * target.clock_ghz * 1e9
    return Plan(
        device=target.name,
        peak_bytes=peak,
        host_bytes=compiled.host_bytes,
        budget_bytes=budget,
        verdict="fits" if peak <= budget else "does not fit",
        parts=parts,
        flops=flops,
        traffic_bytes=traffic,
        seconds=flops / peak_flops + traffic / target.memory_bandwidth,
    )


def _bytes(tree: PyTree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _work(
    config: config_dict.ConfigDict, run: AbstractRun, size: ModelSize, target: GpuTarget
) -> tuple[int, int]:
    """Floating-point operations and bytes of a step, at least."""
    shape, batch = run.shape, run.batch["tokens"]
    microsteps, rows, length = batch.shape
    tokens = rows * length
    # Of the base's weights only the gradient to the input is taken. Full rematerialisation
    # multiplies once more.
    passes = 3 if choose_remat(config.model.remat, target.device) in ("full", "offload") else 2
    head = shape.vocab_size * shape.hidden_size
    linear = 2 * tokens * (passes * size.quantized + 2 * head + (passes + 2) * size.trainable)
    width = shape.num_attention_heads * shape.head_dim
    # Two products forward and five backward, of which the causal mask leaves half.
    attention = (passes - 1) * 2 + 5
    attention *= tokens * length * width * shape.num_hidden_layers
    # A weight is read in 4 bits, written in 16 and read again.
    decoded = passes * (size.quantized_bytes + 4 * size.quantized)
    moments = 2 * (_bytes(run.state.opt_state) + 2 * size.trainable_bytes)
    return microsteps * (linear + attention), microsteps * decoded + moments


def _changes(config: config_dict.ConfigDict) -> Iterator[dict[str, Any]]:
    """Settings that need less and less memory.

    First those that leave the result of a step as it is (recomputation, smaller microbatches), then
    the adapters' precision, then fewer rows a step, and at last shorter rows.
    """
    changes: dict[str, Any] = {}
    if config.model.remat not in ("auto", "full", "offload"):
        changes["model.remat"] = "full"
        yield dict(changes)
    if config.train.batch_size > 1:
        changes["train.batch_size"] = 1
        changes["train.grad_accum"] = config.train.grad_accum * config.train.batch_size
        yield dict(changes)
    if config.lora.dtype == "float32":
        changes["lora.dtype"] = "bfloat16"
        yield dict(changes)
    if config.train.grad_accum * config.train.batch_size > 1:
        changes["train.grad_accum"] = 1  # without a second tree of gradients
        yield dict(changes)
    length = config.data.max_len
    while length > 256:
        length //= 2
        changes["data.max_len"] = length
        yield dict(changes)
