"""Which linear layers a checkpoint has in 4 bits, and a model that has the same."""

import re
from collections.abc import Mapping

from flax import nnx

from qlora_jax.errors import WeightsError
from qlora_jax.flax_nnx import quantize_model
from qlora_jax.models.kinds import Model
from qlora_jax.models.llama import Llama
from qlora_jax.nnx_linear import MixedParam
from qlora_jax.tree import join_path
from qlora_jax.weights import Checkpoint, PackedFormat, StackedCheckpoint
from qlora_jax.weights.names import find_slot
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
