"""Fine-tunes a model with QLoRA, or continues a run that was stopped.

    python scripts/train.py --config=configs/smollm2_135m.py --workdir=runs/quickstart
    python scripts/train.py --config=configs/smollm2_135m.py --config.lora.rank=32 --workdir=runs/b

Exit code 0: finished. 2: a mistake in what was given, named in one message. 130: stopped by Ctrl-C,
with everything saved; the same command continues.
"""

from absl import flags

from qlora_jax import command_line, training
from qlora_jax.memory_limits import claim_gpu

_CONFIG = command_line.define_config()
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "directory of the run: a new one, or one to continue", required=True
)


def main():
    """Hands the flags to `qlora_jax.training.train`."""
    claim_gpu()
    training.train(_CONFIG.value, _WORKDIR.value)


if __name__ == "__main__":
    command_line.run(main)
