"""Adapters that begin with a part of the weight, or of what quantizing it lost.

For a weight W (out, in) and the scaling s, each of these gives an adapter A [in, r], B [r, out] and
says what has to be taken out of W before it is quantized, so that the sum is W again:

    default   A random, B zero. Nothing is taken out. (``qlora_jax.lora_init``)
    pissa     The r largest singular triples: s A B = U_r S_r V_r', the singular values shared
              equally by both, and the *rest* is quantized: base = Q(W - s A B). Training then moves
              the principal directions at once. (PiSSA, arXiv 2404.02948; quantized: QPiSSA)
    pissa_niter_<n>   The same by n rounds of subspace iteration on a random start (Halko et al.,
              arXiv 0909.4061), which is much faster for large weights.
    olora     W = QR: B is the first r columns of Q, orthonormal, and A the first r rows of R;
              base = Q(W - s A B). (OLoRA, arXiv 2406.01775)
    loftq     A B is what quantization lost: s A B = SVD_r(W - Q(W)), so training starts nearer to
              the 16-bit model. With more iterations base and adapter take turns, and what was the
              adapter before the last turn is taken out of W: base = Q(W - s A' B').
              (LoftQ, arXiv 2310.08659)

The names are those of PEFT's ``init_lora_weights``, and so is the arithmetic, with two differences.
PEFT's LoftQ leaves the scaling out, so that there it is right for alpha = rank only; here A B is
divided by s. And PEFT rounds the rest of a 16-bit weight to 16 bits before it is quantized.

A base that something was taken out of is made again from the original weights and the matrices
alone, without another decomposition: ``subtract`` works in float64 on the host, where the order of
sums, which differs between machines, is far below a rounding of the result.
"""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from qlora_jax.errors import ConfigError
from qlora_jax.lora import Adapter, lora_scaling
from qlora_jax.quantized import dequantize, quantize

INITS = ("default", "pissa", "pissa_niter_<n>", "olora", "loftq")
# Columns that subspace iteration carries beyond those asked for.
_OVERSAMPLING = 16
_ROWS_ELEMENTS = 1 << 22


class WeightInit(NamedTuple):
    """How the adapter of a weight begins.

    Attributes:
        adapter: ``{"lora_a": [in, r], "lora_b": [r, out]}``.
        subtracted: the adapter whose product, scaled, goes out of the weight before it is
            quantized; None: nothing does.
    """

    adapter: Adapter
    subtracted: Adapter | None


def check_init(init: str) -> None:
    """Refuses a name that is none.

    Raises:
        ConfigError: listing those that are.

    Example:
        >>> check_init("pissa_niter_4")
    """
    if not re.fullmatch("default|pissa(_niter_[0-9]+)?|olora|loftq", init):
        raise ConfigError(f"{init=}: expected one of {', '.join(INITS)}, with a number for <n>.")


def init_from_weight(
    w: np.ndarray | Float[Array, "N K"],
    init: str,
    *,
    rank: int,
    alpha: float,
    use_rslora: bool = False,
    dtype: DTypeLike = jnp.float32,
    loftq_iterations: int = 1,
    quant_type: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
) -> WeightInit:
    """The adapter that a weight begins with; see the module.

    Args:
        w: the dense weight (out, in), float of 16 or 32 bits.
        init: "pissa", "pissa_niter_<n>", "olora" or "loftq".
        rank: r, at most the smaller side of the weight.
        alpha: LoRA's alpha, above 0.
        use_rslora: divide alpha by sqrt(rank) rather than rank.
        dtype: of the adapter.
        loftq_iterations: turns of quantizing and decomposing, at least 1.
        quant_type: how the base will be quantized; only LoftQ asks.
        block_size: likewise.
        double_quant: likewise.

    Returns:
        The adapter and what to ``subtract`` from ``w``.

    Raises:
        ConfigError: an argument is out of range.

    Example:
        >>> w = jnp.diag(jnp.array([3.0, 2.0, 1.0]))
        >>> adapter, subtracted = init_from_weight(w, "pissa", rank=2, alpha=2)
        >>> subtract(w, subtracted, lora_scaling(2, 2)).diagonal().round(3) + 0.0
        array([0., 0., 1.], dtype=float32)
    """
    check_init(init)
    scaling = lora_scaling(rank, alpha, use_rslora)
    if rank > min(w.shape):
        raise ConfigError(
            f"{rank=} is more than a weight of {w.shape[0]} x {w.shape[1]} has singular values; "
            f"with {init=} it can be at most {min(w.shape)}. Lower it, or leave such layers out."
        )
    if init == "default" or not scaling > 0 or loftq_iterations < 1:
        raise ConfigError(
            f"{init=}, {alpha=}, {loftq_iterations=}: expected an init that looks at the weight, "
            "an alpha above 0 and at least one iteration."
        )
    if init == "loftq":
        options = dict(quant_type=quant_type, block_size=block_size, double_quant=double_quant)
        return _loftq(w, rank, scaling, loftq_iterations, dtype, options)
    w = jnp.asarray(w, jnp.float32)
    if init == "olora":
        adapter = _olora(w, rank)
    else:
        iterations = int(init.rpartition("_")[2]) if "_" in init else None
        adapter = _principal(w, rank, scaling, iterations)
    adapter = {name: matrix.astype(dtype) for name, matrix in adapter.items()}
    return WeightInit(adapter, adapter)


def subtract(
    w: np.ndarray | Float[Array, "N K"], adapter: Adapter, scaling: float
) -> Float32[np.ndarray, "N K"]:
    """``W - s * (A @ B).T``, in float64 and rounded once, so that every machine gets the same.

    Args:
        w: the dense weight (out, in).
        adapter: ``lora_a`` [in, r] and ``lora_b`` [r, out].
        scaling: s.

    Example:
        >>> adapter = {"lora_a": np.ones((2, 1)), "lora_b": np.array([[1.0, 2.0]])}
        >>> subtract(np.eye(2), adapter, 0.5)
        array([[ 0.5, -0.5],
               [-1. ,  0. ]], dtype=float32)
    """
    w = np.asarray(w)
    a = np.asarray(adapter["lora_a"]).astype(np.float64).T * scaling
    b = np.asarray(adapter["lora_b"]).astype(np.float64).T
    rest = np.empty(w.shape, np.float32)
    step = max(1, _ROWS_ELEMENTS // w.shape[1])
    for start in range(0, len(w), step):
        rows = slice(start, start + step)
        rest[rows] = w[rows].astype(np.float64) - b[rows] @ a
    return rest


@functools.partial(jax.jit, static_argnames=("rank", "iterations"))
def _principal(w: Array, rank: int, scaling: float, iterations: int | None) -> Adapter:
    """A and B whose product, scaled, is the best approximation of rank r."""
    if iterations is None:
        u, s, vh = jnp.linalg.svd(w, full_matrices=False)
    else:
        u, s, vh = _subspace_svd(w, rank, iterations)
    root = jnp.sqrt(s[:rank] / scaling)
    return {"lora_a": (root[:, None] * vh[:rank]).T, "lora_b": (u[:, :rank] * root).T}


def _subspace_svd(w: Array, rank: int, iterations: int) -> tuple[Array, Array, Array]:
    product = functools.partial(jnp.matmul, precision="highest")
    columns = min(rank + _OVERSAMPLING, *w.shape)
    start = jax.random.normal(jax.random.key(0), (w.shape[1], columns))
    basis = jnp.linalg.qr(product(w, start))[0]
    for _ in range(iterations):
        basis = jnp.linalg.qr(product(w.T, basis))[0]
        basis = jnp.linalg.qr(product(w, basis))[0]
    u, s, vh = jnp.linalg.svd(product(basis.T, w), full_matrices=False)
    return product(basis, u), s, vh


@functools.partial(jax.jit, static_argnames="rank")
def _olora(w: Array, rank: int) -> Adapter:
    q, r = jnp.linalg.qr(w)
    return {"lora_a": r[:rank].T, "lora_b": q[:, :rank].T}


def _loftq(
    w: np.ndarray, rank: int, scaling: float, iterations: int, dtype: DTypeLike, options: dict
) -> WeightInit:
    adapter, subtracted, rest = None, None, w
    for _ in range(iterations):
        if adapter is not None:
            subtracted, rest = adapter, subtract(w, adapter, scaling)
        lost = jnp.asarray(w, jnp.float32) - dequantize(quantize(rest, **options), jnp.float32)
        adapter = _principal(lost, rank, scaling, None)
    return WeightInit({k: v.astype(dtype) for k, v in adapter.items()}, subtracted)
