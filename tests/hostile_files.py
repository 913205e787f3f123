"""What is done with a model file from anywhere, and small files to begin with.

The tests, the corpus and the fuzzer (`tests/fuzz/fuzz_files.py`) share this: `open_file` goes
through all that reads a file before a model is made of it. Whatever the bytes are, it must end:
with tensors, or with a `WeightsError`.
"""

import json
import pathlib
import struct

import gguf
import numpy as np

from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.errors import WeightsError
from qlora_jax.guarded_files import read_json_object
from qlora_jax.models.config import LlamaConfig
from qlora_jax.weights.gguf import GGUFCheckpoint
from qlora_jax.weights.safetensors import read_entry
from qlora_jax.weights.safetensors_header import read_header

CORPUS = pathlib.Path(__file__).parent / "corpus"
SUFFIXES = {"safetensors": ".safetensors", "gguf": ".gguf", "json": ".json"}


def open_file(path: pathlib.Path) -> bool:
    """Reads all of a file by its suffix; whether it was accepted."""
    try:
        if path.suffix == ".safetensors":
            for entry in read_header(path).values():
                read_entry(entry)
        elif path.suffix == ".json":
            config = read_json_object(path)
            LlamaConfig.from_hf(config)
        else:
            _open_gguf(path)
    except WeightsError:
        return False
    return True


def _open_gguf(path: pathlib.Path) -> None:
    checkpoint = GGUFCheckpoint(path)
    for name in checkpoint.names():
        checkpoint.read(name)
    tokenizer = Tokenizer.from_gguf(checkpoint.config)
    tokenizer.encode("a b")
    LlamaConfig.from_gguf(checkpoint.config)


def safetensors_bytes(header, data: bytes = b"") -> bytes:
    """A file with any header: JSON, or bytes as they are."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def entry(dtype="U8", shape=(1,), offsets=(0, 1)) -> dict:
    """An entry of a safetensors header."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def small_safetensors() -> bytes:
    """A valid file of several dtypes, with metadata and a name that is escaped."""
    header = {
        "__metadata__": {"format": "pt", "note": 'a "quote", {braces}'},
        "model.norm.weight": entry("F32", (4,), (0, 16)),
        "é\n/../x": entry("BF16", (2, 2), (16, 24)),
        "scalar": entry("U8", (), (24, 25)),
        "empty": entry("I64", (0, 3), (25, 25)),
    }
    return safetensors_bytes(header, bytes(range(25)))


def small_gguf(path: pathlib.Path, kind: str = "gpt2") -> pathlib.Path:
    """A valid file with tokenizer, arrays of numbers and of texts, and two types of tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_head_count(2)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(["<unk>", "a", "b", "ab", "</s>"])
    writer.add_token_types([2, 1, 1, 1, 3])
    writer.add_token_merges(["a b"])
    writer.add_token_scores([0.0, -1.0, -2.0, -3.0, 0.0])
    writer.add_eos_token_id(4)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{{ messages[0].content }}")
    rows = np.arange(5 * 32, dtype=np.float32).reshape(5, 32)
    writer.add_tensor("token_embd.weight", rows)
    q8 = gguf.quants.quantize(rows, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("output.weight", q8, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_text(text: str | bytes) -> bytes:
    """A text as GGUF has it."""
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw


def gguf_bytes(fields=(), tensors=(), data: bytes = b"", counts=None, version: int = 3) -> bytes:
    """A file of any content.

    Args:
      fields: (key, type, bytes of the value).
      tensors: (name, dimensions, type, offset).
      data: after the padding.
      counts: of tensors and fields, where they lie.
      version: of the format.
    """
    parts = [b"GGUF" + struct.pack("<IQQ", version, *(counts or (len(tensors), len(fields))))]
    for key, kind, value in fields:
        parts.append(gguf_text(key) + struct.pack("<I", kind) + value)
    for name, dims, kind, offset in tensors:
        place = struct.pack("<IQ", kind, offset)
        parts.append(gguf_text(name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims) + place)
    head = b"".join(parts)
    return head + bytes(-len(head) % 32) + data
