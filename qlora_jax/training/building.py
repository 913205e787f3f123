"""What a configuration stands for: the dtype, the model with its adapters, the optimizer."""

from __future__ import annotations

import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from ml_collections import config_dict

from pallas_kernels.devices import cpu_multiplies_bfloat16
from qlora_jax import hub
from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.errors import ConfigError, WeightsError
from qlora_jax.files import resolve_path
from qlora_jax.flax_nnx import apply_qlora
from qlora_jax.guarded_files import read_json_object
from qlora_jax.layer_formats import packed_linears
from qlora_jax.loading import (
    base_fingerprint,
    load_model,
    read_config,
    read_hf_tokenizer,
    read_tokenizer,
    stored_fingerprint,
)
from qlora_jax.lora import lora_scaling
from qlora_jax.models.kinds import Shape, read_shape
from qlora_jax.optim import make_optimizer, make_schedule
from qlora_jax.subtraction import (
    SUBTRACTED_FILE,
    InitFromWeights,
    Prepare,
    Subtract,
    read_subtracted,
    set_adapters,
    write_subtracted,
)
from qlora_jax.training.data import with_chat_format
from qlora_jax.vocabulary import quantize_vocabulary
from qlora_jax.weights import Checkpoint, PackedFormat, StackedCheckpoint, open_checkpoint
from qlora_jax.weights.packed import all_kinds


def choose_compute_dtype(name: str, device: jax.Device) -> tuple[np.dtype, str]:
    """The dtype that activations and matrix products have, and why.

    Args:
        name: a dtype, or "auto": what the device multiplies fast.
        device: that the run is on.

    Raises:
        ConfigError: the device cannot multiply in this dtype.

    >>> choose_compute_dtype("float32", jax.devices("cpu")[0])
    (dtype('float32'), 'as configured')
    """
    capability = str(getattr(device, "compute_capability", ""))
    is_old = capability.replace(".", "").isdigit() and float(capability) < 8.0
    if name == "bfloat16" and is_old:
        raise ConfigError(
            f"model.compute_dtype: got 'bfloat16', and GPUs older than sm_80 (this one is "
            f"sm_{capability.replace('.', '')}) do not multiply in it; use 'auto' or 'float16'"
        )
    if name != "auto":
        return jnp.dtype(name), "as configured"
    if device.platform == "cpu":
        if cpu_multiplies_bfloat16():
            return jnp.dtype(jnp.bfloat16), "this CPU has matrix instructions for it"
        return jnp.dtype(jnp.float32), "this CPU has no matrix instructions for bfloat16"
    if is_old:
        return jnp.dtype(jnp.float16), "this GPU is older than sm_80 and has no fast bfloat16"
    return jnp.dtype(jnp.bfloat16), "what this device has matrix units for"


def choose_remat(name: str, device: jax.Device) -> str:
    """What the backward pass recomputes.

    "auto" recomputes whole layers, which needs least memory, but on a CPU keeps the outputs of the
    linear layers: there, time is scarcer than memory.

    >>> choose_remat("auto", jax.devices("cpu")[0]), choose_remat("none", jax.devices("cpu")[0])
    ('projections', 'none')
    """
    if name != "auto":
        return name
    return "projections" if device.platform == "cpu" else "full"


def model_options(config: config_dict.ConfigDict, device: jax.Device) -> dict[str, Any]:
    """How a model is computed, as arguments of `Llama` and `T5`."""
    return dict(
        remat=choose_remat(config.model.remat, device), sequence_chunk=config.model.sequence_chunk
    )


class Base(NamedTuple):
    """What is known of a model before its weights are read.

    Attributes:
        shape: of the model.
        tokenizer: with the chat format of the data.
    """

    shape: Shape
    tokenizer: Tokenizer


def describe_base(config: config_dict.ConfigDict) -> Base:
    """Reads what takes no time, whatever the size of the model.

    Of a name on the Hugging Face Hub the weights are not fetched yet, and so their format is not
    looked at.

    Args:
        config: a whole configuration.

    Raises:
        UserError: there is no such model.
        ConfigError: the model is in 4 bits already, in another format than the configuration says.
        WeightsError: its configuration or tokenizer cannot be read.
    """
    folder = hub.find_name(config.model.path) and resolve_path(config.model.path, kind="tokenizer")
    if folder and folder.is_dir():
        said = read_json_object(folder / "config.json")
        shape, tokenizer = read_shape(said), read_hf_tokenizer(folder, said)
    else:
        checkpoint = _open(config)
        shape, tokenizer = read_config(checkpoint), read_tokenizer(checkpoint)
    return Base(shape, with_chat_format(tokenizer, config))


def build_model(
    config: config_dict.ConfigDict,
    *,
    dtype: np.dtype,
    workdir: pathlib.Path | None = None,
    again: bool = False,
) -> tuple[nnx.Module, Tokenizer, str]:
    """Loads the base in 4 bits and puts new adapters on it.

    Args:
        config: a whole configuration.
        dtype: compute dtype.
        workdir: of the run, where what the initialisation takes out of the base is kept; None: it
            is not.
        again: whether the adapters of a checkpoint will take the place of the new ones: then these
            are not computed, and the base is made again as it was.

    Returns:
        The model in training mode, its tokenizer with the chat format of the data, and the base's
        fingerprint.

    Raises:
        ConfigError: the model is in 4 bits already, in another format than the configuration says.
        WeightsError: the model cannot be read, or is not what was once quantized.
    """
    checkpoint = _open(config)
    options = model_options(config, jax.devices()[0])
    file = workdir and workdir / SUBTRACTED_FILE
    prepare = _prepare(config, file if again else None)
    model, tokenizer = load_model(
        config.model.path,
        dtype=dtype,
        prepare=prepare,
        **options,
        vocab_quant_type=config.model.vocab_quant_type,
        **_quantization(config),
    )
    fingerprint = base_fingerprint(model)
    if isinstance(checkpoint, StackedCheckpoint) and dtype != jnp.float16:
        small = config.model.vocab_quant_type != "none"
        stored = stored_fingerprint(model, checkpoint) if small else fingerprint
        if stored != checkpoint.fingerprint:
            raise WeightsError(
                f"{config.model.path} has the fingerprint {stored}, and had "
                f"{checkpoint.fingerprint} when it was quantized: it is damaged. Quantize the "
                "original model again."
            )
    model = adapt_model(model, config, quantize=False)
    if isinstance(prepare, InitFromWeights):
        set_adapters(model, prepare.adapters)
        if file and prepare.subtracted:
            write_subtracted(file, prepare.subtracted)
    return model, with_chat_format(tokenizer, config), fingerprint


def _prepare(config: config_dict.ConfigDict, file: pathlib.Path | None) -> Prepare | None:
    """What happens to each weight before it is quantized; with a file, what did once."""
    lora = config.lora
    if lora.init == "default":
        return None
    if file is None:
        return InitFromWeights(
            lora.init,
            rank=lora.rank,
            alpha=lora.alpha,
            use_rslora=lora.use_rslora,
            dtype=jnp.dtype(lora.dtype),
            loftq_iterations=lora.loftq_iterations,
        )
    if lora.init == "loftq" and lora.loftq_iterations == 1:
        return None
    return Subtract(read_subtracted(file), lora_scaling(lora.rank, lora.alpha, lora.use_rslora))


def _open(config: config_dict.ConfigDict) -> Checkpoint:
    """Holds the configuration, which goes into a run's records, to what a packed model is."""
    checkpoint = open_checkpoint(resolve_path(config.model.path, kind="model"))
    found = all_kinds(packed_linears(checkpoint).values())
    fields = config.model.quant_type, config.model.block_size, config.model.double_quant
    asked = PackedFormat(*fields)
    if found and asked not in found:
        kind = min(found)
        flags = " ".join(f"--config.model.{k}={v}".lower() for k, v in kind._asdict().items())
        raise ConfigError(
            f"{config.model.path} is in 4 bits already ({kind}), and the configuration says "
            f"{asked}; add {flags} to train on it as it is, or give the 16-bit model"
        )
    return checkpoint


def _quantization(config: config_dict.ConfigDict) -> dict[str, Any]:
    return dict(
        where=config.lora.where,
        quant_type=config.model.quant_type,
        block_size=config.model.block_size,
        double_quant=config.model.double_quant,
    )


def adapt_model(
    model: nnx.Module, config: config_dict.ConfigDict, *, quantize: bool = True
) -> nnx.Module:
    """Puts new adapters on a base, quantizing it where it is not yet.

    Args:
        model: also one without values (`nnx.eval_shape`).
        config: a whole configuration.
        quantize: False leaves layers in 16 bits that are so in the model.

    Returns:
        The model in training mode.
    """
    quantization = _quantization(config)
    if not quantize:
        quantization["quant_type"] = None
    if config.model.vocab_quant_type == "int8":
        model = quantize_vocabulary(model)
    model = apply_qlora(
        model,
        rank=config.lora.rank,
        alpha=config.lora.alpha,
        dropout=config.lora.dropout,
        use_rslora=config.lora.use_rslora,
        use_dora=config.lora.use_dora,
        lora_dtype=jnp.dtype(config.lora.dtype),
        rngs=nnx.Rngs(config.seed),
        **quantization,
    )
    model.train()
    return model


def split_model(model: nnx.Module) -> tuple[nnx.GraphDef, dict[str, Any], nnx.State]:
    """Graph definition, the trainable tree as nested dicts of arrays, and everything frozen.

    >>> split_model(nnx.LoRA(4, 2, 3, rngs=nnx.Rngs(0)))[1]["lora_a"].shape
    (4, 2)
    """
    graphdef, lora, frozen = nnx.split(model, nnx.LoRAParam, ...)
    return graphdef, nnx.to_pure_dict(lora), frozen


def build_optimizer(
    config: config_dict.ConfigDict, total_steps: int, state_budget: int | None = None
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer of a configuration, and its learning rate by step (counted from 0).

    Args:
        config: a whole configuration.
        total_steps: of the run.
        state_budget: bytes of the optimizer's state on the device; None: all of it.
    """
    recipe = config.optimizer
    schedule = make_schedule(
        recipe.learning_rate,
        schedule=recipe.schedule,
        warmup_steps=recipe.warmup_steps,
        total_steps=total_steps,
    )
    tx = make_optimizer(
        schedule,
        name=recipe.name,
        b1=recipe.b1,
        b2=recipe.b2,
        eps=recipe.eps,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        state_budget=state_budget,
    )
    return tx, schedule
