"""The files of a PEFT adapter: `adapter_model.safetensors` beside `adapter_config.json`.

A layer's tensors are A [r, in_features] and B [out_features, r], each layer by itself:

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight

and with DoRA its magnitudes [out_features], `….q_proj.lora_magnitude_vector`.

Everything is looked at before a tensor is read, and a folder is written whole or not at all.
"""

import json
import math
import os
import pathlib
import shutil
import struct
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from qlora_jax.errors import WeightsError
from qlora_jax.guarded_files import check_inside
from qlora_jax.weights.files import PICKLE_SUFFIXES
from qlora_jax.weights.foreign_expressions import try_expressions
from qlora_jax.weights.peft_config import PeftConfig
from qlora_jax.weights.safetensors import read_entry, read_json
from qlora_jax.weights.safetensors_header import DTYPE_NAMES, Entry, read_header

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_DTYPES = ("float32", "float16", "bfloat16")
_LISTED = 8


def tensor_names(module: str, use_dora: bool = False) -> tuple[str, ...]:
    """The names of A and B of a linear layer, and of its magnitudes.

    Args:
      module: its name in the Hugging Face model.
      use_dora: whether it has magnitudes.

    Returns:
      Two names, or three, in the file.

    Example:
      >>> tensor_names("lm_head")[0]
      'base_model.model.lm_head.lora_A.weight'
    """
    prefix = f"base_model.model.{module}"
    names = f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"
    return (*names, f"{prefix}.lora_magnitude_vector") if use_dora else names


def open_adapter(
    folder: pathlib.Path, linears: Mapping[str, tuple[int, int]]
) -> tuple[PeftConfig, dict[str, tuple[Entry, ...]]]:
    """Reads the configuration of an adapter, and checks its tensors against it and the base.

    Args:
      folder: that PEFT's `save_pretrained` wrote.
      linears: (in_features, out_features) of the base's linear layers by Hugging Face name.

    Returns:
      The configuration, and where A, B and with DoRA the magnitudes are for every layer that has an
      adapter.

    Raises:
      WeightsError: a file is missing, a pickle, or damaged; the adapter is not LoRA or DoRA;
        tensors are missing, unknown, or do not fit (all are counted, some are listed).
    """
    config = PeftConfig.from_json(_read_config(folder), folder / CONFIG_FILE)
    if not (folder / WEIGHTS_FILE).is_file():
        raise WeightsError(_explain_no_weights(folder))
    check_inside(folder / WEIGHTS_FILE)
    entries = read_header(folder / WEIGHTS_FILE)
    try_expressions(config.expressions(), list(linears), folder / CONFIG_FILE)
    targets = [module for module in linears if config.targets(module)]
    if not targets:
        raise WeightsError(
            f"{folder / CONFIG_FILE}: target_modules={config.target_modules!r} names no linear "
            "layer of this model. Give the base that the adapter was trained on."
        )
    wanted = {}
    for module in targets:
        in_features, out_features = linears[module]
        rank = config.rank_of(module)
        shapes = (rank, in_features), (out_features, rank), (out_features,)
        wanted |= zip(tensor_names(module, config.use_dora), shapes, strict=False)
    _check_fit(folder / WEIGHTS_FILE, entries, wanted)
    return config, {
        module: tuple(entries[name] for name in tensor_names(module, config.use_dora))
        for module in targets
    }


def read_adapter_tensor(entry: Entry, name: str) -> np.ndarray:
    """Reads one tensor.

    Raises:
      WeightsError: it holds NaN or infinity, or the file has become shorter.
    """
    value = read_entry(entry)
    _check_finite(value, f"{entry.path}: {name}")
    return value


def write_adapter(
    folder: pathlib.Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    read: Callable[[str], np.ndarray],
) -> None:
    """Writes both files, one tensor at a time, under another name until all is on the disk.

    Args:
      folder: a new one.
      config: the contents of `adapter_config.json`.
      tensors: shape and dtype of each by its name.
      read: gives a tensor's values.

    Raises:
      WeightsError: the folder is not empty or cannot be written, or a tensor holds NaN or infinity.
    """
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise WeightsError(f"{folder} is there already and not empty. Give a new folder.")
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        try:
            _write(partial / WEIGHTS_FILE, _safetensors(tensors, read))
            text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
            _write(partial / CONFIG_FILE, [text.encode()])
            os.rename(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise WeightsError(
            f"{folder} cannot be written: {error.strerror or error}. Make room, or give another "
            "folder; nothing was left there."
        ) from error


def _read_config(folder: pathlib.Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise WeightsError(
            f"{folder} is a file; expected is the folder that holds {CONFIG_FILE} and "
            f"{WEIGHTS_FILE}. Give that folder."
        )
    if not (folder / CONFIG_FILE).is_file():
        names = ", ".join(sorted(file.name for file in folder.iterdir())[:_LISTED]) or "nothing"
        raise WeightsError(
            f"{folder} has no {CONFIG_FILE}, so it is no PEFT adapter (it has {names}). Give the "
            "folder that PEFT's save_pretrained() or scripts/export.py wrote."
        )
    return read_json(folder / CONFIG_FILE, "the adapter's configuration")


def _explain_no_weights(folder: pathlib.Path) -> str:
    pickles = sorted(f.name for f in folder.iterdir() if f.suffix.lower() in PICKLE_SUFFIXES)
    if pickles:
        return (
            f"{folder} holds its weights in {pickles[0]}, a pickle file, which can run any code "
            "when it is opened, so it is refused. Where you trust it, load it with PEFT and save "
            f"it again with save_pretrained(), which writes {WEIGHTS_FILE}."
        )
    return f"{folder} has no {WEIGHTS_FILE}. Copy it beside {CONFIG_FILE}."


def _check_fit(
    path: pathlib.Path, entries: Mapping[str, Entry], wanted: Mapping[str, tuple[int, ...]]
) -> None:
    whole = [name for name in entries if ".lora_" not in name]
    if whole:
        raise WeightsError(
            f"{path} holds more than LoRA matrices: {_some(whole)}. Save the adapter again without "
            "modules_to_save and with save_pretrained(..., save_embedding_layers=False), or merge "
            "it in PEFT with merge_and_unload() and give the merged model."
        )
    missing = [name for name in wanted if name not in entries]
    unknown = [name for name in entries if name not in wanted]
    wrong = [
        f"{name} is {entry.dtype.name}{list(entry.shape)}, must be {list(wanted[name])} in one of "
        f"{', '.join(_DTYPES)}"
        for name, entry in entries.items()
        if name in wanted and (entry.shape != wanted[name] or entry.dtype.name not in _DTYPES)
    ]
    lines = [
        f"\n  {what}: {_some(found)}"
        for what, found in (("missing", missing), ("unknown", unknown), ("does not fit", wrong))
        if found
    ]
    if lines:
        raise WeightsError(
            f"{path}: {len(missing)} tensors are missing, {len(unknown)} are unknown and "
            f"{len(wrong)} do not fit this base and {CONFIG_FILE}:"
            + "".join(lines)
            + "\nGive the base that the adapter was trained on, and both files of one adapter."
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(sorted(names)[:_LISTED]) + more


def _check_finite(value: np.ndarray, name: str) -> None:
    if not np.isfinite(value.astype(np.float32)).all():
        raise WeightsError(f"{name} holds NaN or infinity. Take an earlier state of the adapter.")


def _safetensors(
    tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]], read: Callable[[str], np.ndarray]
) -> Iterable[bytes]:
    """Yields a safetensors file; larger dtypes come first, so that all tensors are aligned."""
    names = sorted(tensors, key=lambda name: (-tensors[name][1].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        shape, dtype = tensors[name]
        end = offset + math.prod(shape) * dtype.itemsize
        offsets = [offset, end]
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": shape, "data_offsets": offsets}
        offset = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    yield struct.pack("<Q", len(raw)) + raw
    for name in names:
        value = np.ascontiguousarray(read(name))
        _check_finite(value, name)
        yield value.tobytes()


def _write(path: pathlib.Path, parts: Iterable[bytes]) -> None:
    with path.open("wb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
