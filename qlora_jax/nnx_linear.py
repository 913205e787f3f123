"""The adapted linear layer of Flax NNX: a frozen kernel and two LoRA matrices.

``qlora_jax.flax_nnx`` puts it into models; the mathematics is in ``qlora_jax.lora``. The layer
keeps what it needs to become the ``nnx.Linear`` or ``nnx.LinearGeneral`` again that it replaced.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from qlora_jax.dora import init_magnitude, scale_outputs
from qlora_jax.lora import is_quantized, lora_delta, lora_scaling
from qlora_jax.lora_init import init_adapter
from qlora_jax.mixed import MixedStack, dense_layer, multiply_mixed
from qlora_jax.models.unscanned import UnscannedVariable
from qlora_jax.quantized import QuantizedTensor, matmul, quantize


class QuantizedParam(nnx.Variable):
    """Holds a ``QuantizedTensor`` (or ``Int8Rows``). No ``nnx.Param``: no optimizer picks it up."""


class MixedParam(QuantizedParam, UnscannedVariable):
    """Holds a ``MixedStack``: kernels of stacked layers that are not all in one format."""


class SubtractedParam(nnx.Variable):
    """Half of what was taken out of a weight before it was quantized (``subtraction``); frozen."""


class QLoRALinear(nnx.Module):
    """A linear layer with a frozen (4-bit or dense) kernel and, if ``rank > 0``, a LoRA adapter.

    ``y = x @ W.T + (dropout(x) @ A) * s @ B + bias`` (with DoRA ``* m / n`` before the bias) over
    the input axes ``axis``, as ``nnx.LinearGeneral`` does; a plain linear contracts the last axis.
    Made by ``quantize_model`` and ``apply_qlora`` out of the model's own layers.

    Attributes:
        kernel: ``QuantizedParam`` with a tensor of shape (out_features, in_features), or the dense
            ``nnx.Param`` [*L, *in_shape, *out_shape] of the layer that this one replaces, or a
            ``MixedParam`` where stacked layers differ.
        bias: ``nnx.Param`` [*L, *out_shape] or None; frozen.
        lora_a: ``nnx.LoRAParam`` [*L, in_features, rank], None for rank 0.
        lora_b: ``nnx.LoRAParam`` [*L, rank, out_features], None for rank 0.
        lora_magnitude: ``nnx.LoRAParam`` [*L, out_features], None without DoRA.
        subtracted_a: ``SubtractedParam`` like lora_a, or None; only for ``original_adapter``.
        subtracted_b: likewise.
        in_features: number of input features, over all of ``axis``.
        out_features: number of output features.
        dtype: compute dtype. None: that of the input (with a dense kernel: of input and kernel,
            promoted, as in ``nnx.Linear``).
        deterministic: True switches dropout off; ``model.eval()`` and ``model.train()`` set it.
        rngs: the layer's own dropout stream [*L], None without dropout.

    Example:
        >>> linear = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
        >>> layer = QLoRALinear.from_linear(linear)
        >>> layer.quantize_kernel()
        >>> layer(jnp.ones((3, 8))).shape, layer.rank
        ((3, 4), 0)
    """

    def __init__(
        self,
        kernel: nnx.Variable,
        bias: nnx.Variable | None,
        *,
        in_shape: tuple[int, ...],
        out_shape: tuple[int, ...],
        axis: tuple[int, ...] = (-1,),
        general: bool = False,
        dtype: DTypeLike | None = None,
        precision: Any = None,
    ):
        """Takes over the variables of a layer, without an adapter.

        Args:
            kernel: see the class.
            bias: see the class.
            in_shape: sizes of the contracted input axes.
            out_shape: sizes of the output axes they are replaced by.
            axis: the contracted input axes.
            general: whether merging gives back an ``nnx.LinearGeneral``, else an ``nnx.Linear``.
            dtype: see the class.
            precision: of the product with a dense kernel.
        """
        self.kernel = kernel
        self.bias = nnx.data(bias)
        self.in_shape, self.out_shape, self.axis = in_shape, out_shape, axis
        self.in_features, self.out_features = math.prod(in_shape), math.prod(out_shape)
        self.general = general
        self.dtype = dtype
        self.precision = precision
        self.lora_a = nnx.data(None)
        self.lora_b = nnx.data(None)
        self.lora_magnitude = nnx.data(None)
        self.subtracted_a = nnx.data(None)
        self.subtracted_b = nnx.data(None)
        self.rank, self.alpha, self.dropout, self.use_rslora = 0, 16.0, 0.0, False
        self.deterministic = False
        self.rngs = nnx.data(None)

    @classmethod
    def from_linear(cls, linear: nnx.Linear | nnx.LinearGeneral) -> QLoRALinear:
        """A layer that computes what ``linear`` does and shares its variables.

        Custom ``dot_general`` and ``promote_dtype`` functions are not kept.
        """
        general = isinstance(linear, nnx.LinearGeneral)
        return cls(
            linear.kernel,
            linear.bias,
            in_shape=linear.in_features if general else (linear.in_features,),
            out_shape=linear.out_features if general else (linear.out_features,),
            axis=linear.axis if general else (-1,),
            general=general,
            dtype=linear.dtype,
            precision=linear.precision,
        )

    @property
    def leading_shape(self) -> tuple[int, ...]:
        """The axes of stacked layers, () for a layer that can be called."""
        value = self.kernel.get_value()
        if isinstance(value, QuantizedTensor | MixedStack):
            return tuple(value.leading_shape)
        return tuple(value.shape[: value.ndim - len(self.in_shape) - len(self.out_shape)])

    @property
    def adapter(self) -> dict[str, Array]:
        """The adapter as ``qlora_jax.lora`` takes it. The layer must have one."""
        names = ("lora_a", "lora_b", "lora_magnitude")
        variables = {name: getattr(self, name) for name in names}
        return {k: v.get_value() for k, v in variables.items() if v is not None}

    @property
    def original_adapter(self) -> tuple[dict[str, Array], float]:
        """The adapter that computes the same on the *original* weight, and its alpha.

        Where s A0 B0 was taken out of the weight, it is [A, A0] and [B; -B0], of twice the rank and
        with the same scaling, as PEFT converts PiSSA and OLoRA. But for what quantization loses:
        Q(W - s A0 B0) + s A0 B0 is not Q(W).
        """
        if self.subtracted_a is None:
            return self.adapter, self.alpha
        a, b = self.subtracted_a.get_value(), -self.subtracted_b.get_value()
        adapter = self.adapter
        wider = adapter | {
            "lora_a": jnp.concatenate([adapter["lora_a"], a], axis=-1),
            "lora_b": jnp.concatenate([adapter["lora_b"], b], axis=-2),
        }
        return wider, self.alpha * (math.sqrt(2.0) if self.use_rslora else 2.0)

    @property
    def matrix_kernel(self) -> QuantizedTensor | MixedStack | Float[Array, "*L K N"]:
        """The kernel as ``merge_weight`` takes it: quantized or [*L, in_features, out_features]."""
        kernel = self.kernel.get_value()
        if isinstance(kernel, QuantizedTensor | MixedStack):
            return kernel
        return kernel.reshape(*self.leading_shape, self.in_features, self.out_features)

    def quantize_kernel(self, *, name: str = "kernel", **options: Any) -> None:
        """Replaces a dense kernel by its quantized form.

        Args:
            name: what a NaN or infinity in the kernel is reported under.
            **options: ``quant_type``, ``block_size``, ``double_quant`` of ``quantize``.
        """

        shape = (*self.leading_shape, self.in_features, self.out_features)

        def convert(kernel):
            return _quantize_stack(kernel.reshape(shape), name=name, **options)

        self.kernel = QuantizedParam(_maybe_abstract(convert, self.kernel.get_value()))

    def add_adapter(
        self, *, rank: int, alpha: float, use_rslora: bool, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        """Adds a new adapter (A from the stream ``params``, B zero)."""

        def init(key, _):
            return init_adapter(
                key,
                self.in_features,
                self.out_features,
                rank=rank,
                leading_shape=self.leading_shape,
                dtype=dtype,
            )

        adapter = _maybe_abstract(init, rngs.params(), self.kernel.get_value())
        self.lora_a, self.lora_b = (nnx.LoRAParam(adapter[name]) for name in ("lora_a", "lora_b"))
        self.rank, self.alpha, self.use_rslora = rank, alpha, use_rslora

    def add_magnitude(self) -> None:
        """Makes the adapter one of DoRA that computes, for now, what it did without."""

        def init(kernel, a, b):
            scaling = lora_scaling(self.rank, self.alpha, self.use_rslora)
            return init_magnitude(kernel, a, b, scaling, a.dtype)

        adapter = self.lora_a.get_value(), self.lora_b.get_value()
        self.lora_magnitude = nnx.LoRAParam(_maybe_abstract(init, self.matrix_kernel, *adapter))

    def add_dropout(self, rate: float, rngs: nnx.Rngs) -> None:
        """Adds dropout on the adapter's input, with a stream of its own forked from ``dropout``."""
        leading = self.leading_shape
        self.dropout = rate
        self.rngs = rngs.dropout.split(leading) if leading else rngs.dropout.fork()

    def __call__(self, x: Float[Array, "*A"], out_sharding: Any = None) -> Float[Array, "*C"]:
        """Applies the layer.

        Args:
            x: input; the axes ``axis`` have the sizes ``in_shape``.
            out_sharding: sharding of the result, for meshes with explicit axes.

        Returns:
            The other axes of ``x`` followed by ``out_shape``, in the compute dtype.
        """
        kernel = self.matrix_kernel
        if self.leading_shape:
            raise ValueError(
                f"this layer is a stack {self.leading_shape} of layers; take one with jax.lax.scan "
                "or nnx.vmap before calling it."
            )
        x = x.astype(self._compute_dtype(x, kernel))
        count = len(self.axis)
        # In the order of the input, not of `axis`: so nnx.LinearGeneral pairs them with its kernel.
        axes = sorted(axis % x.ndim for axis in self.axis)
        x = jnp.moveaxis(x, axes, range(-count, 0))
        x = x.reshape(*x.shape[: x.ndim - count], self.in_features)
        if is_quantized(kernel):
            y = matmul(x, kernel)
        elif isinstance(kernel, MixedStack):
            y = multiply_mixed(x, kernel, self.precision)
        else:
            y = jnp.matmul(x, kernel.astype(x.dtype), precision=self.precision)
        if self.rank:
            training = self.dropout > 0.0 and not self.deterministic
            y += lora_delta(
                x,
                self.adapter,
                alpha=self.alpha,
                use_rslora=self.use_rslora,
                dropout=self.dropout,
                key=self.rngs() if training else None,
            )
        if self.lora_magnitude is not None:
            if isinstance(kernel, MixedStack):
                weight = dense_layer(kernel, x.dtype)
            else:
                weight = kernel if is_quantized(kernel) else kernel.T
            scaling = lora_scaling(self.rank, self.alpha, self.use_rslora)
            y = scale_outputs(y, weight, self.adapter, scaling)
        y = y.reshape(*y.shape[:-1], *self.out_shape)
        if self.bias is not None:
            y += self.bias.get_value().astype(y.dtype)
        return y if out_sharding is None else jax.sharding.reshard(y, out_sharding)

    def with_kernel(
        self, kernel: QuantizedTensor | MixedStack | Float[Array, "*L K N"]
    ) -> QLoRALinear | nnx.Linear | nnx.LinearGeneral:
        """The layer with another kernel and without its adapter; the bias is shared.

        Args:
            kernel: quantized or mixed, for a ``QLoRALinear`` of rank 0, or dense [*L,
                in_features, out_features], for a plain layer of the kind that this one replaced.
        """
        if isinstance(kernel, QuantizedTensor | MixedStack):
            return QLoRALinear(
                MixedParam(kernel) if isinstance(kernel, MixedStack) else QuantizedParam(kernel),
                self.bias,
                in_shape=self.in_shape,
                out_shape=self.out_shape,
                axis=self.axis,
                general=self.general,
                dtype=self.dtype,
                precision=self.precision,
            )
        # Built without values: only the attributes of the plain layer are of interest.
        plain = nnx.eval_shape(lambda: self._build_plain(kernel.dtype))
        shape = (*self.leading_shape, *self.in_shape, *self.out_shape)
        plain.kernel = nnx.Param(kernel.reshape(shape))
        if self.bias is not None:
            plain.bias = self.bias
        return plain

    def _build_plain(self, param_dtype: DTypeLike) -> nnx.Linear | nnx.LinearGeneral:
        options = dict(
            use_bias=self.bias is not None,
            dtype=self.dtype,
            param_dtype=param_dtype,
            precision=self.precision,
            rngs=nnx.Rngs(0),
        )
        if self.general:
            return nnx.LinearGeneral(self.in_shape, self.out_shape, axis=self.axis, **options)
        return nnx.Linear(self.in_features, self.out_features, **options)

    def set_view(self, deterministic: bool | None = None) -> None:
        """What ``nnx.view`` may set on this module."""
        if deterministic is not None:
            self.deterministic = deterministic

    def _compute_dtype(self, x: Array, kernel: Any) -> DTypeLike:
        if self.dtype is not None:
            return self.dtype
        packed = isinstance(kernel, QuantizedTensor | MixedStack)
        if packed and jnp.issubdtype(x.dtype, jnp.floating):
            return x.dtype
        return jnp.result_type(x.dtype, kernel.dtype)


def _quantize_stack(
    matrices: Float[Array, "*L K N"], *, name: str, **options: Any
) -> QuantizedTensor:
    """Quantizes Flax kernels [*L, in, out] to (out, in), one matrix at a time."""
    leading = matrices.shape[:-2]
    if not leading:
        return quantize(matrices.T, name=name, **options)
    flat = matrices.reshape(-1, *matrices.shape[-2:])
    if isinstance(flat, jax.core.Tracer):
        stacked = jax.vmap(lambda matrix: quantize(matrix.T, name=name, **options))(flat)
    else:
        # Not under vmap or lax.map: values must be concrete for NaN to be refused by name.
        parts = [quantize(m.T, name=f"{name}[{i}]", **options) for i, m in enumerate(flat)]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
    return jax.tree.map(lambda leaf: leaf.reshape(*leading, *leaf.shape[1:]), stacked)


def _maybe_abstract(function: Any, *args: Any) -> Any:
    """Calls a function, or only its shapes (``jax.eval_shape``) if an argument has no values."""
    abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(args))
    return jax.eval_shape(function, *args) if abstract else function(*args)
