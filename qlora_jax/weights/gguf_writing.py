"""Writing a GGUF file, one tensor at a time.

The header needs the size of every tensor, and sizes follow from shapes and types. So it is written
first, and then each tensor is computed, encoded by `gguf.quants` and appended.
"""

import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from gguf import GGUFWriter
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, LlamaFileType
from gguf.quants import quantize

from qlora_jax.errors import WeightsError
from qlora_jax.weights.files import empty_aligned

# How llama.cpp calls a file by the type of most of its tensors.
FILE_TYPES = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "q4_0": LlamaFileType.MOSTLY_Q4_0,
    "q4_1": LlamaFileType.MOSTLY_Q4_1,
}
_QUANTIZATION_VERSION = 2
_CHUNK_ELEMENTS = 1 << 20
_VOCABULARY = ("token_embd.weight", "output.weight")


def tensor_type(name: str, shape: tuple[int, ...], dtype: str) -> GGMLQuantizationType:
    """In which type a tensor is written.

    As llama.cpp does: vectors stay in float32, rows that are no multiple of a block in float16.
    In files of 4 bits, embedding and head have 8: they are read by every token.

    Args:
      name: of the tensor.
      shape: of the tensor.
      dtype: of most of the file, one of `FILE_TYPES`.

    Example:
      >>> tensor_type("blk.0.ffn_up.weight", (64, 48), "q8_0").name
      'F16'
    """
    if len(shape) < 2:
        return GGMLQuantizationType.F32
    if dtype in ("q4_0", "q4_1") and name in _VOCABULARY:
        dtype = "q8_0"
    kind = GGMLQuantizationType[dtype.upper()]
    block, _ = GGML_QUANT_SIZES[kind]
    return kind if shape[-1] % block == 0 else GGMLQuantizationType.F16


def write_gguf(
    path: pathlib.Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
    *,
    dtype: str,
) -> None:
    """Writes a file.

    Args:
      path: of the file.
      metadata: values by key, with `general.architecture`; lists are arrays.
      tensors: the shape of each.
      read: gives a tensor in float32, with its rows in the order of the file.
      dtype: of most tensors, one of `FILE_TYPES`.

    Raises:
      WeightsError: a value is too large for float16.
      OSError: the file cannot be written.
    """
    metadata = dict(metadata)
    writer = GGUFWriter(path, metadata.pop("general.architecture"))
    try:
        metadata |= {
            "general.file_type": int(FILE_TYPES[dtype]),
            "general.quantization_version": _QUANTIZATION_VERSION,
        }
        for key, value in metadata.items():
            kind = _value_type(value)
            inner = _value_type(value[0]) if kind == GGUFValueType.ARRAY else None
            if inner == GGUFValueType.UINT32:
                inner = GGUFValueType.INT32
            writer.add_key_value(key, value, kind, sub_type=inner)
        types = {name: tensor_type(name, shape, dtype) for name, shape in tensors.items()}
        for name, shape in tensors.items():
            nbytes = math.prod(_encoded_shape(shape, types[name]))
            writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, types[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name in tensors:
            writer.write_tensor_data(_encode(read(name), types[name], name))
        writer.flush()
    finally:
        writer.close()


def _encode(values: np.ndarray, kind: GGMLQuantizationType, name: str) -> np.ndarray:
    """The bytes of a tensor, encoded in chunks of rows."""
    rows = values.reshape(-1, values.shape[-1])
    out = empty_aligned(_encoded_shape(rows.shape, kind), np.dtype(np.uint8))
    step = max(1, _CHUNK_ELEMENTS // rows.shape[1])
    for start in range(0, len(rows), step):
        chunk = rows[start : start + step]
        if kind == GGMLQuantizationType.F16 and np.abs(chunk).max() > np.finfo(np.float16).max:
            raise WeightsError(
                f"{name} holds {np.abs(chunk).max():g}, which is infinite in float16. Choose "
                "dtype bf16 or f32."
            )
        encoded = np.ascontiguousarray(quantize(chunk, kind)).view(np.uint8)
        out[start : start + step] = encoded.reshape(len(chunk), -1)
    return out


def _encoded_shape(shape: tuple[int, ...], kind: GGMLQuantizationType) -> tuple[int, ...]:
    block, block_bytes = GGML_QUANT_SIZES[kind]
    return (*shape[:-1], shape[-1] // block * block_bytes)


def _value_type(value: Any) -> GGUFValueType:
    """Bool before int, which it is a kind of."""
    kinds = {
        bool: GGUFValueType.BOOL,
        int: GGUFValueType.UINT32,
        float: GGUFValueType.FLOAT32,
        str: GGUFValueType.STRING,
        list: GGUFValueType.ARRAY,
    }
    return kinds[type(value)]
