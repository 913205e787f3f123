"""Writes the newest adapter of a run for other tools.

    python scripts/export.py --workdir=runs/quickstart --out=adapters/mine --format=peft

peft: adapter_model.safetensors and adapter_config.json, which PEFT's PeftModel.from_pretrained puts
onto the same base. --base_model is the name that others know the base by.

Exit code 0: written, whole. 2: a mistake in what was given, or the disk is full; nothing is left.
"""

from absl import flags

from qlora_jax import command_line
from qlora_jax.config import load_config
from qlora_jax.peft import save_adapter
from qlora_jax.training import load_trained

_WORKDIR = flags.DEFINE_string("workdir", None, "directory of a run", required=True)
_OUT = flags.DEFINE_string("out", None, "a new folder", required=True)
_FORMAT = flags.DEFINE_enum("format", "peft", ["peft"], "of the folder")
_BASE_MODEL = flags.DEFINE_string(
    "base_model", None, "the base in adapter_config.json; the run's model.path unless given"
)


def main() -> None:
    """Loads the run and writes."""
    model, _ = load_trained(_WORKDIR.value)
    config = load_config(f"{_WORKDIR.value}/config.json").model
    base = _BASE_MODEL.value or config.path
    out = save_adapter(model, _OUT.value, base_model=base)
    print(
        f"{out}: an adapter for {base}, trained on it in {config.quant_type}, blocks of "
        f"{config.block_size}. For the same answers, load the base in the same 4 bits."
    )


if __name__ == "__main__":
    command_line.run(main)
