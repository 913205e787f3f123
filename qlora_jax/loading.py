"""From a model on disk to a quantized model in memory, never holding it in 16 bits.

The model is built without values (`nnx.eval_shape`) and its linear layers are made 4-bit in that
state, which costs nothing and says exactly which arrays must exist. Then each tensor of the file is
read alone, quantized on the device and written into its layer of the stacked array, whose buffer is
donated so that the write happens in place. The peak is the finished model and about two tensors.
"""

import dataclasses
import functools
import gc
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xxhash
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels import quantize_4bit, quantize_absmax
from pallas_kernels.devices import release_unused_memory
from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.errors import WeightsError
from qlora_jax.files import resolve_path
from qlora_jax.flax_nnx import quantize_model
from qlora_jax.lora import is_quantized
from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.llama import Llama
from qlora_jax.nnx_linear import QuantizedParam
from qlora_jax.quantized import QuantizedTensor, quantize
from qlora_jax.tree import join_path
from qlora_jax.weights import Checkpoint, Slot, open_checkpoint
from qlora_jax.weights.matching import match_tensors

Progress = Callable[[int, int, str], None]
_PIECE_ELEMENTS = 1 << 20
_GGUF_ROPE_FACTORS = "rope_freqs.weight"


def load_model(
    path: str | pathlib.Path,
    *,
    quant_type: str | None = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    where: str = "all-linear",
    dtype: DTypeLike = jnp.float32,
    remat: str = "full",
    progress: Progress | None = None,
) -> tuple[Llama, Tokenizer]:
    """Loads a model and its tokenizer, quantizing the linear layers on the way.

    Args:
      path: a Hugging Face folder, a GGUF file, or "package:<package>/<file inside it>".
      quant_type: "nf4", "fp4" or "int4"; None keeps every weight in `dtype`.
      block_size: elements that share one absmax.
      double_quant: quantize the absmax values as well.
      where: "all-linear" (all but the output head) or a regular expression over module paths.
      dtype: of the computation, and of what is not quantized: embedding, norms, biases, head.
      remat: see `Llama`.
      progress: called after each tensor with (tensors done, tensors in all, name).

    Returns:
      The model and the tokenizer.

    Raises:
      UserError: there is nothing at `path`.
      ConfigError: the format is unknown, or `where` chooses no layer.
      WeightsError: a file is damaged, refused or not supported; tensors are missing, unknown or
        have another shape (all are listed); a tensor holds NaN or infinity.

    Example:
      >>> load_model("pytorch_model.bin")
      Traceback (most recent call last):
      ...
      qlora_jax.errors.UserError: pytorch_model.bin does not exist...
    """
    checkpoint = open_checkpoint(resolve_path(str(path), kind="model"))
    config = read_config(checkpoint)
    tokenizer = _read_tokenizer(checkpoint)
    rows = tokenizer.backend.get_vocab_size(with_added_tokens=False)
    if rows > config.vocab_size:
        raise WeightsError(
            f"{checkpoint.path}: the tokenizer has {rows} tokens, the model's embedding only "
            f"{config.vocab_size} rows; they do not belong together. Download both again."
        )
    model = nnx.eval_shape(
        lambda: Llama(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype, remat=remat)
    )
    if quant_type is not None:
        model = quantize_model(
            model,
            where=where,
            quant_type=quant_type,
            block_size=block_size,
            double_quant=double_quant,
        )
    fill_model(model, checkpoint, progress=progress)
    return model, tokenizer


def read_config(checkpoint: Checkpoint) -> LlamaConfig:
    """Reads the model's shape, also what GGUF says by its tensors only.

    Args:
      checkpoint: an open model.

    Returns:
      The configuration.

    Raises:
      WeightsError: the architecture is not supported, or its sizes are missing.
    """
    if checkpoint.style == "hf":
        return LlamaConfig.from_hf(checkpoint.config)
    names = checkpoint.names()
    factors = None
    if _GGUF_ROPE_FACTORS in names:
        factors = tuple(float(x) for x in checkpoint.read(_GGUF_ROPE_FACTORS))
    return LlamaConfig.from_gguf(
        checkpoint.config, tie_word_embeddings="output.weight" not in names, rope_factors=factors
    )


def fill_model(
    model: nnx.Module, checkpoint: Checkpoint, *, progress: Progress | None = None
) -> None:
    """Gives an abstract model the values of a checkpoint, one tensor at a time.

    Args:
      model: a `Llama` whose arrays are shapes only, with or without 4-bit layers; changed in place.
      checkpoint: an open model.
      progress: called after each tensor with (tensors done, tensors in all, name).

    Raises:
      WeightsError: the checkpoint does not fit the model, or a tensor is not finite.
    """
    variables = {
        join_path(path): node
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Param | QuantizedParam)
    }
    plan = match_tensors(dict(_slots(variables)), checkpoint)
    values: dict[str, Any] = {}
    for done, (name, slot) in enumerate(plan.items(), start=1):
        target = variables[slot.path].get_value()
        rule = _Rule.of(slot, target)
        weight = checkpoint.read(name)
        _check_finite(weight, rule, f"{checkpoint.path}: {name}")
        if slot.layer is None:
            values[slot.path] = _convert(weight, rule)
        else:
            if slot.path not in values:
                values[slot.path] = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), target)
            layer = np.int32(slot.layer)
            values[slot.path] = _convert_into(values[slot.path], weight, layer, rule)
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
    graphdef, _, base, _ = nnx.split(model, nnx.LoRAParam, (nnx.Param, QuantizedParam), ...)
    digest = xxhash.xxh3_128()
    named = {join_path(path): variable for path, variable in nnx.to_flat_state(base)}
    for path, variable in sorted(named.items()):
        value = variable.get_value()
        if is_quantized(value):
            digest.update(f"{value.quant_type},{value.block_size},{value.shape};".encode())
        elif jnp.issubdtype(value.dtype, jnp.floating):
            # Embeddings, norms and biases have the compute dtype. Rounded to bfloat16 they are the
            # same bits from either; codes and scales are made from the file's values and are so
            # anyway.
            value = jnp.asarray(value, jnp.bfloat16)
        for leaf in jax.tree.leaves(value):
            array = np.ascontiguousarray(leaf)
            digest.update(f"{path},{array.dtype},{array.shape};".encode())
            digest.update(array.reshape(-1).view(np.uint8))
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class _Rule:
    """How a tensor of a file becomes (a layer of) an array of the model; static under jit."""

    shape: tuple[int, ...]
    dtype: Any
    transpose: bool = False
    quantize: tuple[tuple[str, Any], ...] | None = None

    @classmethod
    def of(cls, slot: Slot, target: Any) -> "_Rule":
        """The rule for a slot whose variable has the (abstract) value `target`."""
        if is_quantized(target):
            options = dict(
                quant_type=target.quant_type,
                block_size=target.block_size,
                double_quant=target.nested_absmax is not None,
            )
            return cls(target.shape, np.dtype(target.dtype), quantize=tuple(options.items()))
        shape = tuple(target.shape if slot.layer is None else target.shape[1:])
        if slot.path.endswith("/kernel"):
            return cls(shape[::-1], np.dtype(target.dtype), transpose=True)
        return cls(shape, np.dtype(target.dtype))

    def apply(self, weight: Float[Array, "..."]) -> Any:
        """Returns the converted tensor."""
        if self.quantize is not None:
            packed = quantize_in_pieces(weight, **dict(self.quantize))
            return dataclasses.replace(packed, dtype=self.dtype)
        return (weight.T if self.transpose else weight).astype(self.dtype)


@functools.partial(jax.jit, static_argnames="rule")
def _convert(weight: Float[Array, "..."], rule: _Rule) -> Any:
    return rule.apply(weight)


@functools.partial(jax.jit, static_argnames="rule", donate_argnames="stack")
def _convert_into(
    stack: Any, weight: Float[Array, "..."], layer: Int[Array, ""], rule: _Rule
) -> Any:
    """Writes a converted tensor into its layer of the donated stack."""

    def write(stacked: Array, leaf: Array) -> Array:
        return jax.lax.dynamic_update_index_in_dim(stacked, leaf, layer, axis=0)

    return jax.tree.map(write, stack, rule.apply(weight))


def quantize_in_pieces(
    weight: Float[Array, "out in"], *, quant_type: str, block_size: int, double_quant: bool
) -> QuantizedTensor:
    """Gives what `quantize` gives, to the bit, with temporaries of a few megabytes.

    In one piece the float32 temporaries are twice a bfloat16 weight. The planar order pairs the
    first half of the blocks with the second, so a piece takes a slice of both.

    Args:
      weight: float32, bfloat16 or float16.
      quant_type: see `quantize`.
      block_size: see `quantize`.
      double_quant: see `quantize`.

    Returns:
      The quantized tensor.

    Example:
      >>> weight = jnp.linspace(-1.0, 1.0, 64 * 128).reshape(64, 128)
      >>> quantize_in_pieces(
      ...     weight, quant_type="nf4", block_size=64, double_quant=True
      ... ).codes.shape
      (4096,)
    """
    pieces = 1
    while weight.size > pieces * _PIECE_ELEMENTS and weight.size % (4 * pieces * block_size) == 0:
        pieces *= 2
    halves = weight.reshape(2, pieces, -1) if pieces > 1 else None
    if halves is None:
        options = dict(quant_type=quant_type, block_size=block_size, double_quant=double_quant)
        return quantize(weight, **options)

    def quantize_piece(index: Int[Array, ""]) -> tuple[Array, Array]:
        piece = jax.lax.dynamic_index_in_dim(halves, index, axis=1, keepdims=False)
        codes, absmax = quantize_4bit(piece, quant_type=quant_type, block_size=block_size)
        return codes, absmax.reshape(2, -1)

    codes, absmax = jax.lax.map(quantize_piece, jnp.arange(pieces))
    absmax = absmax.swapaxes(0, 1).reshape(-1)
    nested = offset = None
    if double_quant:
        absmax, nested, offset = quantize_absmax(absmax)
    return QuantizedTensor(
        codes.reshape(-1),
        absmax,
        nested,
        offset,
        quant_type,
        block_size,
        weight.shape,
        weight.dtype,
    )


def _read_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    if checkpoint.style == "hf":
        return Tokenizer.from_file(checkpoint.path)
    return Tokenizer.from_gguf(checkpoint.config)


def _slots(variables: dict[str, nnx.Variable]) -> Iterator[tuple[Slot, tuple[int, ...]]]:
    """Yields every slot of the model with the shape that its tensor has in a file."""
    for path, variable in variables.items():
        target = variable.get_value()
        if not path.startswith("layers/"):
            yield Slot(path, None), _Rule.of(Slot(path, None), target).shape
            continue
        leading = target.leading_shape if is_quantized(target) else target.shape
        for layer in range(leading[0]):
            yield Slot(path, layer), _Rule.of(Slot(path, layer), target).shape


def _check_finite(weight: np.ndarray, rule: _Rule, name: str) -> None:
    """Refuses NaN and infinity, and values that the conversion would make infinite."""
    largest = _largest_magnitude(weight)
    if not np.isfinite(largest):
        raise WeightsError(
            f"{name} holds NaN or infinity. Download the file again, or take another model."
        )
    if rule.quantize is None and largest > float(jnp.finfo(rule.dtype).max):
        raise WeightsError(
            f"{name} holds {largest:g}, which is infinite in {rule.dtype}. Load the model with "
            "bfloat16 or float32 instead."
        )


def _largest_magnitude(weight: np.ndarray) -> float:
    """Returns the largest absolute value; NaN counts as larger than infinity.

    As unsigned integers without their sign bit, floats are ordered by magnitude with NaN at the
    top, and NumPy compares integers many times faster than `ml_dtypes` compares bfloat16.
    """
    unsigned = np.dtype(f"u{weight.dtype.itemsize}")
    mask = unsigned.type((1 << (8 * weight.dtype.itemsize - 1)) - 1)
    bits = weight.reshape(-1).view(unsigned)
    chunks = range(0, bits.size, _PIECE_ELEMENTS)
    top = max((bits[i : i + _PIECE_ELEMENTS] & mask).max() for i in chunks)
    return float(np.array([top], unsigned).view(weight.dtype)[0])
