"""Writing a merged model: a Hugging Face folder, a folder in 4 bits, or a GGUF file.

All are written under another name beside their place and renamed when they are whole, and each of
their tensors is computed, written and forgotten before the next.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pathlib
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
from flax import nnx

from qlora_jax.data.gguf_metadata import tokenizer_metadata
from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.errors import WeightsError
from qlora_jax.hf_folder import (
    check_transformers_reads,
    companion_files,
    json_bytes,
    weight_index,
)
from qlora_jax.layer_formats import quantize_as
from qlora_jax.merging import MergedCheckpoint
from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.gguf_config import rope_factors, to_gguf
from qlora_jax.models.llama import Llama
from qlora_jax.packed_checkpoint import write_packed
from qlora_jax.weights import PackedFormat
from qlora_jax.weights.fused import Fused, find_fused, fused_modules, whole_module
from qlora_jax.weights.gguf import permute_rows, permuted_heads
from qlora_jax.weights.gguf_writing import write_gguf
from qlora_jax.weights.names import tensor_name
from qlora_jax.weights.packed import MixedFormat
from qlora_jax.weights.safetensors_header import read_header
from qlora_jax.weights.writing import JOURNAL, FolderWriter, Piece, TensorSpec, split_into_files

Progress = Callable[[int, int, str], None]
_ADVICE = "Put that right and run the same command again; nothing was left there."
_ROPE_FACTORS = "rope_freqs.weight"


@contextlib.contextmanager
def whole_or_nothing(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives a name to write to; what is there gets its own name when the block ends without error.

    Args:
      out: a file or folder that does not exist; an empty folder is replaced.

    Raises:
      WeightsError: it exists, or the disk does not let it be written.
    """
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise WeightsError(f"{out} is there already. Give a new name.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            # Of a quantization that can be continued; this one is finished.
            if partial.is_dir():
                (partial / JOURNAL).unlink(missing_ok=True)
            os.replace(partial, out)
        finally:
            if partial.is_dir():
                shutil.rmtree(partial, ignore_errors=True)
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise WeightsError(
            f"{out} cannot be written: {error.strerror or error}. {_ADVICE}"
        ) from error


def write_hf_folder(
    merged: MergedCheckpoint,
    out: pathlib.Path,
    tokenizer: Tokenizer,
    *,
    file_bytes: int = 5_000_000_000,
    progress: Progress | None = None,
) -> None:
    """Writes what `AutoModelForCausalLM.from_pretrained` loads.

    Args:
      merged: with the dtype to write.
      out: a new folder.
      tokenizer: of the run.
      file_bytes: a file that would grow beyond this is split.
      progress: called with (tensors done, tensors in all, name).

    Raises:
      WeightsError: the folder cannot be written, or no `config.json` can say what the model is.
    """
    check_transformers_reads(merged.config, merged.path)
    wholes = _whole_tensors(merged)
    specs = [{n: TensorSpec(whole.shape, whole.dtype)} for n, whole in wholes.items()]
    with FolderWriter(out, {"format": "hf"}, advice=_ADVICE) as writer:
        writer.allocate(split_into_files(specs, file_bytes))
        for done, (name, whole) in enumerate(wholes.items(), start=1):
            writer.write(name, [Piece(name, 0, whole.read())])
            gc.collect(0)
            if progress is not None:
                progress(done, len(wholes), name)
        files = writer.finish_files()
        weight_map = {name: file.name for file in files for name in read_header(file)}
        small = companion_files(merged.source, tokenizer) | weight_index(weight_map)
        for name, content in (small | {"config.json": json_bytes(merged.config)}).items():
            writer.write_file(name, content)


class _Whole(NamedTuple):
    """A tensor of a file: one of the model's, or several that the family keeps in one."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


def _whole_tensors(merged: MergedCheckpoint) -> dict[str, _Whole]:
    modules = fused_modules(LlamaConfig.from_hf(merged.config))
    pieces: dict[str, list[str]] = defaultdict(list)
    for name in merged.names():
        module, _, leaf = name.rpartition(".")
        pieces[f"{whole_module(module)[0]}.{leaf}"].append(name)
    wholes = {}
    for name, parts in pieces.items():
        shape, dtype = merged.shape(parts[0]), merged.dtype(parts[0])
        fused = find_fused(name, modules)
        if fused is None:
            wholes[name] = _Whole(shape, dtype, lambda name=name: merged.read(name))
            continue
        parts.sort()  # by their index

        def join(fused: Fused = fused, parts: list[str] = parts) -> np.ndarray:
            return fused.join([merged.read(part) for part in parts])

        wholes[name] = _Whole((fused.rows, *shape[1:]), dtype, join)
    return wholes


def write_4bit_folder(
    merged: MergedCheckpoint,
    out: pathlib.Path,
    tokenizer: Tokenizer,
    *,
    format: str,
    packed: Mapping[str, PackedFormat | MixedFormat],
    file_bytes: int = 5_000_000_000,
    progress: Progress | None = None,
) -> None:
    """Quantizes a merged model again.

    Args:
      merged: the model.
      out: a new folder.
      tokenizer: of the run.
      format: "bitsandbytes" or "qlora_jax".
      packed: the format of each linear layer by path.
      file_bytes: see `write_hf_folder`.
      progress: called with (bytes done, bytes in all, name).
    """
    config = LlamaConfig.from_hf(merged.config)
    write_packed(
        merged,
        quantize_as(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))), packed),
        out,
        format=format,
        companions=companion_files(merged.source, tokenizer),
        file_bytes=file_bytes,
        progress=progress,
        advice=_ADVICE,
    )


def write_gguf_file(
    merged: MergedCheckpoint,
    out: pathlib.Path,
    tokenizer: Tokenizer,
    *,
    dtype: str,
    progress: Progress | None = None,
) -> None:
    """Writes what llama.cpp loads, with tokenizer and chat template.

    Args:
      merged: in float32.
      out: a new file.
      tokenizer: of the run.
      dtype: of most tensors: "f32", "f16", "bf16", "q8_0", "q4_0" or "q4_1".
      progress: see `write_hf_folder`.

    Raises:
      WeightsError: GGUF cannot say what the model or its tokenizer is, or float16 cannot hold it.
    """
    config = LlamaConfig.from_hf(merged.config)
    metadata = to_gguf(config) | tokenizer_metadata(tokenizer, config.vocab_size)
    metadata["general.name"] = out.name.removeprefix(".").partition(".")[0]
    heads = permuted_heads(metadata)
    names = {tensor_name(merged.slot(name), "gguf"): name for name in merged.names()}
    shapes = {written: merged.shape(name) for written, name in names.items()}
    factors = rope_factors(config)
    if factors is not None:
        shapes = {_ROPE_FACTORS: factors.shape} | shapes
    done: list[str] = []

    def read(written: str) -> np.ndarray:
        if progress is not None:
            done.append(written)
            progress(len(done), len(shapes), written)
        if written == _ROPE_FACTORS:
            return factors
        value = merged.read(names[written])
        count = heads.get(written.split(".")[-2])
        return permute_rows(value, count) if count else value

    write_gguf(out, metadata, shapes, read, dtype=dtype)
