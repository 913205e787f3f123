"""Checks one implementation of one operation against NumPy, a question a case.

    python scripts/bench_gpu_check.py [--interpret]

Reads lines like {"operation": "matmul", "implementation": "xla", "quant_type": "nf4", ...} (see
`bench_gpu_cases.check_cases`), answers with a verdict each:

- `dequantize` and `quantize` must give the reference's bits;
- the products must agree with the float64 product of the float32 weight: the error's root mean
  square within what one rounding of weights and result to the dtype explains (`_TOLERANCE`), and no
  element further off than eight times that;
- all must give the same bits twice, with an output buffer that held NaN before.

The reference is written from the format's definition (pallas_kernels/formats.py) and shares no code
with the implementations.
"""

from __future__ import annotations

import functools
import inspect
import json
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, UInt8

from pallas_kernels.dequantize_4bit import api as dequantize_api
from pallas_kernels.formats import (
    CODEBOOKS,
    DYNAMIC_MAP,
    NESTED_BLOCK_SIZE,
    decision_bounds,
    num_blocks,
    plane_size,
)
from pallas_kernels.matmul_4bit import api as matmul_api
from pallas_kernels.quantize_4bit import api as quantize_api

APIS = {
    "dequantize": dequantize_api,
    "matmul": matmul_api,
    "matmul_transposed": matmul_api,
    "quantize": quantize_api,
}
INTERPRETED = ("mosaic_gpu", "triton")
# Relative to the result's root mean square. A weight and a result rounded to 16 bits give together
# about 2.4e-3 (bfloat16) and 3e-4 (float16); a forgotten column of 4096 gives 1.6e-2. float32
# products run in TF32 on GPUs.
_TOLERANCE = {"bfloat16": 4e-3, "float16": 6e-4, "float32": 1e-3}

_RANK = 64

Packed = tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]


def random_packed(case: dict[str, Any], seed: int) -> Packed:
    """Random codes and scales of a weight: no zeros, nothing that a wrong index could hide."""
    rng = np.random.default_rng(seed)
    size, block_size = case["shape"][0] * case["shape"][1], case["block_size"]
    blocks = num_blocks(size, block_size)
    codes = rng.integers(0, 256, plane_size(size, block_size), np.uint8)
    if not case["double_quant"]:
        return codes, rng.uniform(0.01, 0.1, blocks).astype(np.float32), None, None
    nested = rng.uniform(0.01, 0.03, num_blocks(blocks, NESTED_BLOCK_SIZE)).astype(np.float32)
    return codes, rng.integers(0, 256, blocks, np.uint8), nested, np.float32(0.05)


def reference_weight(packed: Packed, case: dict[str, Any]) -> Float32[np.ndarray, "N K"]:
    """`codebook[code] * absmax` in float32."""
    codes, absmax, nested, offset = packed
    if nested is not None:
        scale = np.repeat(nested, NESTED_BLOCK_SIZE)[: absmax.size]
        absmax = DYNAMIC_MAP[absmax] * scale + offset
    size = case["shape"][0] * case["shape"][1]
    values = CODEBOOKS[case["quant_type"]][np.concatenate([codes >> 4, codes & 15])[:size]]
    return (values * np.repeat(absmax, case["block_size"])[:size]).reshape(case["shape"])


def random_epilogue(
    rng: np.random.Generator, case: dict[str, Any], dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A bias [N] and a low-rank update [M, r], [r, N], as large as the product itself."""
    rows, n, size = case["rows"], case["shape"][0], 0.05 * case["shape"][1] ** 0.5
    shapes = ((n,), (rows, _RANK), (_RANK, n))
    scales = (size, 1.0, size / _RANK**0.5)
    parts = (rng.standard_normal(s) * c for s, c in zip(shapes, scales, strict=True))
    return tuple(part.astype(dtype) for part in parts)


def _with_epilogue(function: Any, *arguments: Any) -> jax.Array:
    *product, bias, xa, b = arguments
    return function(*product, bias=bias, lora=(xa, b))


def reference_quantize(
    x: Float32[np.ndarray, "N K"], case: dict[str, Any]
) -> tuple[UInt8[np.ndarray, " plane"], Float32[np.ndarray, " blocks"]]:
    """Codes and absmax; a short last block divides by absmax, all others multiply."""
    block_size, count = case["block_size"], num_blocks(x.size, case["block_size"])
    padded = np.zeros(2 * plane_size(x.size, block_size), np.float32)
    padded[: x.size] = x.reshape(-1)
    blocks = padded.reshape(-1, block_size)
    absmax = np.abs(blocks).max(axis=1)
    safe = np.where(absmax > 0, absmax, np.float32(1))
    scaled = blocks * (np.float32(1) / safe)[:, None]
    if x.size % block_size:
        scaled[count - 1] = blocks[count - 1] / safe[count - 1]
    bounds, codes = decision_bounds(case["quant_type"])
    index = codes[np.searchsorted(bounds, scaled.reshape(-1), side="left")]
    high, low = index.reshape(2, -1)
    return high << 4 | low, absmax[:count]


def kernel(operation: str, implementation: str) -> Any:
    """The function that implements an operation, below the public API."""
    function = APIS[operation].IMPLEMENTATIONS[implementation]
    if operation.startswith("matmul"):
        function = function[operation == "matmul_transposed"]
    return function


def tiles_type(operation: str, implementation: str) -> Any:
    """The dataclass of a kernel's keyword `tiles`; None where it has no such keyword."""
    function = inspect.unwrap(kernel(operation, implementation))
    parameter = inspect.signature(function).parameters.get("tiles")
    if parameter is None:
        return None
    return getattr(inspect.getmodule(function), str(parameter.annotation).split("|")[0].strip())


def bind(
    operation: str,
    implementation: str | None,
    interpret: bool,
    tiles: Any = None,
    **static: Any,
) -> Any:
    """The operation as a function of arrays.

    It is called as users do, by the public API; for what that does not offer, a kernel run on the
    CPU or cut into other tiles, the kernel's own function is.

    Args:
        operation: of `APIS`.
        implementation: a name, or None for what the API chooses.
        interpret: run a GPU kernel on the CPU.
        tiles: of the kernel, or None for its own choice.
        **static: the operation's keyword arguments.
    """
    api = APIS[operation]
    interpret = interpret and implementation in INTERPRETED
    if interpret or tiles is not None:
        options = {"interpret": True} if interpret else {}
        options |= {} if tiles is None else {"tiles": tiles}
        return functools.partial(kernel(operation, implementation), **static, **options)
    if operation == "dequantize":
        function = api.dequantize_4bit
    elif operation == "quantize":
        function = api.quantize_4bit
    elif operation == "matmul":
        function = api.matmul_4bit
    else:
        function = _gradient
    return functools.partial(function, **static, implementation=implementation)


def _gradient(g: Float[jax.Array, "M N"], *packed: Any, shape: Any, **static: Any):
    """The gradient of `x` as `jax.grad` takes it, for any number of rows."""

    def product(x):
        return matmul_api.matmul_4bit(x, *packed, shape=shape, **static)

    _, transpose = jax.vjp(product, jnp.zeros((g.shape[0], shape[1]), g.dtype))
    return transpose(g)[0]


def check(case: dict[str, Any], *, interpret: bool) -> dict[str, Any]:
    """The verdict on one case: `ok`, `wrong` or `unsupported`, and the figures behind it."""
    operation, dtype = case["operation"], jnp.dtype(case["dtype"])
    packed = random_packed(case, seed=1)
    static = {"quant_type": case["quant_type"], "block_size": case["block_size"]}
    rng, epilogue = np.random.default_rng(2), ()
    if operation == "quantize":
        x = rng.standard_normal(case["shape"]).astype(np.float32).astype(dtype)
        arguments, wanted = (x,), reference_quantize(x.astype(np.float32), case)
    else:
        static["shape"] = tuple(case["shape"])
        weight = reference_weight(packed, case)
        if operation == "dequantize":
            static["dtype"] = dtype
            arguments, wanted = packed, (weight.astype(dtype),)
        else:
            factor = weight.T if operation == "matmul" else weight
            x = rng.standard_normal((case["rows"], factor.shape[0])).astype(dtype)
            arguments = (x, *packed)
            wanted = (x.astype(np.float64) @ factor.astype(np.float64),)
            if case["epilogue"]:
                epilogue = random_epilogue(rng, case, dtype)
                bias, xa, b = (part.astype(np.float64) for part in epilogue)
                wanted = (wanted[0] + bias + xa @ b,)
    tiles = case.get("tiles")
    if tiles is not None:
        tiles = tiles_type(operation, case["implementation"])(**tiles)
    function = bind(operation, case["implementation"], interpret, tiles, **static)
    if epilogue:
        arguments, function = (*arguments, *epilogue), functools.partial(_with_epilogue, function)
    arguments = jax.tree.map(jnp.asarray, arguments)
    started = time.perf_counter()
    try:
        compiled = jax.jit(function).lower(*arguments).compile()
    except (NotImplementedError, ValueError) as error:
        if not _refused(error):
            raise
        return {"verdict": "unsupported", "detail": str(error)}
    report = {"compile_s": time.perf_counter() - started}
    first, second = (_run_poisoned(compiled, arguments) for _ in range(2))
    return report | _compare(first, second, wanted, str(case["dtype"]))


def _refused(error: BaseException) -> bool:
    """The API answers with ValueError when the implementation that was asked for refuses."""
    return isinstance(error, NotImplementedError) or isinstance(
        error.__cause__, NotImplementedError
    )


def _run_poisoned(compiled: Any, arguments: Any) -> list[np.ndarray]:
    """The results, in memory that an array of NaN (or of the byte 0xFF) was just freed from."""
    poison = [
        jnp.full(leaf.shape, jnp.nan if jnp.issubdtype(leaf.dtype, jnp.floating) else 255)
        .astype(leaf.dtype)
        .block_until_ready()
        for leaf in jax.tree.leaves(compiled.out_info)
    ]
    for leaf in poison:
        leaf.delete()
    return [np.asarray(leaf) for leaf in jax.tree.leaves(compiled(*arguments))]


def _compare(first: Any, second: Any, wanted: Any, dtype: str) -> dict[str, Any]:
    if any(a.tobytes() != b.tobytes() for a, b in zip(first, second, strict=True)):
        return {"verdict": "wrong", "detail": "two runs gave different bits"}
    shapes = [got.shape for got in first], [want.shape for want in wanted]
    if shapes[0] != shapes[1]:
        return {"verdict": "wrong", "detail": f"shapes {shapes[0]}, expected {shapes[1]}"}
    if wanted[0].dtype != np.float64:
        wrong = [
            int((got.reshape(-1).view(np.uint8) != want.reshape(-1).view(np.uint8)).sum())
            for got, want in zip(first, map(np.ascontiguousarray, wanted), strict=True)
        ]
        detail = f"{wrong} bytes differ, of {[got.nbytes for got in first]}"
        return {"verdict": "wrong" if any(wrong) else "ok", "detail": detail if any(wrong) else ""}
    difference, size = first[0].astype(np.float64) - wanted[0], np.sqrt((wanted[0] ** 2).mean())
    rms, largest = np.sqrt((difference**2).mean()) / size, np.abs(difference).max() / size
    limit = _TOLERANCE[dtype]
    good = rms <= limit and largest <= 8 * limit  # NaN is neither
    detail = "" if good else f"error {rms:.1e} (largest {largest:.1e}), allowed {limit:.1e}"
    report = {"verdict": "ok" if good else "wrong", "detail": detail}
    return report | {"error_rms": float(rms), "error_max": float(largest)}


def main() -> None:
    """Answers until standard input ends."""
    interpret = "--interpret" in sys.argv[1:]
    for line in sys.stdin:
        try:
            answer = check(json.loads(line), interpret=interpret)
        except Exception as error:  # a row, not the end
            answer = {"verdict": "error", "detail": f"{type(error).__name__}: {error}"[:500]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
