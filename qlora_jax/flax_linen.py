"""QLoRA for Flax Linen: any existing model with ``nn.Dense`` layers, or a layer for a new one.

A Linen model keeps its parameters outside, so nothing needs surgery. ``apply_qlora`` calls the
model with a tree in which some kernels are quantized, and each ``nn.Dense`` whose kernel is one, or
that has an adapter beside it, computes ``lora_matmul`` instead. The adapters lie in the collection
of the kernel (only during the call), so ``nn.scan`` and ``nn.vmap`` slice both alike:

    frozen = quantize_params(params, where=".*/kernel")
    lora = init_lora(key, frozen, rank=8)
    y = apply_qlora(model, frozen, lora, x, alpha=16)

Only ``nn.Dense``: an ``nn.DenseGeneral`` kernel does not say which of its axes are features, so
``where`` must leave those out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from qlora_jax.dora import init_magnitude
from qlora_jax.errors import ConfigError
from qlora_jax.lora import is_quantized, lora_matmul
from qlora_jax.lora_init import init_adapter
from qlora_jax.quantized import matmul, quantize


def apply_qlora(
    model: nn.Module,
    frozen: Any,
    lora: Any,
    *args: Any,
    alpha: float = 16.0,
    use_rslora: bool = False,
    dropout: float = 0.0,
    dropout_key: Key[Array, ""] | None = None,
    **kwargs: Any,
) -> Any:
    """Calls a Linen model with quantized kernels and adapters: ``model.apply``, but for QLoRA.

    Args:
        model: any Linen module.
        frozen: its "params" collection, from ``quantize_params``; also wholly dense.
        lora: adapters from ``init_lora`` (differentiate this one), or {} for the base alone.
        *args: of the model's call.
        alpha: LoRA's alpha.
        use_rslora: divide alpha by sqrt(rank) rather than rank.
        dropout: on the adapters' input.
        dropout_key: PRNG key for it, the stream "qlora_dropout" (an ``nn.scan`` in the model has to
            split that one). None means evaluation.
        **kwargs: of ``model.apply`` (``method``, ``rngs``, ...) and of the model's call.

    Returns:
        What ``model.apply`` returns.

    Raises:
        ConfigError: a quantized kernel or an adapter belongs to no ``nn.Dense``.

    Example:
        >>> import jax
        >>> from qlora_jax.lora_init import init_lora
        >>> model, x = nn.Dense(4), jnp.ones((2, 8))
        >>> params = model.init(jax.random.key(0), x)["params"]
        >>> lora = init_lora(jax.random.key(1), params, rank=2, where="kernel")
        >>> y = apply_qlora(model, params, lora, x)
        >>> bool((y == model.apply({"params": params}, x)).all())
        True
    """

    def dense(next_call: Callable[..., Any], args: tuple, kwargs: dict, context: Any) -> Any:
        module = context.module
        if context.method_name != "__call__" or not module.has_variable("params", "kernel"):
            return next_call(*args, **kwargs)
        kernel = module.get_variable("params", "kernel")
        adapted = module.has_variable("params", "lora_a")
        if not adapted and not is_quantized(kernel):
            return next_call(*args, **kwargs)
        if not isinstance(module, nn.Dense):
            raise ConfigError(
                f"{'/'.join(module.path)} is a {type(module).__name__} with a quantized kernel or "
                "an adapter; expected nn.Dense. Leave it out of where."
            )
        (x,) = (*args, *kwargs.values())
        dtype = module.dtype or (x.dtype if is_quantized(kernel) else jnp.result_type(x, kernel))
        x = x.astype(dtype)
        weight = kernel if is_quantized(kernel) else kernel.T
        if adapted:
            y = lora_matmul(
                x,
                weight,
                {
                    name: module.get_variable("params", name)
                    for name in ("lora_a", "lora_b", "lora_magnitude")
                    if module.has_variable("params", name)
                },
                alpha=alpha,
                use_rslora=use_rslora,
                dropout=dropout,
                key=None if dropout_key is None else module.make_rng("qlora_dropout"),
            )
        else:
            y = matmul(x, weight)
        return y + module.get_variable("params", "bias").astype(dtype) if module.use_bias else y

    rngs = dict(kwargs.pop("rngs", None) or {})
    if dropout_key is not None:
        rngs["qlora_dropout"] = dropout_key
    with nn.intercept_methods(dense):
        return model.apply({"params": _joined(frozen, lora)}, *args, rngs=rngs, **kwargs)


class QLoRADense(nn.Module):
    """A dense layer with a frozen 4-bit kernel and an adapter, for models written with it.

    Collections: "quantized" holds the kernel, "params" the bias, "lora" the adapter, so that
    ``jax.grad`` over ``variables["lora"]`` is QLoRA training. Dropout draws from "dropout".

    Attributes:
        features: output features.
        rank: of the adapter.
        alpha: LoRA's alpha.
        dropout: on the adapter's input, while ``deterministic`` is False.
        use_rslora: divide alpha by sqrt(rank) rather than rank.
        use_dora: learn the magnitude of each output as well; see ``qlora_jax.dora``.
        use_bias: add a bias.
        deterministic: switches dropout off.
        lora_dtype: of the adapter.
        quant_type: "nf4", "fp4" or "int4".
        block_size: elements that share one absmax.
        double_quant: quantize the absmax values as well.
        kernel_init: of the kernel [in, out], before it is quantized.

    Example:
        >>> import jax
        >>> layer, x = QLoRADense(4, rank=2), jnp.ones((3, 8))
        >>> variables = layer.init(jax.random.key(0), x)
        >>> sorted(variables), layer.apply(variables, x).shape
        (['lora', 'params', 'quantized'], (3, 4))
    """

    features: int
    rank: int = 64
    alpha: float = 16.0
    dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    use_bias: bool = True
    deterministic: bool = True
    lora_dtype: DTypeLike = jnp.float32
    quant_type: str = "nf4"
    block_size: int = 64
    double_quant: bool = True
    kernel_init: Callable[..., Array] = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Float[Array, "*B K"]) -> Float[Array, "*B N"]:
        """Applies the layer; the result has ``x``'s dtype."""
        in_features = x.shape[-1]

        def init_kernel():
            kernel = self.kernel_init(self.make_rng("params"), (in_features, self.features))
            return quantize(
                kernel.T,
                quant_type=self.quant_type,
                block_size=self.block_size,
                double_quant=self.double_quant,
                name="/".join((*self.path, "kernel")),
            )

        def init_lora_matrix(name):
            key = self.make_rng("params")
            options = dict(rank=self.rank, dtype=self.lora_dtype)
            return init_adapter(key, in_features, self.features, **options)[name]

        kernel = self.variable("quantized", "kernel", init_kernel).value
        adapter = {
            name: self.variable("lora", name, init_lora_matrix, name).value
            for name in ("lora_a", "lora_b")
        }
        if self.use_dora:  # B is zero, so the scaling has no say yet
            magnitude = self.variable(
                "lora",
                "lora_magnitude",
                lambda: init_magnitude(kernel, *adapter.values(), 0.0, self.lora_dtype),
            )
            adapter["lora_magnitude"] = magnitude.value
        y = lora_matmul(
            x,
            kernel,
            adapter,
            alpha=self.alpha,
            use_rslora=self.use_rslora,
            dropout=self.dropout,
            key=self.make_rng("dropout") if self.dropout and not self.deterministic else None,
        )
        if self.use_bias:
            y += self.param("bias", nn.initializers.zeros, (self.features,)).astype(y.dtype)
        return y


def _joined(frozen: Any, lora: Any) -> Any:
    """The two trees as one, adapters beside their kernels; nothing is copied."""
    if not isinstance(lora, dict):
        return lora
    joined = dict(frozen)
    for name, child in lora.items():
        if isinstance(child, dict) and name not in joined:
            raise ConfigError(
                f"the adapters have a part {name!r} that the parameters lack (they have "
                f"{', '.join(joined)}). Give the parameters that the adapters were made for."
            )
        joined[name] = _joined(joined.get(name), child)
    return joined
