"""A packed checkpoint: quantize a model once, and load its 4-bit bytes from then on.

Two kinds of folders. `"qlora_jax"` (see `qlora_jax.weights.stacked`) holds the arrays as they are
in memory and is loaded by mapping; it takes every format. `"bitsandbytes"` (see
`qlora_jax.weights.bitsandbytes`) is what transformers loads and saves, NF4 and FP4. The weights are
the same to the bit, and so is the fingerprint of the base. What is in 4 bits already is not
quantized again but written in the other order.

Both have hashes of all their bytes, which loading verifies (see `qlora_jax.weights.checksums`).

One tensor at a time is read, converted and written to its place; `qlora_jax.weights.writing` says
what happens when that is interrupted.
"""

import dataclasses
import gc
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels.devices import release_unused_memory
from qlora_jax.conversion import Rule, check_finite, convert
from qlora_jax.errors import ConfigError
from qlora_jax.files import fingerprint, resolve_path
from qlora_jax.flax_nnx import quantize_model
from qlora_jax.hf_folder import (
    check_transformers_reads,
    companion_files,
    json_bytes,
    model_config,
    weight_index,
)
from qlora_jax.layer_formats import packed_linears, quantize_as
from qlora_jax.loading import frozen_variables, hash_arrays, read_config, slots
from qlora_jax.lora import is_quantized
from qlora_jax.mixed import MixedStack, one_format_each, part_name
from qlora_jax.models.kinds import Model, abstract_model
from qlora_jax.weights import Checkpoint, PackedFormat, Slot, StackedCheckpoint, open_checkpoint
from qlora_jax.weights import bitsandbytes as bnb
from qlora_jax.weights.checksums import CHECKSUMS, checksums_of
from qlora_jax.weights.fused import FUSED_NAMINGS
from qlora_jax.weights.matching import match_tensors, read_slot
from qlora_jax.weights.names import naming_of, tensor_name
from qlora_jax.weights.packed import all_kinds
from qlora_jax.weights.safetensors_header import DTYPE_NAMES, read_header
from qlora_jax.weights.stacked import INDEX, PARTS, VERSIONS, map_entry
from qlora_jax.weights.writing import FolderWriter, Piece, TensorSpec, split_into_files

Progress = Callable[[int, int, str], None]
FORMATS = ("qlora_jax", "bitsandbytes")


def quantize_checkpoint(
    path: str | pathlib.Path,
    out: str | pathlib.Path,
    *,
    format: Literal["qlora_jax", "bitsandbytes"] = "qlora_jax",
    quant_type: str | None = None,
    block_size: int | None = None,
    double_quant: bool | None = None,
    where: str = "all-linear",
    file_bytes: int = 5_000_000_000,
    progress: Progress | None = None,
) -> pathlib.Path:
    """Writes a packed checkpoint that `load_model` reads without quantizing again.

    The same call after an interruption, also a kill, continues; after success it does nothing.

    Args:
      path: a model, as for `load_model`. One that is in 4 bits keeps its formats and is only
        written in the other order.
      out: a new folder.
      format: "qlora_jax", or "bitsandbytes" for transformers.
      quant_type: "nf4", "fp4" or "int4"; None: "nf4", or what the model has.
      block_size: elements that share one absmax; None: 64, or what the model has.
      double_quant: quantize the absmax values as well; None: yes, or what the model has.
      where: which layers, as in `load_model`; not looked at for a model in 4 bits.
      file_bytes: a file that would grow beyond this is split.
      progress: called with (bytes done, bytes in all, name of the tensor), bytes of the input.

    Returns:
      `out`.

    Raises:
      ConfigError: the format is unknown or differs from that of a model in 4 bits.
      WeightsError: the model cannot be read, or `out` not be written; what is written so far stays.

    Example:
      >>> quantize_checkpoint("llama", "llama-nf4")  # doctest: +SKIP
    """
    if format not in FORMATS:
        raise ConfigError(f"{format=} is unknown; use one of {', '.join(FORMATS)}.")
    source = open_checkpoint(resolve_path(str(path)))
    asked = dict(quant_type=quant_type, block_size=block_size, double_quant=double_quant)
    out = pathlib.Path(out).expanduser()
    write_packed(
        source,
        _abstract_model(source, asked, where),
        out,
        format=format,
        companions=companion_files(source),
        file_bytes=file_bytes,
        progress=progress,
    )
    return out


def write_packed(
    source: Checkpoint,
    model: Model,
    out: pathlib.Path,
    *,
    format: str,
    companions: Mapping[str, bytes],
    file_bytes: int,
    progress: Progress | None = None,
    **options: Any,
) -> None:
    """Writes the tensors of a checkpoint in the 4-bit formats of an abstract model.

    Args:
      source: has the values; also one that exists in no file (`qlora_jax.merging`).
      model: says which layers are in 4 bits, and in which format.
      out: see `quantize_checkpoint`.
      format: see `quantize_checkpoint`.
      companions: files that go along.
      file_bytes: see `quantize_checkpoint`.
      progress: see `quantize_checkpoint`.
      **options: of `FolderWriter`.
    """
    variables = frozen_variables(model)
    layout = (_Stacked if format == "qlora_jax" else _Bitsandbytes)(source, variables)
    job = {
        "format": format,
        "weights": {name: str(kind) for name, kind in layout.formats.items()},
        "file_bytes": file_bytes,
        "source": [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in _files(source.path)],
    }
    with FolderWriter(out, job, **options) as writer:
        if writer.finished:
            return
        writer.allocate(split_into_files(layout.groups(), file_bytes))
        total = sum(layout.nbytes(*item) for item in layout.plan.items())
        done = 0
        for name, slot in layout.plan.items():
            if name not in writer.done:
                weight = read_slot(source, name, slot)
                rule = Rule.of(slot, variables[slot.path].get_value())
                check_finite(weight, rule, f"{source.path}: {name}")
                writer.write(name, *layout.pieces(name, slot, weight, rule))
                # As in `fill_model`: on the CPU JAX uses the file's bytes in place.
                del weight
                gc.collect(0)
                if slot.layer in (None, 0):
                    release_unused_memory()
            done += layout.nbytes(name, slot)
            if progress is not None:
                progress(done, total, name)
        files = writer.finish_files()
        small = companions | layout.descriptions(files)
        starts = {f: [e.offset for e in read_header(f).values() if 0 not in e.shape] for f in files}
        for name, content in ({CHECKSUMS: checksums_of(starts, small)} | small).items():
            writer.write_file(name, content)
        writer.finish()


def _abstract_model(source: Checkpoint, asked: Mapping[str, Any], where: str) -> Model:
    """The model without values, its linear layers as they will be written."""
    config = read_config(source)
    model = abstract_model(config)
    if packed := packed_linears(source):
        for kind in all_kinds(packed.values()):
            wrong = {k: v for k, v in asked.items() if v not in (None, getattr(kind, k))}
            if wrong:
                raise ConfigError(
                    f"{source.path} is in 4 bits already ({kind}), but "
                    f"{', '.join(f'{k}={v}' for k, v in wrong.items())} was asked for. Leave that "
                    "out, or give the 16-bit model."
                )
        return quantize_as(model, packed)
    defaults = dict(quant_type="nf4", block_size=64, double_quant=True)
    chosen = {k: v for k, v in asked.items() if v is not None}
    return quantize_model(model, where=where, **(defaults | chosen))


class _Layout:
    """What the two kinds of folders have in common: the input's tensors and their places.

    Attributes:
      plan: the slot of each of the input's tensors, in the input's order.
      values: of the model by path, abstract.
      targets: the same, but of layers in several formats an array for each of these.
      formats: of the kernels among the targets.
    """

    def __init__(self, source: Checkpoint, variables: Mapping[str, nnx.Variable]):
        self.source, self.variables = source, variables
        values = {path: variable.get_value() for path, variable in variables.items()}
        self.values, self.targets = values, dict(one_format_each(values))
        self.formats = {p: PackedFormat.of(q) for p, q in self.targets.items() if is_quantized(q)}
        wanted = dict(slots(variables))
        if isinstance(source, StackedCheckpoint):
            self.plan = {_layer_name(slot): slot for slot in wanted}
        else:
            self.plan = match_tensors(wanted, source)

    def dtype(self, name: str, slot: Slot) -> np.dtype:
        """In which a tensor is kept: its own, but at most float32."""
        stacked = isinstance(self.source, StackedCheckpoint)
        dtype = self.source.dtype(slot.path if stacked else name)
        return np.dtype(np.float32) if dtype.itemsize > 4 else dtype

    def nbytes(self, name: str, slot: Slot) -> int:
        """Bytes of a tensor of the input before it was in 4 bits."""
        shape = Rule.of(slot, self.values[slot.path]).shape
        return math.prod(shape) * self.dtype(name, slot).itemsize

    def place(self, slot: Slot) -> Slot:
        """Where among the targets a tensor is."""
        value = self.values[slot.path]
        if not isinstance(value, MixedStack):
            return slot
        part, entry = value.find(slot.layer)
        return Slot(part_name(slot.path, value.places[part]), entry)


class _Stacked(_Layout):
    """`qlora_jax.weights.stacked`: one tensor for each array of the model."""

    def __init__(self, source: Checkpoint, variables: Mapping[str, nnx.Variable]):
        super().__init__(source, variables)
        self.dtypes: dict[str, np.dtype] = {}
        for name, slot in self.plan.items():
            dtype, path = self.dtype(name, slot), self.place(slot).path
            # Of layers with different dtypes one that holds all of their values.
            self.dtypes[path] = jnp.promote_types(self.dtypes.get(path, dtype), dtype)

    def groups(self) -> list[dict[str, TensorSpec]]:
        """The tensors of the files; what belongs to one array stays together."""
        groups = []
        for path, target in self.targets.items():
            group = {}
            for name, leaf in _named_leaves(path, target):
                dtype = leaf.dtype if is_quantized(target) else self.dtypes[path]
                group[name] = TensorSpec(tuple(leaf.shape), np.dtype(dtype))
            groups.append(group)
        return groups

    def pieces(
        self, name: str, slot: Slot, weight: Any, rule: Rule
    ) -> tuple[list[Piece], dict[str, bytes]]:
        """What to write for one tensor of the input."""
        path, layer = self.place(slot)
        rule = dataclasses.replace(rule, dtype=self.dtypes[path])
        value = jax.tree.map(np.asarray, convert(weight, rule))
        named = _named_leaves(path, value)
        return [Piece(leaf_name, (layer or 0) * leaf.nbytes, leaf) for leaf_name, leaf in named], {}

    def descriptions(self, files: list[pathlib.Path]) -> dict[str, bytes]:
        """The small files of this kind, `config.json` last."""
        entries = {name: entry for file in files for name, entry in read_header(file).items()}
        values = {}
        for path, target in self.targets.items():
            leaves = [map_entry(entries[name]) for name, _ in _named_leaves(path, target)]
            values[path] = jax.tree.unflatten(jax.tree.structure(target), leaves)
        mixed = {p: v.places for p, v in self.values.items() if isinstance(v, MixedStack)}
        version = VERSIONS[1] if mixed else VERSIONS[0]
        index = {
            "format": StackedCheckpoint.METHOD,
            "version": version,
            **({"mixed": mixed} if mixed else {}),
            "base_fingerprint": hash_arrays(values),
            "files": {
                file.name: {"bytes": file.stat().st_size, "xxh3_128": fingerprint(file)}
                for file in files
            },
            "kernels": {
                path: {
                    **kind._asdict(),
                    "shape": self.targets[path].shape,
                    "layers": next(iter(self.targets[path].leading_shape), None),
                    "dtype": DTYPE_NAMES[self.dtypes[path]],
                }
                for path, kind in self.formats.items()
            },
        }
        method = {"quant_method": StackedCheckpoint.METHOD, "version": version}
        if isinstance(self.source, bnb.BitsandbytesCheckpoint):  # to be written again one day
            method["bitsandbytes"] = self.source.config["quantization_config"]
        config = model_config(self.source) | {"quantization_config": method}
        weight_map = {name: entry.path.name for name, entry in entries.items()}
        return weight_index(weight_map) | {
            INDEX: json_bytes(index),
            "config.json": json_bytes(config),
        }


class _Bitsandbytes(_Layout):
    """`qlora_jax.weights.bitsandbytes`: Hugging Face's names, a tensor for each layer."""

    def __init__(self, source: Checkpoint, variables: Mapping[str, nnx.Variable]):
        super().__init__(source, variables)
        config = model_config(source)
        self.naming = naming_of(config["model_type"], "hf")
        if self.naming in FUSED_NAMINGS:
            raise ConfigError(
                f"{source.path}: transformers has several projections of this family "
                f"({config['model_type']}) in one tensor, whose 4-bit blocks would not be "
                "those of its parts. Choose format qlora_jax."
            )
        for path, kind in self.formats.items():
            if kind.quant_type not in bnb.QUANT_TYPES:
                raise ConfigError(
                    f"bitsandbytes has no {kind.quant_type} ({path}); choose one of "
                    f"{', '.join(bnb.QUANT_TYPES)}, or format qlora_jax."
                )
        check_transformers_reads(config, source.path)

    def groups(self) -> list[dict[str, TensorSpec]]:
        """The tensors of the files; what belongs to one weight stays together."""
        groups = []
        for name, slot in self.plan.items():
            dtype, kind = self.dtype(name, slot), self.formats.get(self.place(slot).path)
            shape = Rule.of(slot, self.values[slot.path]).shape
            name = tensor_name(slot, self.naming)
            if kind is None:
                groups.append({name: TensorSpec(shape, dtype)})
                continue
            specs = bnb.file_specs(name, kind, shape, dtype)
            groups.append({n: TensorSpec(*spec, tail=bnb.STATE in n) for n, spec in specs.items()})
        return groups

    def pieces(
        self, name: str, slot: Slot, weight: Any, rule: Rule
    ) -> tuple[list[Piece], dict[str, bytes]]:
        """What to write for one tensor of the input."""
        dtype, written = self.dtype(name, slot), tensor_name(slot, self.naming)
        if rule.quantize is None:
            return [Piece(written, 0, weight.astype(dtype, copy=False))], {}
        if not is_quantized(weight):
            weight = convert(weight, dataclasses.replace(rule, dtype=dtype))
        tensors = bnb.file_tensors(written, weight)
        tails = {name: tensors.pop(name).tobytes() for name in list(tensors) if bnb.STATE in name}
        return [Piece(name, 0, values) for name, values in tensors.items()], tails

    def descriptions(self, files: list[pathlib.Path]) -> dict[str, bytes]:
        """The small files of this kind, `config.json` last."""
        weight_map = {name: file.name for file in files for name in read_header(file)}
        config = model_config(self.source) | {"quantization_config": self._quantization()}
        return weight_index(weight_map) | {"config.json": json_bytes(config)}

    def _quantization(self) -> dict[str, Any]:
        """That of the input, if it was once bitsandbytes', or what describes the output."""
        said = self.source.config.get("quantization_config") or {}
        if isinstance(self.source, StackedCheckpoint):
            said = said.get("bitsandbytes")
        if said:
            return said
        kinds = list(self.formats.values())

        def last_name(path: str) -> str:
            slot = Slot(path, 0 if "layers" in path.split("/") else None)
            return tensor_name(slot, self.naming).split(".")[-2]

        dense = {last_name(path) for path in self.targets if path.endswith("/kernel")}
        dense -= {last_name(path) for path in self.formats}
        # Of a projection whose layers differ, single layers.
        mixed = [slot for slot in self.plan.values() if self.place(slot) != slot]
        left = [slot for slot in mixed if self.place(slot).path not in self.formats]
        dense |= {tensor_name(slot, self.naming).removesuffix(".weight") for slot in left}
        skip = None
        if dense - {"lm_head"} or "lm_head/kernel" in self.formats:
            head = set() if "lm_head/kernel" in self.formats else {"lm_head"}
            skip = sorted(dense | head)
        dtypes = [self.dtype(n, slot) for n, slot in self.plan.items() if slot.path in self.formats]
        return bnb.quantization_config(
            max(kinds, key=kinds.count), compute_dtype=dtypes[0].name, skip=skip
        )


def _named_leaves(path: str, value: Any) -> list[tuple[str, Any]]:
    """The arrays of a value with the names that a stacked checkpoint gives them."""
    if not is_quantized(value):
        return [(path, value)]
    leaves = {part: getattr(value, part) for part in PARTS}
    return [(f"{path}.{part}", leaf) for part, leaf in leaves.items() if leaf is not None]


def _layer_name(slot: Slot) -> str:
    return slot.path if slot.layer is None else f"{slot.path}[{slot.layer}]"


def _files(path: pathlib.Path) -> list[pathlib.Path]:
    return sorted([*path.glob("*.safetensors"), path / "config.json"] if path.is_dir() else [path])
