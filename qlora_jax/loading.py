"""From a model on disk to a quantized model in memory, never holding it in 16 bits.

The model is built without values (`nnx.eval_shape`) and its linear layers are made 4-bit in that
state, which costs nothing and says exactly which arrays must exist. Then each tensor of the file is
read alone, quantized on the device and written into its layer of the stacked array, whose buffer is
donated so that the write happens in place. The peak is the finished model and about two tensors.

A checkpoint that is in 4 bits already is loaded as it is: of bitsandbytes tensor by tensor, of this
project's own kind (`qlora_jax.weights.stacked`) by mapping its files into memory.
"""

import gc
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xxhash
from flax import nnx
from jax.typing import DTypeLike

from pallas_kernels.devices import release_unused_memory
from qlora_jax.conversion import Rule, check_finite, convert, convert_into
from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.errors import ConfigError, WeightsError
from qlora_jax.files import resolve_path
from qlora_jax.flax_nnx import quantize_model
from qlora_jax.layer_formats import packed_linears, quantize_as
from qlora_jax.lora import is_quantized
from qlora_jax.mixed import MixedStack, one_format_each
from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.kinds import Model, Shape, abstract_model, read_shape
from qlora_jax.models.t5_config import MODEL_TYPES as T5_TYPES
from qlora_jax.nnx_linear import QuantizedParam
from qlora_jax.quantized import QuantizedTensor
from qlora_jax.subtraction import Prepare
from qlora_jax.tree import join_path
from qlora_jax.vocabulary import VOCAB_QUANT_TYPES, Int8Rows, quantize_vocabulary
from qlora_jax.weights import Checkpoint, Slot, StackedCheckpoint, open_checkpoint
from qlora_jax.weights.matching import match_tensors

Progress = Callable[[int, int, str], None]
_GGUF_ROPE_FACTORS = "rope_freqs.weight"


def load_model(
    path: str | pathlib.Path,
    *,
    quant_type: str | None = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    vocab_quant_type: str = "none",
    where: str = "all-linear",
    dtype: DTypeLike = jnp.float32,
    remat: str = "full",
    sequence_chunk: int = 0,
    prepare: Prepare | None = None,
    progress: Progress | None = None,
) -> tuple[Model, Tokenizer]:
    """Loads a model and its tokenizer, quantizing the linear layers on the way.

    A checkpoint in 4 bits (a folder of scripts/quantize.py, or of bitsandbytes) is loaded as it is:
    its own formats and its own choice of layers hold, whatever the arguments on them say.

    Args:
      path: a Hugging Face folder, a GGUF file, or "package:<package>/<file inside it>".
      quant_type: "nf4", "fp4" or "int4"; None keeps every weight in `dtype`.
      block_size: elements that share one absmax.
      double_quant: quantize the absmax values as well.
      vocab_quant_type: "int8" stores embedding and output head in 8 bits; see `vocabulary`.
      where: "all-linear" (all but the output head) or a regular expression over module paths.
      dtype: of the computation, and of what is not quantized: embedding, norms, biases, head.
      remat: see `Llama`.
      sequence_chunk: see `Llama`.
      prepare: changes each weight before it is quantized; see `subtraction`.
      progress: called after each tensor with (tensors done, tensors in all, name).

    Returns:
      The model and the tokenizer.

    Raises:
      UserError: there is nothing at `path`.
      ConfigError: the format is unknown, `where` chooses no layer, quant_type is None or `prepare`
        given for a checkpoint in 4 bits, or sequence_chunk is given for a T5.
      WeightsError: a file is damaged, refused or not supported; tensors are missing, unknown or
        have another shape (all are listed); a tensor holds NaN or infinity.

    Example:
      >>> load_model("pytorch_model.bin")
      Traceback (most recent call last):
      ...
      qlora_jax.errors.UserError: pytorch_model.bin does not exist...
    """
    if vocab_quant_type not in VOCAB_QUANT_TYPES:
        raise ConfigError(f"{vocab_quant_type=} is none of {', '.join(VOCAB_QUANT_TYPES)}")
    checkpoint = open_checkpoint(resolve_path(str(path), kind="model"))
    config = read_config(checkpoint)
    tokenizer = read_tokenizer(checkpoint)
    rows = tokenizer.backend.get_vocab_size(with_added_tokens=False)
    if rows > config.vocab_size:
        raise WeightsError(
            f"{checkpoint.path}: the tokenizer has {rows} tokens, the model's embedding only "
            f"{config.vocab_size} rows; they do not belong together. Download both again."
        )
    model = abstract_model(
        config, dtype=dtype, param_dtype=dtype, remat=remat, sequence_chunk=sequence_chunk
    )
    if packed := packed_linears(checkpoint):
        if quant_type is None:
            raise ConfigError(
                f"{checkpoint.path} is in 4 bits ({next(iter(packed.values()))}) and cannot be "
                "loaded in 16 or 32. Give the original model, or leave quant_type as it is."
            )
        if prepare is not None:
            raise ConfigError(
                f"{checkpoint.path} is in 4 bits already ({next(iter(packed.values()))}), and this "
                "LoRA initialisation (pissa, olora or loftq) starts from the weights before they "
                "were rounded. Give the 16-bit model, or set lora.init to default."
            )
        model = quantize_as(model, packed)
    elif quant_type is not None:
        model = quantize_model(
            model,
            where=where,
            quant_type=quant_type,
            block_size=block_size,
            double_quant=double_quant,
        )
    if vocab_quant_type == "int8":
        model = quantize_vocabulary(model)
    fill_model(model, checkpoint, prepare=prepare, progress=progress)
    return model, tokenizer


def read_config(checkpoint: Checkpoint) -> Shape:
    """Reads the model's shape, also what GGUF says by its tensors only.

    Args:
      checkpoint: an open model.

    Returns:
      The configuration.

    Raises:
      WeightsError: the architecture is not supported, or its sizes are missing.
    """
    if checkpoint.style == "hf":
        return read_shape(checkpoint.config, checkpoint.names())
    names = checkpoint.names()
    factors = None
    if _GGUF_ROPE_FACTORS in names:
        factors = tuple(float(x) for x in checkpoint.read(_GGUF_ROPE_FACTORS))
    return LlamaConfig.from_gguf(
        checkpoint.config, tie_word_embeddings="output.weight" not in names, rope_factors=factors
    )


def fill_model(
    model: nnx.Module,
    checkpoint: Checkpoint,
    *,
    prepare: Prepare | None = None,
    progress: Progress | None = None,
) -> None:
    """Gives an abstract model the values of a checkpoint, one tensor at a time.

    Args:
      model: a `Llama` or `T5` whose arrays are shapes only, with or without 4-bit layers; changed
        in place.
      checkpoint: an open model.
      prepare: changes each dense weight before it is quantized.
      progress: called after each tensor with (tensors done, tensors in all, name).

    Raises:
      WeightsError: the checkpoint does not fit the model, or a tensor is not finite.
    """
    variables = frozen_variables(model)
    if isinstance(checkpoint, StackedCheckpoint):
        _fill_from_stacks(variables, checkpoint, progress)
        return
    plan = match_tensors(dict(slots(variables)), checkpoint)
    values: dict[str, Any] = {}
    for done, (name, slot) in enumerate(plan.items(), start=1):
        target = variables[slot.path].get_value()
        rule = Rule.of(slot, target)
        weight = checkpoint.read(name)
        check_finite(weight, rule, f"{checkpoint.path}: {name}")
        if prepare is not None and rule.quantize is not None:
            weight = prepare(slot, weight, dict(rule.quantize))
        if slot.layer is None:
            values[slot.path] = convert(weight, rule)
        else:
            if slot.path not in values:
                values[slot.path] = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), target)
            values[slot.path] = convert_into(values[slot.path], weight, slot.layer, rule)
        # One tensor at a time: wait for the device, then let go of the file's bytes. On the CPU
        # JAX uses them in place, and forgets them only when Python collects garbage.
        jax.block_until_ready(values[slot.path])
        del weight
        gc.collect(0)
        if slot.layer in (None, 0):  # a new kind of tensor: what its compilation took, goes back
            release_unused_memory()
        if progress is not None:
            progress(done, len(plan), name)
    for path, value in values.items():
        variables[path].set_value(value)


def frozen_variables(model: nnx.Module) -> dict[str, nnx.Variable]:
    """The variables of a base by path; those of adapters are not among them."""
    return {
        join_path(path): node
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Param | QuantizedParam) and not isinstance(node, nnx.LoRAParam)
    }


def base_fingerprint(model: nnx.Module) -> str:
    """Hashes the frozen weights, so that an adapter can name its base.

    Adapters and random keys do not count; the order of attributes does not matter. A base has one
    fingerprint whether it is loaded with float32 or bfloat16 as compute dtype: an adapter trained
    on a GPU is welcome on a CPU. Only float16 can differ, where it cannot hold the file's values.

    Args:
      model: with or without adapters.

    Returns:
      32 hex digits (xxh3, 128 bits).

    Example:
      >>> a, b = (nnx.Linear(4, 2, rngs=nnx.Rngs(seed)) for seed in (0, 1))
      >>> base_fingerprint(a) == base_fingerprint(b)
      False
    """
    _, _, base, _ = nnx.split(model, nnx.LoRAParam, (nnx.Param, QuantizedParam), ...)
    named = {join_path(path): variable for path, variable in nnx.to_flat_state(base)}
    return hash_arrays({path: variable.get_value() for path, variable in named.items()})


def stored_fingerprint(model: nnx.Module, checkpoint: StackedCheckpoint) -> str:
    """The `base_fingerprint` of a loaded model with the vocabulary as it lies on the disk.

    Args:
      model: loaded from `checkpoint`.
      checkpoint: its own `fingerprint` is what this one has to be.
    """
    values = {path: node.get_value() for path, node in frozen_variables(model).items()}
    return hash_arrays(
        {
            path: checkpoint.read(path) if isinstance(value, Int8Rows) else value
            for path, value in values.items()
        }
    )


def hash_arrays(values: Mapping[str, Any]) -> str:
    """The fingerprint of arrays and `QuantizedTensor`s by path; see `base_fingerprint`.

    Example:
      >>> hash_arrays({"a": np.ones(3), "b": np.ones(2)}) == hash_arrays({"a": np.ones(3)})
      False
    """
    digest = xxhash.xxh3_128()
    for path, value in sorted(one_format_each(values)):
        if is_quantized(value):
            digest.update(f"{value.quant_type},{value.block_size},{value.shape};".encode())
        elif not isinstance(value, Int8Rows) and jnp.issubdtype(value.dtype, jnp.floating):
            # Embeddings, norms and biases have the compute dtype. Rounded to bfloat16 they are the
            # same bits from either; codes and scales are made from the file's values and are so
            # anyway.
            value = jnp.asarray(value, jnp.bfloat16)
        for leaf in jax.tree.leaves(value):
            array = np.ascontiguousarray(leaf)
            digest.update(f"{path},{array.dtype},{array.shape};".encode())
            digest.update(array.reshape(-1).view(np.uint8))
    return digest.hexdigest()


def read_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """Reads the tokenizer that belongs to a model."""
    if checkpoint.style == "hf":
        return read_hf_tokenizer(checkpoint.path, checkpoint.config)
    return Tokenizer.from_gguf(checkpoint.config)


def read_hf_tokenizer(folder: pathlib.Path, config: Mapping[str, Any]) -> Tokenizer:
    """Reads the tokenizer of a Hugging Face folder, which need not hold the weights.

    An encoder-decoder without a chat template gets the format "plain", so that it can be asked:
    its source is the text of the messages.

    Args:
      folder: with the tokenizer's files.
      config: content of the model's `config.json`.
    """
    tokenizer = Tokenizer.from_file(folder)
    plain = config.get("model_type") in T5_TYPES and not tokenizer.chat_template
    return tokenizer.with_chat_format("plain") if plain else tokenizer


def slots(variables: Mapping[str, nnx.Variable]) -> Iterator[tuple[Slot, tuple[int, ...]]]:
    """Yields every slot of the model with the shape that its tensor has in a file.

    Args:
      variables: of the model, by path; abstract.
    """
    for path, variable in variables.items():
        target = variable.get_value()
        if "layers" not in path.split("/"):
            yield Slot(path, None), Rule.of(Slot(path, None), target).shape
            continue
        stacked = isinstance(target, QuantizedTensor | MixedStack)
        leading = target.leading_shape if stacked else target.shape
        for layer in range(leading[0]):
            yield Slot(path, layer), Rule.of(Slot(path, layer), target).shape


def _fill_from_stacks(
    variables: Mapping[str, nnx.Variable], checkpoint: StackedCheckpoint, progress: Progress | None
) -> None:
    """Maps the arrays of a stacked checkpoint; only dense ones of another dtype are copied."""
    differing = sorted(variables.keys() ^ set(checkpoint.names()))
    if differing:
        raise WeightsError(
            f"{checkpoint.path} does not hold the arrays of the model in its config.json: "
            f"{differing[0]} is in only one of them. Quantize the original model again."
        )
    for done, (path, variable) in enumerate(variables.items(), start=1):
        target, value = variable.get_value(), checkpoint.read(path)
        name = f"{checkpoint.path}: {path}"
        in_rows = isinstance(target, Int8Rows)
        if in_rows and path.endswith("/kernel"):
            value = value.T  # a head, stored as the dense model has it
        if value.shape != target.shape:
            raise WeightsError(
                f"{name} is {list(value.shape)}, the model in config.json needs "
                f"{list(target.shape)}. Quantize the original model again."
            )
        dtype = np.dtype(np.float32 if in_rows else target.dtype)
        rule = Rule(tuple(target.shape), dtype, in_rows=in_rows)
        check_finite(value, rule, name)
        # `device_put` takes mapped bytes as they are on a CPU, where `asarray` would copy them.
        variable.set_value(rule.apply_to_stack(jax.tree.map(jax.device_put, value)))
        if progress is not None:
            progress(done, len(variables), path)
