"""Quantizes a model once and writes it, so that later runs load its 4-bit bytes directly.

    python scripts/quantize.py --model=models/Llama-3.1-8B --out=models/Llama-3.1-8B-nf4
    python scripts/quantize.py --model=models/Llama-3.1-8B --out=models/l8-bnb --format=bitsandbytes

The folder takes the place of the model: --config.model.path=models/Llama-3.1-8B-nf4. The format
qlora_jax is mapped into memory and used where it lies; bitsandbytes is what transformers loads too.
A model that is in 4 bits already is written in the other format without a change.

Exit code 0: written, or it was already. 2: a mistake in what was given, or the disk is full. 130:
stopped by Ctrl-C. After 130, a kill or a full disk the same command continues.
"""

from absl import flags
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from qlora_jax import command_line
from qlora_jax.packed_checkpoint import FORMATS, quantize_checkpoint
from qlora_jax.report import format_bytes

_MODEL = flags.DEFINE_string(
    "model", None, "a folder, a GGUF file, or package:<name>/<file>", required=True
)
_OUT = flags.DEFINE_string("out", None, "a new folder, or one to continue", required=True)
_FORMAT = flags.DEFINE_enum("format", "qlora_jax", [*FORMATS, "bnb"], "of the folder")
_QUANT_TYPE = flags.DEFINE_enum("quant_type", None, ["nf4", "fp4", "int4"], "nf4 unless given")
_BLOCK_SIZE = flags.DEFINE_integer("block_size", None, "weights a scale; 64 unless given")
_DOUBLE_QUANT = flags.DEFINE_bool("double_quant", None, "quantize the scales; true unless given")
_WHERE = flags.DEFINE_string("where", "all-linear", "which layers, as config.lora.where")


def main() -> None:
    """Shows a bar of the bytes that are read."""
    console = Console()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("quantizing", total=None)
        out = quantize_checkpoint(
            _MODEL.value,
            _OUT.value,
            format="bitsandbytes" if _FORMAT.value == "bnb" else _FORMAT.value,
            quant_type=_QUANT_TYPE.value,
            block_size=_BLOCK_SIZE.value,
            double_quant=_DOUBLE_QUANT.value,
            where=_WHERE.value,
            progress=lambda done, total, _: bar.update(task, completed=done, total=total),
        )
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    console.print(
        f"{out}: {format_bytes(size)}. Give it in place of the model: --config.model.path={out}",
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    command_line.run(main)
