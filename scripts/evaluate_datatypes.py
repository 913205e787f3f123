"""The suite `datatypes` of scripts/evaluate.py: what NF4, FP4, INT4 and INT8 cost.

    python scripts/evaluate.py --suite=datatypes --out=report
    python scripts/evaluate.py --suite=datatypes --model=models/llama --data=book.txt --out=report

Without a model, random weights are rounded. With one, its linear layers are, and the perplexity of
the text is measured with each data type and block size; the command goes on where it was stopped.
"""

from __future__ import annotations

import pathlib

import jax
from absl import flags
from rich.console import Console
from rich.table import Table

from pallas_kernels.formats import BLOCK_SIZES
from qlora_jax.errors import ConfigError
from qlora_jax.evaluation import datatypes_report, suites
from qlora_jax.evaluation.datatypes import measure_synthetic
from qlora_jax.evaluation.datatypes_model import quantized_types, run_model
from qlora_jax.loading import load_model
from qlora_jax.model_flags import ModelFlags
from qlora_jax.training import choose_compute_dtype

_SIZES = flags.DEFINE_list(
    "block_sizes", ["32", "64", "128", "256"], "datatypes: weights that share a scale"
)
_SEED = 0


def main(
    model_flags: ModelFlags,
    data: str | None,
    out: pathlib.Path,
    *,
    stride: int | None,
    max_len: int | None,
    batch_tokens: int,
) -> None:
    """Measures, writes the report and prints its tables.

    Args:
        model_flags: name the model; `--model` alone is looked at.
        data: text.
        out: the folder of the report.
        stride: see `suites.run_perplexity`.
        max_len: see `suites.Candidate`.
        batch_tokens: see there.

    Raises:
        ConfigError: flags that cannot be used.
        UserError: see `load_model` and `run_model`.
    """
    sizes, path = block_sizes(_SIZES.value), model_flags.model.value
    if model_flags.workdir.value or model_flags.adapter.value:
        raise ConfigError(
            "--suite=datatypes rounds a model before any adapter: give --model=path, a model in "
            "16 bits, without --workdir and --adapter"
        )
    if bool(path) != bool(data):
        raise ConfigError(
            "--suite=datatypes takes a model and a text, --model=path --data=book.txt, or neither "
            "for random weights alone"
        )
    settings = {"block_sizes": sizes, "seed": _SEED}
    costs, tokens, notes = list(measure_synthetic(sizes, seed=_SEED)), [], []
    if path:
        dtype, _ = choose_compute_dtype("auto", jax.devices()[0])
        model, tokenizer = load_model(path, quant_type=None, dtype=dtype)
        candidate = suites.Candidate(model, tokenizer, path, out, max_len, batch_tokens)
        notes = quantized_before(path)
        found, tokens, more = run_model(candidate, data, sizes, stride=stride)
        costs, settings = costs + found, settings | more
    tables = datatypes_report.write(costs, tokens, out, settings=settings, notes=notes)
    console = Console()
    for table in tables:
        shown = Table(title=table.title, caption=table.text, caption_justify="left")
        for i, head in enumerate(table.rows[0]):
            shown.add_column(head, justify="right" if i else "left")
        for row in table.rows[1:]:
            shown.add_row(*row)
        console.print(shown)
    for note in notes:
        console.print(note, style="yellow")
    print(f"wrote {out / 'datatypes.md'}")


def quantized_before(path: str) -> list[str]:
    """What to say of a model whose weights were rounded by somebody else; empty for another."""
    types = quantized_types(path)
    if not types:
        return []
    found = " and ".join(f"{count} in {name}" for name, count in types.items())
    return [
        f"This model was quantized before: of the linear weights in its file, {found}. The "
        "yardstick is that file, decoded, not the original model, and its weights lie on a grid "
        "already: the differences between data types are not those on the original weights."
    ]


def block_sizes(texts: list[str]) -> list[int]:
    """The sizes that a user gave.

    Raises:
        ConfigError: one is none.

    >>> block_sizes(["64", "32"])
    [32, 64]
    """
    known = {str(size): size for size in BLOCK_SIZES}
    unknown = [text for text in texts if text not in known]
    if unknown or not texts:
        raise ConfigError(
            f"--block_sizes={','.join(texts)}: give some of {', '.join(known)}, separated by commas"
        )
    return sorted({known[text] for text in texts})
