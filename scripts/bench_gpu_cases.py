"""What the suite `gpu` measures: its sizes, the order of its questions, and its goals.

Plain data for all its processes, also the rival's, whose Python has nothing of this project. What
matters most comes first: when the time is over, the rest is left out and named.
"""

from __future__ import annotations

import dataclasses
from typing import Any

Case = dict[str, Any]

OPERATIONS = ("dequantize", "matmul", "matmul_transposed", "quantize")
IMPLEMENTATIONS = ("mosaic_gpu", "triton", "xla", "dequantize")
# What users get, the dense products it is compared with, and the rival.
DEFAULT, JAX_DENSE, TORCH_DENSE, RIVAL = "default", "jnp.dot bf16", "torch bf16", "bitsandbytes"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """All sizes of one run of the suite.

    Attributes:
        shapes: weights `(out_features, in_features)`, of LLaMA.
        rows: of the left factor.
        check_shapes: ragged weights, and one of LLaMA's.
        check_rows: of the left factor in the checks.
        check_formats: how many of the formats are checked.
        calls: timed in a turn, after `warm_up` that are not.
        warm_up: see `calls`.
        turns: of each side, for each case.
        model: of the whole steps; names as in Hugging Face's config.json.
        large_model: is only decoded.
        batch: sequences in a training step.
        length: tokens in a sequence.
        rank: of the adapters.
        loss_chunk: tokens whose logits exist at one time.
        steps: optimizer steps timed, after `step_warm_up` that are not.
        step_warm_up: see `steps`.
        prompt: tokens of the prompt.
        new_tokens: two counts; the time between them is that of decoding alone.
    """

    shapes: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    check_shapes: tuple[tuple[int, int], ...]
    check_rows: tuple[int, ...]
    check_formats: int
    calls: int
    warm_up: int
    turns: int
    model: dict[str, int]
    large_model: dict[str, int]
    batch: int
    length: int
    rank: int
    loss_chunk: int
    steps: int
    step_warm_up: int
    prompt: int
    new_tokens: tuple[int, int]


FULL = Sizes(
    shapes=(
        (4096, 4096),
        (8192, 8192),
        (22016, 8192),
        (11008, 4096),
        (4096, 11008),
        (6656, 6656),
        (17920, 6656),
    ),
    rows=(1, 16, 4096, 64, 4, 512),
    # 130 rows and 192 = 64 * 3 columns fit no tile; 4098 x 4032 = 64 * 63 is large and ragged.
    check_shapes=((130, 192), (4098, 4032), (4096, 4096)),
    check_rows=(1, 3, 16, 64, 300),
    check_formats=7,
    calls=25,
    warm_up=3,
    turns=2,
    model=dict(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=2048,
    ),
    large_model=dict(
        vocab_size=32000,
        hidden_size=8192,
        intermediate_size=22016,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=64,
        max_position_embeddings=2048,
    ),
    batch=4,
    length=2048,
    rank=64,
    loss_chunk=256,
    steps=4,
    step_warm_up=1,
    prompt=128,
    new_tokens=(16, 128),
)

DRY_RUN = Sizes(
    shapes=((256, 128),),
    rows=(1, 64),
    check_shapes=((130, 192),),
    check_rows=(1, 16),
    check_formats=2,
    calls=1,
    warm_up=1,
    turns=2,
    model=dict(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
    ),
    large_model=dict(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
    ),
    batch=2,
    length=32,
    rank=4,
    loss_chunk=16,
    steps=2,
    step_warm_up=1,
    prompt=8,
    new_tokens=(2, 6),
)


def timing_cases(sizes: Sizes) -> list[Case]:
    """All cases to time, those of the goals first.

    >>> [case["operation"] for case in timing_cases(DRY_RUN)[:4]]
    ['dequantize', 'matmul', 'matmul', 'matmul_transposed']
    """
    goals, others = [], []
    for shape in sizes.shapes:
        large = shape[0] * shape[1] >= 8192 * 8192
        wanted = {("dequantize", 0), ("matmul", max(sizes.rows))}
        if large or shape == sizes.shapes[0]:
            wanted.add(("matmul", 1))
        if shape == sizes.shapes[0]:
            wanted.add(("matmul", 16))
        products = [(name, rows) for name in ("matmul", "matmul_transposed") for rows in sizes.rows]
        for name, rows in [("dequantize", 0), ("quantize", 0), *products]:
            case = {"operation": name, "shape": list(shape), "rows": rows}
            (goals if (name, rows) in wanted else others).append(case)
    # Of the rest, first every shape with one row, and so on: a cut then takes the rarest of all.
    kinds = [(name, rows) for rows in sizes.rows for name in ("matmul", "matmul_transposed")]
    order = {kind: index for index, kind in enumerate([*kinds[:2], ("quantize", 0), *kinds[2:]])}
    others.sort(key=lambda case: order[case["operation"], case["rows"]])
    return goals + others


def check_cases(sizes: Sizes, operation: str) -> list[Case]:
    """All checks of an operation, the format that models use first.

    In that format the smallest shape has all row counts, the others the first and the last but one
    (the most that fused products take), and one product has a bias and a low-rank update. In the
    other formats there is the smallest shape.
    """
    formats = [("nf4", True, 64, "bfloat16")]
    formats += [("nf4", False, 64, "bfloat16"), ("fp4", True, 64, "bfloat16")]
    formats += [("int4", True, 64, "bfloat16"), ("nf4", True, 128, "bfloat16")]
    formats += [("nf4", True, 64, "float16"), ("nf4", True, 64, "float32")]
    product, rows = operation.startswith("matmul"), sizes.check_rows
    found = []
    for index, (quant_type, double_quant, block_size, dtype) in enumerate(
        formats[: sizes.check_formats]
    ):
        for place, shape in enumerate(sizes.check_shapes if not index else sizes.check_shapes[:1]):
            every = not index and not place
            chosen = (rows if every else sorted({rows[0], rows[-2]})) if product else (0,)
            plain = {
                "operation": operation,
                "quant_type": quant_type,
                "double_quant": double_quant,
                "block_size": block_size,
                "dtype": dtype,
                "shape": list(shape),
                "epilogue": False,
            }
            found += [plain | {"rows": count} for count in chosen]
            if every and operation == "matmul":
                found.append(plain | {"rows": rows[0], "epilogue": True})
    return found


def case_name(case: Case) -> str:
    """A case as tables write it.

    >>> case_name({"operation": "matmul", "shape": [8, 64], "rows": 4})
    'matmul 4 x (8x64)'
    """
    shape = "x".join(map(str, case["shape"]))
    return f"{case['operation']} " + (f"{case['rows']} x ({shape})" if case["rows"] else shape)


def split_kernels(kernels: list[tuple[str, float]], calls: int) -> dict[str, Any]:
    """What a timing worker answers, from the kernels of several calls in their order.

    Args:
        kernels: name and seconds of each.
        calls: that launched them, each the same ones; if that is not so, there is only one
            sample, the mean of all calls.

    >>> split_kernels([("scale", 1.0), ("product", 2.0), ("scale", 1.0), ("product", 4.0)], 2)
    {'seconds': [3.0, 5.0], 'clock': 'kernels', 'kernels': ['scale', 'product']}
    """
    each, odd = divmod(len(kernels), calls)
    names = [name[:80] for name, _ in kernels]
    if not odd and each and names == names[:each] * calls:
        starts = range(0, len(kernels), each)
        seconds = [sum(time for _, time in kernels[i : i + each]) for i in starts]
        return {"seconds": seconds, "clock": "kernels", "kernels": names[:each]}
    mean = sum(time for _, time in kernels) / calls
    return {"seconds": [mean], "clock": "kernels", "kernels": sorted(set(names))}
