"""Fine-tunes a model with QLoRA, or continues a run that was stopped.

    python scripts/train.py --config=configs/smollm2_135m.py --workdir=runs/quickstart
    python scripts/train.py --config=configs/smollm2_135m.py --config.lora.rank=32 --workdir=runs/b

Exit code 0: finished. 2: a mistake in what was given, or something that ended the run, named in one
message. 130: stopped by Ctrl-C, and 143: by SIGTERM, with everything saved; a second signal leaves
at once. After all but 0 the same command continues (docs/reliability.md).
"""

from absl import flags

from qlora_jax import command_line, training
from qlora_jax.memory_limits import claim_gpu
from qlora_jax.training.interrupts import ending_for_sure

_CONFIG = command_line.define_config()
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "directory of the run: a new one, or one to continue", required=True
)
_RESUME = flags.DEFINE_enum(
    "resume",
    "auto",
    ["auto", "must", "never"],
    "auto: continue where there is a checkpoint, else begin; must: refuse to begin; never: refuse "
    "to continue",
)


def main():
    """Hands the flags to `qlora_jax.training.train`."""
    claim_gpu()
    with ending_for_sure():
        training.train(_CONFIG.value, _WORKDIR.value, resume=_RESUME.value)


if __name__ == "__main__":
    command_line.run(main)
