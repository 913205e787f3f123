"""The model that a run has left in its work directory."""

from __future__ import annotations

import os
import pathlib
import warnings

import jax
from flax import nnx

from qlora_jax import config as config_lib
from qlora_jax.checkpoint import Checkpointer
from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.errors import CheckpointError
from qlora_jax.placement import eval_placed, place_abstract
from qlora_jax.subtraction import SUBTRACTED_FILE, read_subtracted, set_subtracted
from qlora_jax.training.building import (
    build_model,
    build_optimizer,
    choose_compute_dtype,
    split_model,
)
from qlora_jax.training.step import init_state
from qlora_jax.training.workdir import Workdir


def load_trained(
    workdir: str | os.PathLike, step: int | None = None
) -> tuple[nnx.Module, Tokenizer]:
    """The model of a run: its base, and the adapter of a checkpoint, ready to generate.

    Args:
        workdir: of a run.
        step: which checkpoint; None takes the newest that is not damaged, with a warning that names
            those that are.

    Returns:
        The model in evaluation mode, and its tokenizer.

    Raises:
        CheckpointError: there is no such run or checkpoint.
        TrainingError: the base is not the one the adapter was trained on.

    >>> model, tokenizer = load_trained("runs/quickstart")  # doctest: +SKIP
    """
    path = pathlib.Path(workdir).expanduser()
    if not (path / "config.json").exists():
        raise CheckpointError(f"{path} holds no run (no config.json); give the --workdir of one")
    config = config_lib.load_config(path / "config.json")
    checkpointer = Checkpointer(path / "checkpoints", keep=config.checkpoint.keep)
    if not checkpointer.numbers():
        raise CheckpointError(f"{path} holds no checkpoint yet; train it first, or wait for one")
    dtype, _ = choose_compute_dtype(config.model.compute_dtype, jax.devices()[0])
    model, tokenizer, fingerprint = build_model(config, dtype=dtype, workdir=path, again=True)
    graphdef, lora, frozen = split_model(model)
    # The moments are not needed: they stay in the host's memory.
    tx, _ = build_optimizer(config, total_steps=2**31, state_budget=0)
    like = eval_placed(lambda lora: init_state(lora, tx, config.seed), lora)
    like = place_abstract(like, jax.devices()[0])
    if step is None:
        found = checkpointer.restore_newest(like)
        state, metadata = found.tree, found.metadata
        for reason in found.damaged.values():
            warnings.warn(f"{reason}; step {found.step} is used instead", stacklevel=2)
    else:
        state, metadata = checkpointer.restore(step, like)
    Workdir(path).check_same(config.model.path, metadata["base_fingerprint"], fingerprint)
    model = nnx.merge(graphdef, state.lora, frozen)
    if (path / SUBTRACTED_FILE).exists():  # for export: the base is not the original one
        set_subtracted(model, read_subtracted(path / SUBTRACTED_FILE))
    model.eval()
    return model, tokenizer
