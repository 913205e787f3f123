"""Makes the folders checkpoint_*: a run that was stopped after two of four steps, and its material.

Each version of the project that changes what a checkpoint is adds one, made by its own code:

    PYTHONPATH=.:tests python tests/golden/make_checkpoints.py checkpoint_v1

`material/` (model and data of all of them) is written once and never again. `expected.json` holds
the losses of the run that was not stopped.
"""

import json
import os
import pathlib
import shutil
import signal
import sys
import tempfile

import tiny_run

from qlora_jax import training
from qlora_jax.metrics import read_metrics

GOLDEN = pathlib.Path(__file__).parent
MATERIAL = GOLDEN / "checkpoint_material"
_KEPT = ("config.json", "metrics.jsonl", "checkpoints")


def main(name: str) -> None:
    """Writes one folder beside this script."""
    if not MATERIAL.exists():
        MATERIAL.mkdir()
        tiny_run.write_model(MATERIAL / "model")
        tiny_run.write_data(MATERIAL / "sums.jsonl")
    # from the outside, so that no path of this machine is written down
    os.chdir(GOLDEN)
    config = tiny_run.tiny_config(
        pathlib.Path("checkpoint_material/model"), pathlib.Path("checkpoint_material/sums.jsonl")
    )
    config.lora.rank, config.train.steps = 2, 4
    config.model.compute_dtype = "float32"  # on every CPU

    def stop(step: int, row: object) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with tempfile.TemporaryDirectory() as folder:
        straight, stopped = pathlib.Path(folder) / "straight", pathlib.Path(folder) / "stopped"
        training.train(config, straight)
        try:
            training.train(config, stopped, on_step=stop)
        except KeyboardInterrupt:
            pass
        for kept in _KEPT:
            source, target = stopped / kept, GOLDEN / name / kept
            copy = shutil.copytree if source.is_dir() else shutil.copy
            target.parent.mkdir(exist_ok=True)
            copy(source, target)
        rows = {row["step"]: row["loss"] for row in read_metrics(straight) if "loss" in row}
        (GOLDEN / name / "expected.json").write_text(json.dumps({"loss": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
