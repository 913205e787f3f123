"""Writes the newest adapter of a run for other tools, alone or merged into its base.

    python scripts/export.py --workdir=runs/quickstart --out=adapters/mine --format=peft
    python scripts/export.py --workdir=runs/quickstart --out=merged/mine --format=hf
    python scripts/export.py --workdir=runs/quickstart --out=mine.gguf --format=gguf --dtype=q8_0
    python scripts/export.py --workdir=runs/quickstart --out=merged/mine-nf4 --format=bnb

peft: adapter_model.safetensors and adapter_config.json, which PEFT's PeftModel.from_pretrained puts
onto the same base. --base_model is the name that others know the base by.

hf, gguf (--merge=dense): the adapter is added to the weights. --weights=trained (the default) takes
the 4-bit weights, decoded, that it was trained on; --weights=original takes those from before they
were quantized, which the adapter does not know. bnb, qlora_jax (--merge=requantized): the sum is
quantized again; here original is the default, because 4-bit weights are rounded back.

What was merged is read back and compared with the adapted model on held-out text. If its loss is
worse by more than --max_regression, it is deleted again.

Exit code 0: written, whole. 2: a mistake in what was given, the disk is full, or the merged model
is worse; nothing is left.
"""

import time

from absl import flags
from rich import box
from rich.console import Console
from rich.table import Table

from qlora_jax import command_line
from qlora_jax.config import load_config
from qlora_jax.errors import ConfigError
from qlora_jax.export import (
    FORMATS,
    GGUF_DTYPES,
    ORIGINAL,
    TRAINED,
    Merge,
    check_format,
    export_merged,
)
from qlora_jax.peft import save_adapter
from qlora_jax.training import load_trained

_WORKDIR = flags.DEFINE_string("workdir", None, "directory of a run", required=True)
_OUT = flags.DEFINE_string("out", None, "a new folder; for gguf a new file", required=True)
_FORMAT = flags.DEFINE_enum("format", "peft", ["peft", *FORMATS], "of what is written")
_MERGE = flags.DEFINE_enum(
    "merge", None, ["none", "dense", "requantized"], "what the format is, unless given"
)
_WEIGHTS = flags.DEFINE_string(
    "weights",
    None,
    f"what a merge adds the adapter to: {TRAINED}, {ORIGINAL}, or a model with the original "
    "weights",
)
_DTYPE = flags.DEFINE_enum("dtype", None, GGUF_DTYPES, "of hf and gguf; bf16 unless given")
_EVAL = flags.DEFINE_string(
    "eval", "", "text or records to measure a merge on, unless the run holds some out"
)
_EVAL_TOKENS = flags.DEFINE_integer("eval_tokens", 4096, "about so many tokens of it", 1)
_MAX_REGRESSION = flags.DEFINE_float(
    "max_regression", 0.02, "nats per token that the merged model may be worse than the adapted"
)
_BASE_MODEL = flags.DEFINE_string(
    "base_model", None, "the base in adapter_config.json; the run's model.path unless given"
)


def main() -> None:
    """Loads the run and writes."""
    if _FORMAT.value == "peft":
        _write_adapter()
        return
    console, started = Console(highlight=False), time.monotonic()

    def step(doing: str) -> None:
        console.print(f"{time.monotonic() - started:5.0f} s  {doing} …", soft_wrap=True)

    check_format(_FORMAT.value, _MERGE.value, _DTYPE.value)
    merge = export_merged(
        _WORKDIR.value,
        _OUT.value,
        format=_FORMAT.value,
        dtype=_DTYPE.value,
        weights=_WEIGHTS.value,
        eval_path=_EVAL.value,
        eval_tokens=_EVAL_TOKENS.value,
        max_regression=_MAX_REGRESSION.value,
        step=step,
        show=lambda merge: _print(console, merge),
    )
    console.print(f"{merge.path}: written, read back and measured.", soft_wrap=True)


def _write_adapter() -> None:
    if _MERGE.value not in (None, "none"):
        raise ConfigError(
            f"--format=peft holds an adapter alone, and --merge={_MERGE.value} was asked for. "
            f"Choose one of --format={', '.join(FORMATS)}, or leave --merge out."
        )
    model, _ = load_trained(_WORKDIR.value)
    config = load_config(f"{_WORKDIR.value}/config.json").model
    base = _BASE_MODEL.value or config.path
    out = save_adapter(model, _OUT.value, base_model=base)
    print(
        f"{out}: an adapter for {base}, trained on it in {config.quant_type}, blocks of "
        f"{config.block_size}. For the same answers, load the base in the same 4 bits."
    )


def _print(console: Console, merge: Merge) -> None:
    """The figures of all models; the adapter was trained on what is called 4-bit weights."""
    title = f"{merge.tokens:,} held-out tokens; divergence is from the adapted model"
    table = Table(box=box.SIMPLE, title=title, title_justify="left")
    table.add_column("model")
    for column in ("loss", "KL, mean", "KL, max", "logits, max"):
        table.add_column(column, justify="right")
    for name, row in merge.rows.items():
        figures = f"{row.loss:.4f}", f"{row.kl:.5f}", f"{row.max_kl:.3f}", f"{row.max_logit:.2f}"
        table.add_row(name, *figures, style="bold" if name == merge.written else None)
    console.print(table)
    console.print("  The adapter was trained on the 4-bit weights.\n")


if __name__ == "__main__":
    command_line.run(main)
