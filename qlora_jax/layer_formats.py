"""Which linear layers a checkpoint has in 4 bits, and a model that has the same."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from flax import nnx

from qlora_jax.errors import WeightsError
from qlora_jax.flax_nnx import quantize_model
from qlora_jax.models.kinds import Model
from qlora_jax.models.llama import Llama
from qlora_jax.nnx_linear import MixedParam
from qlora_jax.tree import join_path
from qlora_jax.weights import Checkpoint, PackedFormat, Slot, StackedCheckpoint
from qlora_jax.weights.names import find_slot, naming_of, tensor_name
from qlora_jax.weights.packed import MixedFormat, all_kinds


def packed_linears(checkpoint: Checkpoint) -> dict[str, PackedFormat | MixedFormat]:
    """The linear layers that a checkpoint has in 4 bits, at least in some layers.

    Args:
      checkpoint: an open model.

    Returns:
      The format of each by its path in the model; empty for a checkpoint in 16 bits.

    Raises:
      WeightsError: a tensor is in 4 bits that cannot be.
    """
    if isinstance(checkpoint, StackedCheckpoint):
        return {path.removesuffix("/kernel"): kind for path, kind in checkpoint.formats.items()}
    found: dict[str, dict[int | None, PackedFormat | None]] = {}
    for name in checkpoint.names() if checkpoint.formats else ():
        slot, kind = find_slot(name, checkpoint.naming), checkpoint.formats.get(name)
        if slot is not None and slot.path.endswith("/kernel"):
            found.setdefault(slot.path.removesuffix("/kernel"), {})[slot.layer] = kind
        elif kind is not None and slot is not None:
            raise WeightsError(
                f"{checkpoint.path}: {name} is in 4 bits; only linear layers can be. Take a "
                "checkpoint whose embedding is in 16 bits."
            )
    return {
        path: MixedFormat.of(layers) if len(kinds) > 1 else kinds.pop()
        for path, layers in found.items()
        if (kinds := set(layers.values())) != {None}
    }


def said_formats(config: Mapping[str, Any], model: Model) -> dict[str, PackedFormat | MixedFormat]:
    """What `packed_linears` will find, from what a `config.json` says about bitsandbytes alone.

    It does not say the block size, so this is taken to be bitsandbytes' own, 64.

    Args:
      config: the parsed JSON.
      model: that it describes, abstract and without 4-bit layers.

    Returns:
      The formats by path; empty where nothing is said, and for T5, which has other exceptions.
    """
    said = config.get("quantization_config") or {}
    said = said.get("bitsandbytes", said)  # in a folder of our own, what it was made from
    if not said.get("load_in_4bit") or not isinstance(model, Llama):
        return {}
    quant_type = said.get("bnb_4bit_quant_type", "fp4")
    kind = PackedFormat(quant_type, 64, bool(said.get("bnb_4bit_use_double_quant")))
    skip, found = said.get("llm_int8_skip_modules") or ["lm_head"], {}
    naming = naming_of(config.get("model_type"), "hf")
    for path, linear in nnx.iter_graph(model):
        if not isinstance(linear, nnx.Linear):
            continue
        stacked, slot = linear.kernel.ndim == 3, Slot(join_path(path) + "/kernel", None)
        layers = range(linear.kernel.shape[0]) if stacked else [None]
        names = [tensor_name(slot._replace(layer=layer), naming) for layer in layers]
        kinds = [None if is_skipped(name.removesuffix(".weight"), skip) else kind for name in names]
        if any(kinds):
            found[join_path(path)] = kind if all(kinds) else MixedFormat(tuple(kinds))
    return found


def is_skipped(module: str, skip: Iterable[str]) -> bool:
    """Whether transformers leaves a module out of the quantization (its should_convert_module).

    Args:
      module: its name, "model.layers.1.mlp.down_proj".
      skip: `llm_int8_skip_modules`: names from the start or of the end, or regular expressions.

    >>> is_skipped("model.layers.1.mlp.up_proj", ["model.layers.1.mlp"])
    True
    >>> is_skipped("model.layers.11.mlp.up_proj", ["model.layers.1"])
    False
    """
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    return any(re.match(f"(?:{key}){boundary}", module) or module.endswith(key) for key in skip)


def formats_of_layer(
    packed: Mapping[str, PackedFormat | MixedFormat], layer: int
) -> dict[str, PackedFormat]:
    """What `packed_linears` says, of one layer alone.

    >>> nf4 = PackedFormat("nf4", 64, True)
    >>> formats_of_layer({"up": MixedFormat((nf4, None)), "down": nf4}, 1).keys()
    dict_keys(['down'])
    """
    kinds = {p: k.layers[layer] if isinstance(k, MixedFormat) else k for p, k in packed.items()}
    return {path: kind for path, kind in kinds.items() if kind is not None}


def quantize_as(model: Model, packed: Mapping[str, PackedFormat | MixedFormat]) -> Model:
    """An abstract model whose linear layers have the formats of `packed_linears`.

    Raises:
      WeightsError: layers of one projection differ in a model that cannot have that.
    """
    mixed = [path for path, kind in packed.items() if isinstance(kind, MixedFormat)]
    if mixed and not isinstance(model, Llama):
        raise WeightsError(
            f"the layers of {mixed[0]} differ: {packed[mixed[0]]}. In a {type(model).__name__} "
            "all layers of a projection need one format. Take the 16-bit model (it is quantized "
            "while it is loaded), or a checkpoint that treats all layers alike."
        )
    for kind in all_kinds(packed.values()):
        paths = "|".join(re.escape(path) for path in packed if kind in all_kinds([packed[path]]))
        model = quantize_model(model, where=paths, **kind._asdict())
    for path, linear in nnx.iter_graph(model):
        if isinstance(kind := packed.get(join_path(path)), MixedFormat):
            q = linear.kernel.get_value()
            (layers,) = q.leading_shape
            linear.kernel = MixedParam(kind.abstract(layers, q.shape, q.dtype))
    return model
