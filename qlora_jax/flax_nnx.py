"""QLoRA for any Flax NNX model, by surgery on its module graph.

``apply_qlora`` returns a copy of a model in which the chosen ``nnx.Linear`` and
``nnx.LinearGeneral`` modules (the latter are what ``nnx.MultiHeadAttention`` is made of) are
``QLoRALinear``: a frozen 4-bit kernel, the old bias, and two LoRA matrices. The model's own code is
untouched and keeps calling ``self.q_proj(x)``. The kinds of variables separate the pytrees of
training:

    graphdef, lora, rng, frozen = nnx.split(model, nnx.LoRAParam, nnx.RngState, ...)

Stacked layers (created under ``nnx.vmap``, run by ``jax.lax.scan`` over their state) hold kernels
[L, in, out]; their replacement holds a quantized kernel and adapters with the same leading axis,
and one dropout key per layer. Inside a scanned body NNX state is read-only, so a dropout counter
cannot advance there: a training step writes new keys from outside, see ``set_dropout_keys``.

Memory: kernels are quantized one matrix at a time, so besides the model that the caller holds there
is never a dense copy of more than one tensor. To have no dense model at all, do the surgery on the
abstract model (``nnx.eval_shape``), where it costs nothing, and fill in quantized tensors.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Key

from pallas_kernels.formats import check_format
from qlora_jax.errors import ConfigError, WeightsError
from qlora_jax.linear_layers import as_qlora_linear, is_linear, linear_paths
from qlora_jax.lora import MergeError, merge_weight
from qlora_jax.mixed import MixedStack, dense_stack
from qlora_jax.nnx_linear import QLoRALinear, QuantizedParam
from qlora_jax.quantized import QuantizedTensor
from qlora_jax.tree import join_path


def quantize_model(
    model: nnx.Module,
    *,
    where: str = "all-linear",
    quant_type: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
) -> nnx.Module:
    """A copy of a model with 4-bit linear layers, without adapters.

    Args:
        model: any NNX model; it stays as it is. Abstract models (``nnx.eval_shape``) work: their
            quantized kernels are abstract, too.
        where: see ``apply_qlora``.
        quant_type: "nf4", "fp4" or "int4".
        block_size: elements that share one absmax.
        double_quant: quantize the absmax values as well.

    Returns:
        The model with ``QLoRALinear`` of rank 0 in the chosen places. Variables are new objects
        that share their arrays with ``model``; already quantized layers keep their kernels.

    Raises:
        ConfigError: ``where`` chooses nothing; the format is unknown.
        WeightsError: a kernel holds NaN or infinity, or is no float of 16 or 32 bits.

    Example:
        >>> model = quantize_model(nnx.Linear(64, 8, rngs=nnx.Rngs(0)), where=".*")
        >>> model.kernel.get_value().quant_type
        'nf4'
    """
    model, chosen = _with_qlora_linears(model, where)
    options = dict(quant_type=quant_type, block_size=block_size, double_quant=double_quant)
    _quantize_kernels(chosen, **options)
    return model


def apply_qlora(
    model: nnx.Module,
    *,
    where: str = "all-linear",
    rank: int = 64,
    alpha: float = 16.0,
    dropout: float = 0.0,
    use_rslora: bool = False,
    use_dora: bool = False,
    lora_dtype: DTypeLike = jnp.float32,
    quant_type: str | None = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    rngs: nnx.Rngs,
) -> nnx.Module:
    """A copy of a model with 4-bit linear layers and LoRA adapters on them.

    Chosen are ``nnx.Linear`` and ``nnx.LinearGeneral`` modules (without batch axes; subclasses as
    long as they do not redefine ``__call__``) and ``QLoRALinear``; ``linear_paths(model, where)``
    shows which. The first outputs equal those of the quantized model, because B is zero.

    Args:
        model: any NNX model; it stays as it is. Also abstract, or made by ``quantize_model``.
        where: "all-linear": every linear layer except an output head, which is one whose last name
            is in ``HEAD_NAMES`` and that is no member of a list or stack of layers. Otherwise a
            regular expression that must match a module's whole path ("layers/self_attn/q_proj").
        rank: of the adapters.
        alpha: LoRA's alpha; see ``lora_scaling``.
        dropout: on the adapters' input, in training mode (``model.train()``, the initial one).
        use_rslora: divide alpha by sqrt(rank) rather than rank.
        use_dora: learn the magnitude of each output as well; see ``qlora_jax.dora``.
        lora_dtype: of the adapters; the products run in the layer's compute dtype.
        quant_type: "nf4", "fp4", "int4", or None: adapters on a base that stays as it is.
        block_size: elements that share one absmax.
        double_quant: quantize the absmax values as well.
        rngs: streams ``params`` (A) and, with dropout, ``dropout``: each layer gets its own fork.

    Returns:
        The model with ``QLoRALinear`` in the chosen places. Variables are new objects that share
        their arrays with ``model``; layers quantized before keep their kernels.

    Raises:
        ConfigError: ``where`` chooses nothing or a layer that has an adapter; rank or dropout is
            out of range; the format is unknown.
        WeightsError: a kernel holds NaN or infinity, or is no float of 16 or 32 bits.

    Example:
        >>> block = nnx.MultiHeadAttention(2, 16, decode=False, rngs=nnx.Rngs(0))
        >>> block = apply_qlora(block, where="query|value", rank=4, rngs=nnx.Rngs(1))
        >>> graphdef, lora, frozen = nnx.split(block, nnx.LoRAParam, ...)
        >>> sorted(lora), lora["query"]["lora_a"].shape
        (['query', 'value'], (16, 4))
    """
    if not 0.0 <= dropout < 1.0:
        raise ConfigError(f"{dropout=}: expected at least 0 and below 1, for example 0.05.")
    model, chosen = _with_qlora_linears(model, where)
    adapted = [path for path, linear in chosen.items() if linear.rank]
    if adapted:
        raise ConfigError(
            f"where={where!r} chooses layers that have an adapter: {', '.join(adapted)}; expected "
            "layers without one. Merge the old adapters first (merge_model), or narrow where."
        )
    if quant_type is not None:
        options = dict(quant_type=quant_type, block_size=block_size, double_quant=double_quant)
        _quantize_kernels(chosen, **options)
    for linear in chosen.values():
        linear.add_adapter(
            rank=rank, alpha=alpha, use_rslora=use_rslora, dtype=lora_dtype, rngs=rngs
        )
        if use_dora:
            linear.add_magnitude()
    # After all adapters, so that these are the same with and without dropout.
    for linear in chosen.values() if dropout else ():
        linear.add_dropout(dropout, rngs)
    return model


def merge_model(
    model: nnx.Module, requantize: bool = False
) -> tuple[nnx.Module, dict[str, MergeError]]:
    """A copy of a model with its adapters added into its kernels.

    Args:
        model: made by ``apply_qlora``; it stays as it is.
        requantize: False: every ``QLoRALinear`` becomes a plain dense ``nnx.Linear`` or
            ``nnx.LinearGeneral`` again, in the dtype its kernel had before quantization. True:
            layers with a quantized kernel keep one, quantized again after the merge.

    Returns:
        The model without adapters, and for each path that had one what merging cost.

    Raises:
        ConfigError: the model has no ``QLoRALinear``.

    Example:
        >>> linear = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
        >>> merged, report = merge_model(apply_qlora(linear, where=".*", rank=2, rngs=nnx.Rngs(1)))
        >>> type(merged).__name__, float(report[""].max_abs)
        ('Linear', 0.0)
    """
    model = nnx.clone(model)
    linears = {p: node for p, node in nnx.iter_graph(model) if isinstance(node, QLoRALinear)}
    if not linears:
        raise ConfigError("the model has no QLoRALinear; expected one that apply_qlora returned.")
    report, replacements = {}, {}
    for path, linear in linears.items():
        kernel = linear.matrix_kernel
        if linear.rank:
            options = dict(alpha=linear.alpha, use_rslora=linear.use_rslora, requantize=requantize)
            kernel, report[join_path(path)] = merge_weight(kernel, linear.adapter, **options)
        elif isinstance(kernel, QuantizedTensor | MixedStack) and not requantize:
            kernel = dense_stack(kernel)
        replacements[id(linear)] = linear.with_kernel(kernel)
    return substitute(model, replacements, {}), report


def without_adapters(model: nnx.Module) -> nnx.Module:
    """A copy of a model that shares its frozen arrays and has no adapters: its base.

    Where an initialisation took something out of the weights, that stays as an adapter.

    Args:
        model: made by ``apply_qlora``; it stays as it is.

    Example:
        >>> model = apply_qlora(nnx.Linear(64, 8, rngs=nnx.Rngs(0)), where=".*", rank=2,
        ...     rngs=nnx.Rngs(1))
        >>> model.rank, without_adapters(model).rank
        (2, 0)
    """
    model = nnx.merge(*nnx.split(model))
    bases = {}
    for _, linear in nnx.iter_graph(model):
        if isinstance(linear, QLoRALinear) and linear.subtracted_a is None:
            bases[id(linear)] = linear.with_kernel(linear.matrix_kernel)
        elif isinstance(linear, QLoRALinear):  # what was taken out of the kernel belongs to it
            linear.lora_a = nnx.LoRAParam(linear.subtracted_a.get_value())
            linear.lora_b = nnx.LoRAParam(linear.subtracted_b.get_value())
            linear.lora_magnitude = nnx.data(None)
    return substitute(model, bases, {})


def set_dropout_keys(rng_state: nnx.State, key: Key[Array, ""]) -> nnx.State:
    """Gives every dropout stream its own key, derived from one. Pure, also under ``jit``.

    A training step calls it for every microstep with a key that is a function of (seed, step,
    microstep), which makes dropout independent of what ran before: a resumed run is bit-identical.

    Args:
        rng_state: the part of a split that holds ``nnx.RngState`` variables; other variables in it
            are passed through.
        key: one PRNG key, typed or raw uint32, of the implementation that the streams use.

    Returns:
        The same structure: the i-th stream has ``fold_in(key, i)``, split over the axes of its
        stack, and all counters are zero.

    Raises:
        ValueError: ``key`` has another PRNG implementation than a stream.

    Example:
        >>> layer = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
        >>> layer = apply_qlora(layer, where=".*", rank=2, dropout=0.5, rngs=nnx.Rngs(1))
        >>> graphdef, lora, rng, frozen = nnx.split(layer, nnx.LoRAParam, nnx.RngState, ...)
        >>> rng = set_dropout_keys(rng, jax.random.fold_in(jax.random.key(0), 17))
        >>> nnx.merge(graphdef, lora, rng, frozen)(jnp.ones((1, 8))).shape
        (1, 4)
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    leaves, treedef = jax.tree.flatten(rng_state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    streams = 0
    for index, variable in enumerate(leaves):
        if isinstance(variable, nnx.RngKey):
            new = _stream_key(jax.random.fold_in(key, streams), variable.get_value())
            leaves[index] = variable.replace(new)
            streams += 1
        elif isinstance(variable, nnx.RngCount):
            leaves[index] = variable.replace(jnp.zeros_like(variable.get_value()))
    return treedef.unflatten(leaves)


def _with_qlora_linears(model: nnx.Module, where: str) -> tuple[nnx.Module, dict[str, QLoRALinear]]:
    """A clone whose chosen layers are ``QLoRALinear``, and these by path."""
    model = nnx.clone(model)
    paths = set(linear_paths(model, where))
    chosen, replacements = {}, {}
    for path, node in nnx.iter_graph(model):
        if join_path(path) in paths and is_linear(node):
            chosen[join_path(path)] = replacements[id(node)] = as_qlora_linear(node)
    return substitute(model, replacements, {}), chosen


def substitute(node: Any, replacements: dict[int, Any], done: dict[int, Any]) -> Any:
    """Puts replacements (by id) into a module graph: modules in place, containers anew if needed.

    Not ``nnx.recursive_map``, which refuses tuples of modules and graphs with cycles.
    """
    if id(node) in replacements:
        return replacements[id(node)]
    if id(node) in done:
        return done[id(node)]
    if isinstance(node, nnx.Variable):
        return node
    if isinstance(node, nnx.Pytree):
        done[id(node)] = node
        for name, child in list(vars(node).items()):
            new = child if name.startswith("_pytree__") else substitute(child, replacements, done)
            if new is not child:
                setattr(node, name, new)
        return node
    children, treedef = jax.tree.flatten(node, is_leaf=lambda x: x is not node)
    if jax.tree_util.treedef_is_leaf(treedef):
        return node
    new_children = [substitute(child, replacements, done) for child in children]
    if all(new is old for new, old in zip(new_children, children, strict=True)):
        return node
    return treedef.unflatten(new_children)


def _quantize_kernels(linears: dict[str, QLoRALinear], **options: Any) -> None:
    """Quantizes the dense kernels in place; layers that share one dense kernel share the result.

    The pure functions below raise ValueError; whoever runs a script gets an error that says it.
    """
    try:
        check_format(options["quant_type"], options["block_size"])
    except ValueError as error:
        raise ConfigError(f"the base cannot be quantized: {error}.") from None
    done: dict[int, tuple[nnx.Variable, nnx.Variable]] = {}
    for path, linear in linears.items():
        dense = linear.kernel
        if isinstance(dense, QuantizedParam):
            continue
        if id(dense) in done:
            linear.kernel = done[id(dense)][1]
            continue
        try:
            linear.quantize_kernel(name=f"{path}/kernel", **options)
        except ValueError as error:
            raise WeightsError(
                f"{error}. Leave this layer out of where, or give a model with other weights."
            ) from None
        # The dense variable is kept in the tuple so that its id is not used again meanwhile.
        done[id(dense)] = (dense, linear.kernel)


def _stream_key(key: Key[Array, ""], old: Key[Array, "*L"]) -> Key[Array, "*L"]:
    if key.dtype != old.dtype:
        raise ValueError(
            f"key of {key.dtype} for a dropout stream of {old.dtype}; expected one implementation. "
            "Create both with the same jax.random.key(..., impl=...)."
        )
    return jax.random.split(key, old.shape) if old.shape else key
