"""bitsandbytes' 4-bit safetensors, read and written without a bit lost.

A Hugging Face folder as transformers saves it after `load_in_4bit`. A weight `w` of N elements is

    w                             uint8 [N/2, 1]    codes, two a byte, interleaved
    w.absmax                      float32 [blocks], or uint8 with double quantization
    w.quant_map                   float32 [16]      the codebook
    w.nested_absmax               float32 [ceil(blocks / 256)]    these two with double
    w.nested_quant_map            float32 [256]                   quantization only
    w.quant_state.bitsandbytes__nf4    uint8 [bytes]              JSON; __fp4 for FP4

with the keys quant_type, blocksize, dtype, shape and, with double quantization, nested_blocksize,
nested_dtype and nested_offset in the JSON. Layers without these are left in 16 bits. Everything is
compared with the JSON before any weight is read. Codes become planar in memory, which is a
bijection (`pallas_kernels.formats`), so what is written again has the bytes that were read.

A file may come with another 8-bit map, or nested blocks of another size, than the format's. Its
scales are then decoded to float32 by its own map: the same numbers, without double quantization.
"""

import json
import math
import pathlib
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32

from pallas_kernels.formats import (
    BLOCK_SIZES,
    CODEBOOKS,
    DYNAMIC_MAP,
    NESTED_BLOCK_SIZE,
    interleaved_to_planar,
    planar_to_interleaved,
)
from qlora_jax.errors import WeightsError
from qlora_jax.guarded_files import parse_json
from qlora_jax.quantized import QuantizedTensor
from qlora_jax.weights.files import read_array
from qlora_jax.weights.fused import FUSED_NAMINGS
from qlora_jax.weights.packed import PackedFormat
from qlora_jax.weights.safetensors import SafetensorsCheckpoint, read_entry
from qlora_jax.weights.safetensors_header import DTYPES, Entry

QUANT_TYPES = ("nf4", "fp4")
STATE = "quant_state.bitsandbytes__"
_LONGEST_OFFSET = -1.2345678901234567e-100  # no float32 is written with more characters
_MAX_STATE_BYTES = 4096  # bitsandbytes writes about 200
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


class _State(NamedTuple):
    """What the JSON beside a weight says, and the maps that are decoded with."""

    format: PackedFormat
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: np.float32 | None
    nested_block_size: int | None
    nested_map: Float32[np.ndarray, "256"] | None

    @property
    def folds(self) -> bool:
        """Whether the nested scales are not the format's own."""
        return self.offset is not None and not self.format.double_quant


class BitsandbytesCheckpoint(SafetensorsCheckpoint):
    """A folder with 4-bit weights; `read` gives these as `QuantizedTensor`s of NumPy arrays.

    Attributes:
      formats: of each 4-bit weight by its name.
    """

    def __init__(self, path: pathlib.Path):
        """Reads the headers and checks every weight against what is said about it.

        Args:
          path: a folder whose `config.json` says `"quant_method": "bitsandbytes"`.

        Raises:
          WeightsError: something is missing, damaged or not supported.
        """
        super().__init__(path)
        self._states: dict[str, _State] = {}
        self._parts: dict[str, dict[str, Entry | None]] = {}
        states = [name for name in self._entries if f".{STATE}" in name]
        if self.naming in FUSED_NAMINGS and states:
            raise WeightsError(
                f"{path} has several projections in one 4-bit tensor ({states[0].split(STATE)[0]}"
                "...), whose blocks cannot be divided. Take the 16-bit model, which is quantized "
                "while it is loaded."
            )
        for full_name in states:
            name, _, quant_type = full_name.partition(f".{STATE}")
            state = self._entries.pop(full_name)
            if name not in self._entries:
                raise WeightsError(f"{state.path}: {full_name} is there, {name} is not.")
            self._parts[name] = {part: self._entries.pop(f"{name}.{part}", None) for part in _PARTS}
            try:
                self._states[name] = self._check(name, quant_type, state)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                said = f"lacks {error}" if isinstance(error, KeyError) else error
                raise WeightsError(
                    f"{state.path}: {full_name} does not fit {name}: {said}. Download it again, or "
                    "take the 16-bit model."
                ) from None
        if not self._states:
            raise WeightsError(
                f"{path}: config.json says that it is quantized by bitsandbytes, but no tensor is "
                f"in 4 bits (none is called *.{STATE}nf4 or fp4). 8-bit models are not supported."
            )
        self.formats = {name: state.format for name, state in self._states.items()}

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape, of a 4-bit weight the one it had before."""
        return self._states[name].shape if name in self._states else super().shape(name)

    def dtype(self, name: str) -> np.dtype:
        """Returns a tensor's dtype, of a 4-bit weight the one it had before."""
        return self._states[name].dtype if name in self._states else super().dtype(name)

    def read(self, name: str) -> np.ndarray | QuantizedTensor:
        """Reads one tensor; a 4-bit weight with its codes in planar order."""
        if name not in self._states:
            return super().read(name)
        state, entry = self._states[name], self._entries[name]
        size = math.prod(state.shape)
        with open(entry.path, "rb", buffering=0) as file:
            packed = read_array(file, entry.offset, (-(-size // 2),), np.dtype(np.uint8))
        self._verified(name, entry, packed)
        codes = interleaved_to_planar(packed, size, state.format.block_size)
        absmax = self._part(name, "absmax")
        nested, offset = None, state.offset
        if state.offset is not None:
            nested = self._part(name, "nested_absmax")
        if state.folds:
            scales = np.repeat(nested, state.nested_block_size)[: absmax.size]
            absmax, nested, offset = state.nested_map[absmax] * scales + offset, None, None
        quant_type, block_size, _ = state.format
        return QuantizedTensor(
            codes, absmax, nested, offset, quant_type, block_size, state.shape, state.dtype
        )

    def _part(self, name: str, part: str) -> np.ndarray:
        """A tensor that belongs to a weight."""
        entry = self._parts[name][part]
        return self._verified(f"{name}.{part}", entry, read_entry(entry))

    def _check(self, name: str, quant_type: str, entry: Entry) -> _State:
        """Reads and checks the JSON of a weight; errors are sentences without a subject."""
        if entry.nbytes > _MAX_STATE_BYTES:
            raise ValueError(f"it has {entry.nbytes} bytes, at most {_MAX_STATE_BYTES} are needed")
        said = parse_json(self._verified(name, entry, read_entry(entry)).tobytes())
        if quant_type not in QUANT_TYPES or said["quant_type"] != quant_type:
            raise ValueError(f"quant_type is {said['quant_type']!r}, the name says {quant_type!r}")
        block_size, shape = said["blocksize"], tuple(said["shape"])
        if type(block_size) is not int or block_size not in BLOCK_SIZES:
            raise ValueError(f"blocksize is {block_size!r}, must be one of {BLOCK_SIZES}")
        if len(shape) != 2 or not all(type(dim) is int and dim > 0 for dim in shape):
            raise ValueError(f"shape is {list(shape)}, must be [out_features, in_features]")
        dtype = DTYPES[_DTYPE_NAMES[said["dtype"]]]
        parts, size = self._parts[name], math.prod(shape)
        blocks = -(-size // block_size)
        weight = self._entries[name]
        if (nbytes := math.prod(weight.shape) * weight.dtype.itemsize) != -(-size // 2):
            raise ValueError(f"{nbytes} bytes of codes, must be {-(-size // 2)} for {list(shape)}")
        nested = "nested_offset" in said
        scale = np.dtype(np.uint8 if nested else np.float32)
        _expect("absmax", parts["absmax"], (blocks,), scale)
        _expect("quant_map", parts["quant_map"], (16,), np.dtype(np.float32))
        if not np.array_equal(self._part(name, "quant_map"), CODEBOOKS[quant_type]):
            raise ValueError(f"quant_map is not the codebook of {quant_type}")
        if not nested:
            if parts["nested_absmax"] or parts["nested_quant_map"]:
                raise ValueError("there are nested scales, but no nested_offset")
            return _State(PackedFormat(quant_type, block_size, False), shape, dtype, *[None] * 3)
        nested_size = said["nested_blocksize"]
        if type(nested_size) is not int or nested_size < 1:
            raise ValueError(f"nested_blocksize is {nested_size!r}")
        offset = np.float32(said["nested_offset"])
        if said["nested_dtype"] != "float32" or not np.isfinite(offset):
            raise ValueError(f"nested_dtype {said['nested_dtype']!r}, nested_offset {offset}")
        groups = -(-blocks // nested_size)
        _expect("nested_absmax", parts["nested_absmax"], (groups,), np.dtype(np.float32))
        _expect("nested_quant_map", parts["nested_quant_map"], (256,), np.dtype(np.float32))
        table = self._part(name, "nested_quant_map")
        known = np.array_equal(table, DYNAMIC_MAP) and nested_size == NESTED_BLOCK_SIZE
        packed_format = PackedFormat(quant_type, block_size, known)
        return _State(packed_format, shape, dtype, offset, nested_size, None if known else table)


def _expect(part: str, entry: Entry | None, shape: tuple[int, ...], dtype: np.dtype) -> None:
    if entry is None:
        raise ValueError(f"{part} is missing")
    if (entry.shape, entry.dtype) != (shape, dtype):
        raise ValueError(
            f"{part} is {entry.dtype} {list(entry.shape)}, must be {dtype} {list(shape)}"
        )


def file_tensors(name: str, q: QuantizedTensor) -> dict[str, np.ndarray]:
    """The tensors that a file has for a 4-bit weight.

    Args:
      name: of the weight.
      q: a single matrix in NF4 or FP4; its `dtype` goes into the JSON.

    Returns:
      Arrays by name; the JSON of `quant_state` comes last.

    Example:
      >>> from qlora_jax.quantized import quantize
      >>> tensors = file_tensors("w", quantize(np.eye(64, dtype=np.float32), double_quant=False))
      >>> [(key, value.shape) for key, value in tensors.items()][:2]
      [('w', (2048, 1)), ('w.absmax', (64,))]
      >>> bytes(tensors["w.quant_state.bitsandbytes__nf4"]).decode()
      '{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [64, 64]}'
    """
    codes = planar_to_interleaved(np.asarray(q.codes), math.prod(q.shape), q.block_size)
    tensors = {name: codes[:, None], f"{name}.absmax": np.asarray(q.absmax)}
    offset = None
    if q.nested_absmax is not None:
        tensors[f"{name}.nested_absmax"] = np.asarray(q.nested_absmax)
        tensors[f"{name}.nested_quant_map"] = DYNAMIC_MAP
        offset = float(q.offset)
    tensors[f"{name}.quant_map"] = CODEBOOKS[q.quant_type]
    state = _state_json(PackedFormat.of(q), q.shape, np.dtype(q.dtype), offset)
    tensors[f"{name}.{STATE}{q.quant_type}"] = np.frombuffer(state, np.uint8)
    return tensors


def file_specs(
    name: str, kind: PackedFormat, shape: tuple[int, ...], dtype: np.dtype
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shapes and dtypes of what `file_tensors` gives; the JSON at its longest."""
    size = math.prod(shape)
    blocks = -(-size // kind.block_size)
    floats, bytes_ = np.dtype(np.float32), np.dtype(np.uint8)
    specs = {name: ((-(-size // 2), 1), bytes_), f"{name}.absmax": ((blocks,), floats)}
    offset = None
    if kind.double_quant:
        specs[f"{name}.absmax"] = ((blocks,), bytes_)
        specs[f"{name}.nested_absmax"] = ((-(-blocks // NESTED_BLOCK_SIZE),), floats)
        specs[f"{name}.nested_quant_map"] = ((256,), floats)
        offset = _LONGEST_OFFSET
    specs[f"{name}.quant_map"] = ((16,), floats)
    longest = len(_state_json(kind, shape, dtype, offset))
    return specs | {f"{name}.{STATE}{kind.quant_type}": ((longest,), bytes_)}


def _state_json(
    kind: PackedFormat, shape: tuple[int, ...], dtype: np.dtype, offset: float | None
) -> bytes:
    """A quant state, its keys in bitsandbytes' order."""
    state = dict(quant_type=kind.quant_type, blocksize=kind.block_size)
    state |= dict(dtype=dtype.name, shape=list(shape))
    if offset is not None:
        state |= dict(nested_blocksize=NESTED_BLOCK_SIZE, nested_dtype="float32")
        state["nested_offset"] = offset
    return json.dumps(state).encode()


def quantization_config(
    packed_format: PackedFormat, *, compute_dtype: str, skip: list[str] | None
) -> dict[str, Any]:
    """The entry of `config.json`, as transformers writes it.

    Args:
      packed_format: of the weights.
      compute_dtype: "float32", "bfloat16" or "float16".
      skip: the last names of linear layers that are not quantized; None for the output head alone,
        which transformers leaves out by itself.

    Example:
      >>> config = quantization_config(
      ...     PackedFormat("nf4", 64, True), compute_dtype="bfloat16", skip=None)
      >>> config["quant_method"], config["bnb_4bit_use_double_quant"]
      ('bitsandbytes', True)
    """
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": compute_dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": packed_format.quant_type,
        "bnb_4bit_use_double_quant": packed_format.double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": skip,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }
