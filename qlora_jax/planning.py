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
import functools
from typing import Any, NamedTuple

import jax
from flax import nnx
from ml_collections import config_dict

from qlora_jax.lora import is_quantized
from qlora_jax.memory_limits import CONTEXT_BYTES
from qlora_jax.models.t5_config import T5Config
from qlora_jax.placement import bytes_by_memory, tree_bytes
from qlora_jax.report import ModelSize, dense_linears, measure
from qlora_jax.targets import GpuTarget, compile_for, find_target
from qlora_jax.training import fitting
from qlora_jax.training.building import choose_remat
from qlora_jax.training.fitting import AbstractRun
from qlora_jax.tree import key_parts

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
# Bytes a second that a card reads from the host's memory and writes to it at the same time: its
# PCI Express bus, of the data sheets.
_HOST_LINK = {
    "t4": 15.75e9,
    "rtx3090": 31.5e9,
    "rtx4090": 31.5e9,
    "a6000": 31.5e9,
    "l4": 31.5e9,
    "l40s": 31.5e9,
    "a100_40gb": 31.5e9,
    "a100_80gb": 31.5e9,
    "h100": 63e9,
    "h200": 63e9,
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """The memory of one training step on one GPU.

    Attributes:
        device: name of the target.
        peak_bytes: device memory that the step needs.
        host_bytes: pinned memory of the host.
        budget_bytes: the device's memory less `CONTEXT_BYTES`, or `optimizer.device_budget_gb`.
        verdict: `"fits"`, `"fits with paging"` (some of the optimizer's state lies in the host's
            memory) or `"does not fit"`.
        parts: bytes on the device by what they are; they add up to `peak_bytes`.
        host_parts: likewise, of `host_bytes`.
        flops: floating-point operations of a step.
        traffic_bytes: device memory read and written in a step, at least.
        seconds: a roofline of a step's time; an estimate.
        paging_seconds: the part of it in which optimizer state comes from the host and goes back.
        changes: fields of the configuration with which it would fit, each set compiled; only where
            it does not fit.
    """

    device: str
    peak_bytes: int
    host_bytes: int
    budget_bytes: int
    verdict: str
    parts: dict[str, int]
    host_parts: dict[str, int]
    flops: int
    traffic_bytes: int
    seconds: float
    paging_seconds: float
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def fits(self) -> bool:
        """Whether the run can be done."""
        return self.peak_bytes <= self.budget_bytes


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
    budget = fitting.device_budget(config, target.memory_bytes - CONTEXT_BYTES)
    compiler = functools.partial(compile_run, target=target)
    fit = fitting.fit_state(functools.partial(compiler, config), budget)
    found = _plan(config, fit, target, budget)
    if found.fits or not suggest:
        return found
    return dataclasses.replace(found, changes=fitting.find_settings(config, compiler, budget))


def abstract_run(
    config: config_dict.ConfigDict, target: GpuTarget, state_budget: int | None = None
) -> AbstractRun:
    """What `train` would build on that GPU, see `fitting.abstract_run`."""
    return fitting.abstract_run(config, target.device, state_budget)


def compile_run(
    config: config_dict.ConfigDict, state_budget: int | None = None, *, target: GpuTarget
) -> fitting.Fit:
    """Compiles a configuration's step for a GPU.

    Args:
        config: a whole configuration.
        state_budget: bytes of optimizer state on the device; None: all of it.
        target: the GPU.
    """
    run = abstract_run(config, target, state_budget)
    compiled = compile_for(run.step, run.state, run.frozen, run.batch, target=target)
    return fitting.Fit.of(compiled, state_budget, run.state)


def _plan(config: config_dict.ConfigDict, fit: fitting.Fit, target: GpuTarget, budget: int) -> Plan:
    run = abstract_run(config, target)
    size = measure(run.state.lora, run.frozen)
    left = dense_linears(run.frozen).nbytes
    moments = bytes_by_memory(fit.state.opt_state)
    parts = {
        "base": size.quantized_bytes,
        **({"linear layers not in 4 bits": left} if left else {}),
        "embeddings, norms, head": size.dense_bytes - left,
        "adapters": size.trainable_bytes,
        "optimizer state": moments["device"],
        "temporaries": fit.compiled.memory_analysis().temp_size_in_bytes,
    }
    parts["batch and metrics"] = fit.peak_bytes - sum(parts.values())
    host = {"optimizer state": moments["pinned_host"]}
    host["activations"] = fit.host_bytes - sum(host.values())
    flops, traffic = _work(config, run, size, target)
    # In both directions at a time, with next to nothing to compute meanwhile.
    paging = moments["pinned_host"] / _HOST_LINK[target.name]
    fits = "fits with paging" if moments["pinned_host"] else "fits"
    return Plan(
        device=target.name,
        peak_bytes=fit.peak_bytes,
        host_bytes=fit.host_bytes,
        budget_bytes=budget,
        verdict=fits if fit.peak_bytes <= budget else "does not fit",
        parts=parts,
        host_parts=host,
        flops=flops,
        traffic_bytes=traffic,
        seconds=flops / tensor_flops(target) + traffic / target.memory_bandwidth + paging,
        paging_seconds=paging,
    )


def tensor_flops(target: GpuTarget) -> float:
    """Floating-point operations a second of products of 16-bit matrices, at most."""
    return _TENSOR_FLOPS[target.name] * target.core_count * target.clock_ghz * 1e9


def _work(
    config: config_dict.ConfigDict, run: AbstractRun, size: ModelSize, target: GpuTarget
) -> tuple[int, int]:
    """Floating-point operations and bytes of a step, at least."""
    microsteps, rows, length = run.batch["tokens"].shape
    # Of the base's weights only the gradient to the input is taken. Full rematerialisation
    # multiplies once more.
    passes = 3 if choose_remat(config.model.remat, target.device) in ("full", "offload") else 2
    count = _count_products(run, size)
    linear = 2 * rows * (passes * count.frozen + (passes + 2) * count.trainable)
    linear += 2 * rows * length * 2 * count.head
    # Two products forward and five backward.
    attention = ((passes - 1) * 2 + 5) * 2 * rows * count.attention
    # A weight is read in 4 bits, written in 16 and read again.
    decoded = passes * (size.quantized_bytes + 4 * size.quantized)
    decoded += passes * dense_linears(run.frozen).nbytes
    moments = 2 * (tree_bytes(run.state.opt_state) + 2 * size.trainable_bytes)
    return int(microsteps * (linear + attention)), microsteps * decoded + moments


class _Products(NamedTuple):
    """Multiplications of one row: `frozen` and `trainable` weights each with the tokens that meet
    them, the `head` for one token, and one of the products of `attention`."""

    frozen: float
    trainable: float
    head: int
    attention: float


def _count_products(run: AbstractRun, size: ModelSize) -> _Products:
    shape, length = run.shape, run.batch["tokens"].shape[-1]
    if not isinstance(shape, T5Config):
        width = shape.num_attention_heads * shape.head_dim * shape.num_hidden_layers
        head = shape.vocab_size * shape.hidden_size
        # The causal mask leaves half of the places.
        attention = length**2 * width / 2
        frozen = length * (size.quantized + dense_linears(run.frozen).parameters)
        return _Products(frozen, length * size.trainable, head, attention)
    source, width = run.batch["source_tokens"].shape[-1], shape.num_heads * shape.d_kv

    def meet(path: tuple[Any, ...], weights: int) -> int:
        """The encoder's weights meet the source, as do those that make its keys and values."""
        reads_source = "encoder" in path or ("cross_attn" in path and {"k", "v"} & {*path})
        return weights * (source if reads_source else length)

    frozen = {path: leaf.get_value() for path, leaf in nnx.to_flat_state(run.frozen)}
    lora, _ = jax.tree.flatten_with_path(run.state.lora)
    places = source**2 * shape.num_layers
    places += (length**2 / 2 + length * source) * shape.num_decoder_layers
    return _Products(
        frozen=sum(meet(path, q.size) for path, q in frozen.items() if is_quantized(q)),
        trainable=sum(meet(key_parts(path), leaf.size) for path, leaf in lora),
        head=shape.vocab_size * shape.d_model,
        attention=places * width,
    )
