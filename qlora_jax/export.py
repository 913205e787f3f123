"""Leaving for elsewhere: a run's model merged, written, and measured before anyone relies on it.

Merging rounds, and merging into other weights than those an adapter was trained on changes the
model. Both happen silently in most tools. Here the file that was written is read back and compared
with the adapted model on held-out text, and a file that has become worse by more than a threshold
does not stay.
"""

from __future__ import annotations

import dataclasses
import gc
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from ml_collections import config_dict

from qlora_jax.config import load_config
from qlora_jax.data.masking import Example, tokenize_records
from qlora_jax.data.records import load_records
from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.divergence import (
    Batch,
    Divergence,
    Predictions,
    compare,
    heldout_batches,
    predict,
    predict_in_memory,
)
from qlora_jax.errors import ConfigError, DataError, ExportError
from qlora_jax.files import resolve_path
from qlora_jax.flax_nnx import without_adapters
from qlora_jax.layer_formats import packed_linears
from qlora_jax.loading import frozen_variables
from qlora_jax.merged_files import (
    whole_or_nothing,
    write_4bit_folder,
    write_gguf_file,
    write_hf_folder,
)
from qlora_jax.merging import MergedCheckpoint
from qlora_jax.models.t5 import T5
from qlora_jax.streaming import StreamedModel
from qlora_jax.training import load_trained
from qlora_jax.training.data import load_training_data, token_options
from qlora_jax.weights import Checkpoint, PackedFormat, open_checkpoint
from qlora_jax.weights.packed import MixedFormat, format_of

FORMATS = ("hf", "bnb", "qlora_jax", "gguf")
GGUF_DTYPES = ("bf16", "f16", "f32", "q8_0", "q4_0", "q4_1")
_HF_DTYPES = {"bf16": jnp.bfloat16, "f16": jnp.float16, "f32": jnp.float32}
_DTYPES = {"hf": tuple(_HF_DTYPES), "gguf": GGUF_DTYPES}
TRAINED, ORIGINAL = "trained", "original"


@dataclasses.dataclass(frozen=True)
class Merge:
    """What came out of an export.

    Attributes:
        path: of the folder or file.
        rows: figures of each model by what it is; the adapted model is the reference.
        written: which of `rows` is the one that was written.
        tokens: that carry loss, over which all was measured.
    """

    path: pathlib.Path
    rows: dict[str, Divergence]
    written: str
    tokens: int


def check_format(format: str, merge: str | None, dtype: str | None) -> str | None:
    """The dtype that a format has unless another is given; what does not go together is refused.

    Args:
        format: one of `FORMATS`.
        merge: "dense", "requantized", or None for what the format is.
        dtype: of the tensors, or None.

    Returns:
        The dtype, None for folders in 4 bits.

    Raises:
        ConfigError: format and merge, or format and dtype, do not go together.

    Example:
        >>> check_format("hf", None, None), check_format("bnb", "requantized", None)
        ('bf16', None)
    """
    kind = "dense" if format in _DTYPES else "requantized"
    if merge not in (None, kind):
        fitting = {"dense": "hf or gguf", "requantized": "bnb or qlora_jax", "none": "peft"}
        raise ConfigError(
            f"--format={format} holds a merged model that is {kind}, and --merge={merge} was asked "
            f"for. Leave --merge out, or choose --format={fitting[merge]}."
        )
    allowed = _DTYPES.get(format, ())
    if dtype is not None and dtype not in allowed:
        advice = f"choose one of {', '.join(allowed)}" if allowed else "leave it out"
        raise ConfigError(f"--format={format} has no dtype {dtype}; {advice}.")
    return (dtype or "bf16") if allowed else None


def export_merged(
    workdir: str | pathlib.Path,
    out: str | pathlib.Path,
    *,
    format: str = "hf",
    dtype: str | None = None,
    weights: str | None = None,
    eval_path: str = "",
    eval_tokens: int = 4096,
    max_regression: float = 0.02,
    step: Callable[[str], Any] = lambda doing: None,
    show: Callable[[Merge], Any] = lambda merge: None,
) -> Merge:
    """Merges the newest adapter of a run into its base, writes the model and measures what it cost.

    Args:
        workdir: of a run.
        out: a new folder; for GGUF a new file.
        format: "hf" or "gguf" (dense), "bnb" or "qlora_jax" (quantized again as the base is).
        dtype: of dense tensors: "bf16", "f16" or "f32"; for GGUF also "q8_0", "q4_0" or "q4_1".
        weights: what the adapter is added to: "trained", the 4-bit weights that it was trained on,
            "original", those of the run's model before they were quantized, or another model with
            the original weights. None: "trained", but for what is quantized again "original" where
            the run has it, because 4-bit weights would be rounded back to what they were.
        eval_path: text or records to measure on; empty: the run's held-out records.
        eval_tokens: about so many tokens of it.
        max_regression: by how many nats per token the loss of what was written may be above that
            of the adapted model.
        step: called with what is being done.
        show: called with the figures, before a merge that is worse is refused.

    Returns:
        The figures of base, adapted and merged models.

    Raises:
        ConfigError: options that do not go together; no original weights; no held-out text; the
            model is an encoder-decoder.
        ExportError: the merged model is worse by more than `max_regression`; nothing was left.
        WeightsError: the format cannot hold the model, or `out` cannot be written.

    Example:
        >>> export_merged("runs/quickstart", "merged", weights="original")  # doctest: +SKIP
    """
    dtype = check_format(format, None, dtype)
    out = pathlib.Path(out).expanduser()
    with whole_or_nothing(out) as partial:
        step("loading the run")
        model, tokenizer = load_trained(workdir)
        if isinstance(model, T5):
            raise ConfigError(
                f"{workdir} trained an encoder-decoder, whose adapters are not merged here; export "
                "them with --format=peft, and merge them with PEFT's merge_and_unload."
            )
        config = load_config(pathlib.Path(workdir).expanduser() / "config.json")
        batches = _batches(config, tokenizer, eval_path, eval_tokens)
        merged = _merged_checkpoints(model, config, weights, _HF_DTYPES.get(dtype, jnp.float32))
        chosen = _choose(weights, format, merged)

        step("measuring the base and the adapted model")
        base = predict_in_memory(without_adapters(model), batches)
        adapted = predict_in_memory(model, batches)
        # With PiSSA and the like a part of the base is in the adapter.
        is_whole = config.lora.init == "default"
        bare = "base, not adapted" if is_whole else f"without the adapter ({config.lora.init})"
        rows = {bare: compare(adapted, base), "adapted": compare(adapted, adapted)}
        del base

        step(f"writing {out}")
        _write(merged[chosen], partial, tokenizer, format, dtype, _packed(model))
        gc.collect()
        written = _label(chosen, dtype) + " (written)"
        step("reading it back and measuring it")
        rows[written] = compare(adapted, _streamed(open_checkpoint(partial), model.dtype, batches))
        for name, checkpoint in merged.items():
            if name != chosen and format in _DTYPES:
                step("measuring the alternative")
                label = _label(name, dtype if format == "hf" else "f32")
                rows[label] = compare(adapted, _streamed(checkpoint, model.dtype, batches))
        result = Merge(out, rows, written, len(adapted.targets))
        show(result)
        _refuse_regression(result, max_regression)
    return result


def _batches(
    config: config_dict.ConfigDict, tokenizer: Tokenizer, path: str, max_tokens: int
) -> list[Batch]:
    examples = _heldout(config, tokenizer, path)
    if not examples:
        raise ConfigError(
            "a merged model is measured on text that was not trained on, and this run has none "
            "(data.eval_fraction is 0). Give --eval=FILE: text, or records in a format of training."
        )
    batches = heldout_batches(
        examples,
        batch_size=config.eval.batch_size,
        seq_len=config.data.max_len,
        max_tokens=max_tokens,
    )
    if not any(batch["loss_mask"][:, 1:].any() for batch in batches):
        raise DataError("no token of the held-out text carries loss; give --eval=FILE")
    return batches


def _heldout(config: config_dict.ConfigDict, tokenizer: Tokenizer, path: str) -> Sequence[Example]:
    """The run's held-out examples, or those of a file."""
    if not path:
        return load_training_data(config, tokenizer).heldout
    policy = config.data.on_bad_record
    found = load_records(path, "auto", policy)
    return tokenize_records(found, tokenizer, on_bad_record=policy, **token_options(config, "auto"))


def _choose(weights: str | None, format: str, merged: dict[str, MergedCheckpoint]) -> str:
    if weights is None:
        return ORIGINAL if format not in _DTYPES and ORIGINAL in merged else TRAINED
    return TRAINED if weights == TRAINED else ORIGINAL


def _merged_checkpoints(
    model: nnx.Module, config: config_dict.ConfigDict, weights: str | None, dtype: Any
) -> dict[str, MergedCheckpoint]:
    """The model merged into what it was trained on and, where it can be had, into the original."""
    source = open_checkpoint(resolve_path(config.model.path, kind="model"))
    checkpoints = {TRAINED: MergedCheckpoint(model, source, dtype=dtype)}
    original: Checkpoint | None = source
    if weights not in (None, TRAINED, ORIGINAL):
        original = open_checkpoint(resolve_path(weights, kind="model"))
    elif packed_linears(source):
        if weights == ORIGINAL:
            raise ConfigError(
                f"{config.model.path} is in 4 bits, so this run does not know the original "
                "weights. Give them, --weights=PATH, or leave --weights out."
            )
        original = None
    if original is not None:
        merged = MergedCheckpoint(model, source, original=original, dtype=dtype)
        checkpoints[ORIGINAL] = merged
    return checkpoints


def _packed(model: nnx.Module) -> dict[str, PackedFormat | MixedFormat]:
    """The formats of the layers in 4 bits."""
    values = {path: node.get_value() for path, node in frozen_variables(model).items()}
    return {
        path.removesuffix("/kernel"): kind
        for path, value in values.items()
        if (kind := format_of(value)) is not None
    }


def _write(
    merged: MergedCheckpoint,
    out: pathlib.Path,
    tokenizer: Tokenizer,
    format: str,
    dtype: str | None,
    packed: dict[str, PackedFormat | MixedFormat],
) -> None:
    if format == "hf":
        write_hf_folder(merged, out, tokenizer)
    elif format == "gguf":
        write_gguf_file(merged, out, tokenizer, dtype=dtype)
    else:
        kind = "bitsandbytes" if format == "bnb" else format
        write_4bit_folder(merged, out, tokenizer, format=kind, packed=packed)


def _streamed(checkpoint: Checkpoint, dtype: Any, batches: list[Batch]) -> Predictions:
    streamed = StreamedModel(checkpoint, dtype)
    return predict(streamed.model, streamed.hidden_states, batches)


def _label(weights: str, dtype: str | None) -> str:
    base = "4-bit weights" if weights == TRAINED else "original weights"
    return f"{base} + delta, {dtype or 'in 4 bits again'}"


def _refuse_regression(result: Merge, max_regression: float) -> None:
    before, after = result.rows["adapted"].loss, result.rows[result.written].loss
    if not after - before <= max_regression:
        raise ExportError(
            f"the loss of the merged model is {after:.4f}, that of the adapted one {before:.4f}: "
            f"{after - before:.4f} nats per token worse, and at most {max_regression:g} are "
            "allowed. Nothing was left on the disk. "
            f"To have it all the same, add --max_regression={after - before + 0.001:.3f}."
        )
