"""Which linear layers a checkpoint has in 4 bits, and a model that has the same."""

import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

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

_MOST_ENTRIES, _LONGEST_ENTRY = 10_000, 256
_ENTRY = re.compile(r"\^?(?:[\w/-]|\.\*?|\\\.)*+\$?")
_TOKEN = re.compile(r"\.\*|\\\.|.")


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
    said = said.get("bitsandbytes", said) if isinstance(said, dict) else {}  # of our own folder
    if not isinstance(said, dict) or not said.get("load_in_4bit") or not isinstance(model, Llama):
        return {}
    quant_type = said.get("bnb_4bit_quant_type", "fp4")
    kind = PackedFormat(quant_type, 64, bool(said.get("bnb_4bit_use_double_quant")))
    skip = [_Entry.of(key) for key in _skip_modules(said)]
    found = {}
    naming = naming_of(config.get("model_type"), "hf")
    for path, linear in nnx.iter_graph(model):
        if not isinstance(linear, nnx.Linear):
            continue
        stacked, slot = linear.kernel.ndim == 3, Slot(join_path(path) + "/kernel", None)
        layers = range(linear.kernel.shape[0]) if stacked else [None]
        names = [tensor_name(slot._replace(layer=layer), naming) for layer in layers]
        kinds = [None if _matches(name.removesuffix(".weight"), skip) else kind for name in names]
        if any(kinds):
            found[join_path(path)] = kind if all(kinds) else MixedFormat(tuple(kinds))
    return found


def _skip_modules(said: Mapping[str, Any]) -> list[str]:
    """The entries of `llm_int8_skip_modules`; without any, the output head."""
    skip = said.get("llm_int8_skip_modules") or ["lm_head"]
    texts = isinstance(skip, list) and all(isinstance(key, str) for key in skip)
    if not texts or len(skip) > _MOST_ENTRIES or max(map(len, skip)) > _LONGEST_ENTRY:
        raise WeightsError(
            "config.json has llm_int8_skip_modules that are no list of at most "
            f"{_MOST_ENTRIES} names: {str(skip)[:100]}. Take the complete config.json that "
            "belongs to the weights."
        )
    return skip


def is_skipped(module: str, skip: Iterable[str]) -> bool:
    r"""Whether transformers leaves a module out of the quantization (its should_convert_module).

    There, an entry is a regular expression, and a checkpoint may come from anywhere: one can be
    made to take hours. What names need of regular expressions (`.`, `.*` and `\\.`) means the same
    here and takes time in proportion to the length of the name; anything else is refused.

    Args:
      module: its name, "model.layers.1.mlp.down_proj".
      skip: `llm_int8_skip_modules`: names from the start up to a dot or the end, or of the end.

    Raises:
      WeightsError: an entry is another regular expression.

    >>> is_skipped("model.layers.1.mlp.up_proj", ["model.layers.1.mlp"])
    True
    >>> is_skipped("model.layers.11.mlp.up_proj", ["model.layers.1"])
    False
    >>> is_skipped("model.layers.11.mlp.up_proj", ["model.layers.*.up_proj"])
    True
    """
    return _matches(module, [_Entry.of(key) for key in skip])


class _Entry(NamedTuple):
    """An entry: as it is written, and cut at each `.*` into characters; None: any character."""

    text: str
    pieces: list[list[str | None]]
    to_the_end: bool

    @classmethod
    def of(cls, key: str) -> "_Entry":
        """Reads an entry."""
        if not _ENTRY.fullmatch(key):
            raise WeightsError(
                f"config.json has {key[:100]!r} in llm_int8_skip_modules; of regular expressions "
                "only '.', '.*' and '\\.' are supported there. Write out the names of the modules "
                "that are not in 4 bits."
            )
        tokens = _TOKEN.findall(key.removeprefix("^").removesuffix("$"))
        pieces: list[list[str | None]] = [[]]
        for token in tokens:
            if token == ".*":
                pieces.append([])
            else:
                pieces[-1].append(None if token == "." else token[-1])
        return cls(key, pieces, key.endswith("$"))

    def matches(self, module: str) -> bool:
        """Whether a module's name begins with this, up to a boundary."""
        first, *rest = self.pieces
        ends = [len(first)] if _fits(first, module, 0) else []
        for i, piece in enumerate(rest):
            # The leftmost place leaves the most for what follows; of the last all are tried.
            starts = range(ends[0], len(module) - len(piece) + 1) if ends else ()
            fitting = (start + len(piece) for start in starts if _fits(piece, module, start))
            ends = list(fitting if i == len(rest) - 1 else itertools.islice(fitting, 1))
        whole = len(module)
        return any(end == whole or (not self.to_the_end and _boundary(module, end)) for end in ends)


def _matches(module: str, skip: Iterable[_Entry]) -> bool:
    return any(entry.matches(module) or module.endswith(entry.text) for entry in skip)


def _fits(piece: list[str | None], module: str, start: int) -> bool:
    characters = module[start : start + len(piece)]
    return len(characters) == len(piece) and all(
        wanted in (None, found) for wanted, found in zip(piece, characters, strict=True)
    )


def _boundary(module: str, end: int) -> bool:
    """Whether a module's name can end there: before or after a dot."""
    return module[end : end + 1] == "." or (end > 0 and module[end - 1] == ".")


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
