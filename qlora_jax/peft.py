"""LoRA and DoRA adapters of PEFT, in both directions and without torch.

PEFT keeps A [r, in] and B [out, r] of every layer by itself; here the layers of a projection are
one stack, A [L, in, r] and B [L, r, out] with one alpha. So projections may differ in rank and
alpha, and where the layers of *one* projection do (PEFT's `rank_pattern`, `alpha_pattern`,
`layers_to_transform`), smaller ranks are filled up with zeros, which adds exact zeros, layers
without an adapter are all zeros, and what a layer's scaling differs by from the stack's is
multiplied into its B. The result is the same function, but for the rounding of that product to
float32.
"""

from __future__ import annotations

import itertools
import math
import pathlib
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from qlora_jax.errors import ConfigError
from qlora_jax.files import resolve_path
from qlora_jax.flax_nnx import apply_qlora
from qlora_jax.linear_layers import linear_layers
from qlora_jax.lora import lora_scaling
from qlora_jax.models.t5 import T5
from qlora_jax.nnx_linear import QLoRALinear
from qlora_jax.peft_layers import Layer, PeftStack, layers_of, peft_stacks
from qlora_jax.weights.peft import open_adapter, read_adapter_tensor, tensor_names, write_adapter
from qlora_jax.weights.peft_config import PeftConfig
from qlora_jax.weights.safetensors_header import Entry

Entries = Mapping[str, tuple[Entry, ...]]


def load_adapter(model: nnx.Module, path: str | pathlib.Path) -> nnx.Module:
    """A copy of a model with the LoRA adapter of a PEFT folder on it.

    Args:
      model: of `load_model`, in 4 bits or not, without adapters; it stays as it is.
      path: a folder with `adapter_config.json` and `adapter_model.safetensors`.

    Returns:
      The model in evaluation mode. Adapters have the dtype that they have in the file, float32
      where a difference in scaling was multiplied in, and the dropout of the file (which
      `model.train()` switches on).

    Raises:
      UserError: there is nothing at `path`.
      ConfigError: the model has adapters already, or is of no family that PEFT has names for.
      WeightsError: the adapter is not LoRA or DoRA (other methods, whole layers, biases), is a
        pickle, is damaged, or does not fit the model.

    Example:
      >>> model = load_adapter(model, "my-adapter")  # doctest: +SKIP
    """
    folder = resolve_path(str(path))
    modules = linear_layers(model)
    if adapted := [place for place, linear in modules.items() if linear.rank]:
        raise ConfigError(
            f"the model has adapters already ({', '.join(adapted)}), and a second one cannot "
            "be put on top; load the model anew, or merge them first (merge_model)."
        )
    layers = {place: layers_of(model, place, linear) for place, linear in modules.items()}
    sizes = {
        layer.name: (modules[place].in_features, layer.rows(modules[place].out_features))
        for place in modules
        for layer in layers[place]
    }
    config, entries = open_adapter(folder, sizes)
    stacks = {
        place: _read_stack(layers[place], linear, config, entries)
        for place, linear in modules.items()
        if any(layer.name in entries for layer in layers[place])
    }
    groups = defaultdict(list)
    for place, stack in stacks.items():
        groups[stack.rank, stack.alpha].append(place)
    rngs = nnx.Rngs(0)
    for (rank, alpha), paths in groups.items():
        model = apply_qlora(
            model,
            where="|".join(re.escape(place) for place in paths),
            rank=rank,
            alpha=alpha,
            dropout=config.dropout,
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
            quant_type=None,
            rngs=rngs,
        )
    for place, linear in linear_layers(model).items():
        if place in stacks:
            linear.lora_a = nnx.LoRAParam(jnp.asarray(stacks[place].a))
            linear.lora_b = nnx.LoRAParam(jnp.asarray(stacks[place].b))
            if config.use_dora:
                start = linear.lora_magnitude.get_value()
                magnitudes = _read_magnitudes(layers[place], np.asarray(start), entries)
                linear.lora_magnitude = nnx.LoRAParam(jnp.asarray(magnitudes))
    model.eval()
    return model


def save_adapter(model: nnx.Module, path: str | pathlib.Path, *, base_model: str) -> pathlib.Path:
    """Writes the adapters of a model as `peft.PeftModel.from_pretrained` reads them.

    Of a run that took something out of its base (PiSSA, OLoRA, LoftQ of several iterations) it
    writes the equivalent plain adapter of twice the rank for the original base, as PEFT's
    `save_pretrained(path_initial_model_for_weight_conversion=...)` does. It is exact for the base
    in 16 bits; in 4 bits the original base is rounded to other values than the run's was.

    Args:
      model: with adapters, of `load_trained`, `load_adapter`, or `apply_qlora` on one of
        `load_model`.
      path: a new folder; it is there whole or not at all.
      base_model: what the adapter belongs on, a name on the Hugging Face Hub or a folder; PEFT's
        `base_model_name_or_path`.

    Returns:
      `path`.

    Raises:
      ConfigError: the model has no adapter, one in a layer that PEFT has no name for, DoRA in
        some layers only, or in a T5 layers of one name and different ranks.
      WeightsError: the folder is not empty or cannot be written; an adapter holds NaN or infinity.

    Example:
      >>> save_adapter(model, "my-adapter", base_model="owner/name")  # doctest: +SKIP
    """
    folder = pathlib.Path(path).expanduser()
    adapted = {place: linear for place, linear in linear_layers(model).items() if linear.rank}
    if not adapted:
        raise ConfigError(
            "the model has no adapter, so there is nothing to write; give one that apply_qlora, "
            "load_adapter or load_trained returned."
        )
    stacks = peft_stacks(model, adapted)
    config = _peft_config(adapted, stacks) | {"base_model_name_or_path": base_model}
    if isinstance(model, T5):
        config |= {"task_type": "SEQ_2_SEQ_LM"} | _t5_targets(model, adapted, stacks)
    tensors: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    values: dict[str, Callable[[], Any]] = {}
    for stack in stacks:
        for layer, module in enumerate(stack.names):
            index = (layer,) if stack.arrays[0].ndim > 2 else ()
            file_names = tensor_names(module, config["use_dora"])
            for name, array in zip(file_names, stack.arrays, strict=True):
                tensors[name] = array.shape[len(index) :][::-1], np.dtype(array.dtype)
                values[name] = lambda array=array, index=index: np.asarray(array[index]).T
    write_adapter(folder, config, tensors, lambda name: values[name]())
    return folder


class _Stack(NamedTuple):
    """The adapter of all layers of a projection."""

    a: np.ndarray
    b: np.ndarray
    rank: int
    alpha: float


def _read_stack(
    layers: list[Layer], linear: QLoRALinear, config: PeftConfig, entries: Entries
) -> _Stack:
    """Reads the layers of one projection into one array; see the module."""
    held = [layer.name for layer in layers if layer.name in entries]
    ranks = {name: config.rank_of(name) for name in held}
    scalings = {
        name: lora_scaling(ranks[name], config.alpha_of(name), config.use_rslora) for name in held
    }
    rank, alpha = max(ranks.values()), config.alpha_of(held[0])
    scaling = max(scalings.values(), key=abs)
    if set(scalings.values()) != {lora_scaling(rank, alpha, config.use_rslora)}:
        alpha = scaling * (math.sqrt(rank) if config.use_rslora else rank)
    dtypes = [jnp.result_type(*(entries[name][i].dtype for name in held)) for i in (0, 1)]
    if len(set(scalings.values())) > 1:
        dtypes[1] = np.float32
    a = np.zeros((len(layers), linear.in_features, rank), dtypes[0])
    b = np.zeros((len(layers), rank, linear.out_features), dtypes[1])
    for index, layer in enumerate(layers):
        if (name := layer.name) not in entries:
            continue
        name_a, name_b = tensor_names(name)
        a[index, :, : ranks[name]] = read_adapter_tensor(entries[name][0], name_a).T
        value = layer.take(read_adapter_tensor(entries[name][1], name_b)).T
        if scalings[name] != scaling:
            value = value.astype(np.float32) * np.float32(scalings[name] / scaling)
        b[index, : ranks[name]] = value
    leading = linear.leading_shape
    return _Stack(a.reshape(*leading, *a.shape[1:]), b.reshape(*leading, *b.shape[1:]), rank, alpha)


def _read_magnitudes(layers: list[Layer], start: np.ndarray, entries: Entries) -> np.ndarray:
    """The magnitudes of one projection; those of its base, `start`, where a layer has none."""
    held = {index: layer for index, layer in enumerate(layers) if layer.name in entries}
    dtypes = [entries[layer.name][2].dtype for layer in held.values()]
    # A rounded norm is none: a layer without an adapter would change.
    dtypes += [np.float32] * (len(held) < len(layers))
    magnitudes = start.reshape(len(layers), -1).astype(jnp.result_type(*dtypes))
    for index, layer in held.items():
        name = tensor_names(layer.name, True)[2]
        magnitudes[index] = layer.take(read_adapter_tensor(entries[layer.name][2], name))
    return magnitudes.reshape(start.shape)


def _peft_config(adapted: Mapping[str, QLoRALinear], stacks: Sequence[PeftStack]) -> dict[str, Any]:
    """The `adapter_config.json`; what most projections share is the default of its patterns."""
    rsloras = {stack.use_rslora for stack in stacks}
    use_rslora = rsloras == {True}
    doras = {linear.lora_magnitude is not None: path for path, linear in adapted.items()}
    if len(doras) > 1:
        raise ConfigError(
            f"{doras[True]} has an adapter of DoRA and {doras[False]} one of LoRA, which one PEFT "
            "adapter cannot hold; give all of them magnitudes (QLoRALinear.add_magnitude)."
        )
    ranks, alphas = {}, {}
    for stack in stacks:
        name, alpha = stack.last_name, stack.alpha
        if stack.use_rslora and not use_rslora:  # mixed: each says its scaling as alpha / rank
            alpha = lora_scaling(stack.rank, alpha, True) * stack.rank
        ranks[name], alphas[name] = stack.rank, int(alpha) if alpha == int(alpha) else alpha
    rank, alpha = (max(d.values(), key=list(d.values()).count) for d in (ranks, alphas))
    return {
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": max(stack.dropout for stack in stacks),
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "target_modules": sorted(ranks),
        "task_type": "CAUSAL_LM",
        "use_dora": True in doras,
        "use_rslora": use_rslora,
    }


def _t5_targets(
    model: nnx.Module, adapted: Mapping[str, QLoRALinear], stacks: Sequence[PeftStack]
) -> dict[str, Any]:
    """What tells the adapted layers of a T5 from others of the same name.

    Encoder, decoder and cross-attention have a `q` each. Where only some of them are adapted, PEFT
    is given whole names; where they differ in rank or alpha, this project's patterns would not do.
    """
    names = {stack.last_name for stack in stacks}
    if len({(stack.last_name, stack.rank, stack.alpha) for stack in stacks}) > len(names):
        raise ConfigError(
            "layers of one name (q, wo, ...) differ in rank or alpha between encoder, decoder and "
            "cross-attention, which cannot be written; give them the same."
        )
    others = {place.rpartition("/")[2] for place in linear_layers(model) if place not in adapted}
    if others.isdisjoint(names):
        return {}
    return {"target_modules": sorted(itertools.chain(*(stack.names for stack in stacks)))}
