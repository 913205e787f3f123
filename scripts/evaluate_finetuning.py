"""The suite `finetuning` of scripts/evaluate.py: QLoRA, LoRA on 16 bits, and full fine-tuning.

    python scripts/evaluate.py --suite=finetuning --config=configs/smollm2_135m.py --out=report

The recipe is trained three times for each seed, with the trainer's own step, optimizer and data:

    qlora   adapters on a base in 4 bits, as the recipe says
    lora    the same adapters on the base in the compute dtype (16 bits)
    full    no adapters: every weight, embeddings and norms too, kept in float32 (Adam's steps are
            smaller than what can be added to a weight in bfloat16), computed in the compute dtype

A seed decides the order of the data and how adapters begin; what is held out is the same for all.
Full fine-tuning wants a smaller learning rate (--full_learning_rate). Every run is written down
when it ends, and the same command goes on where it was stopped.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from flax import nnx
from ml_collections import config_dict
from rich.console import Console
from rich.table import Table

from qlora_jax import command_line
from qlora_jax.errors import ConfigError
from qlora_jax.evaluation import finetuning_report
from qlora_jax.evaluation.finetuning_report import Run
from qlora_jax.evaluation.journal import Journal
from qlora_jax.loading import base_fingerprint, load_model
from qlora_jax.losses import chunked_cross_entropy, next_token_targets
from qlora_jax.models.kinds import Shape, abstract_model
from qlora_jax.models.t5_config import T5Config
from qlora_jax.targets import peak_bytes
from qlora_jax.training import choose_compute_dtype, compile_step, init_state, make_train_step
from qlora_jax.training.building import (
    adapt_model,
    build_optimizer,
    describe_base,
    model_options,
    split_model,
)
from qlora_jax.training.data import TrainingData, load_training_data
from qlora_jax.training.family import Family, family_of
from qlora_jax.training.heldout import Heldout
from qlora_jax.training.step import Batch, LossFn

METHODS = ("qlora", "lora", "full")

_CONFIG = command_line.define_config(required=False)
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "finetuning: a run of each method for each")
_METHODS = flags.DEFINE_list("methods", list(METHODS), "finetuning: some of these")
_FULL_RATE = flags.DEFINE_float(
    "full_learning_rate", 5e-5, "finetuning: of full fine-tuning; the others have the recipe's"
)


@dataclasses.dataclass(frozen=True)
class Parts:
    """A model taken apart for training.

    Attributes:
        graphdef: in training mode.
        eval_graphdef: in evaluation mode.
        trainable: nested dicts of arrays, in float32.
        frozen: the rest.
        loss: that is trained with.
    """

    graphdef: nnx.GraphDef
    eval_graphdef: nnx.GraphDef
    trainable: Any
    frozen: nnx.State
    loss: LossFn


def run(out: pathlib.Path) -> None:
    """Runs the comparison that the flags ask for, and prints its table.

    Raises:
        ConfigError: flags or fields that cannot be used.
        UserError: see `compare`.
    """
    seeds, methods = check(_CONFIG.value, _SEEDS.value, _METHODS.value)
    table = compare(
        _CONFIG.value, out, seeds=seeds, methods=methods, full_learning_rate=_FULL_RATE.value
    )
    Console().print(table)
    print(f"wrote {out / 'finetuning.md'}")


def compare(
    config: config_dict.ConfigDict,
    out: pathlib.Path,
    *,
    seeds: Sequence[int],
    methods: Sequence[str] = METHODS,
    full_learning_rate: float = 5e-5,
) -> Table:
    """Trains what is missing and writes the report.

    Args:
        config: a whole configuration.
        out: the folder of the report, and of what is known already.
        seeds: a run of each method for each.
        methods: some of `METHODS`.
        full_learning_rate: of full fine-tuning.

    Returns:
        The table.

    Raises:
        ConfigError: the model is an encoder-decoder, or in 4 bits already; nothing is held out.
        EvaluationError: the folder holds another comparison.
        UserError: see `load_model` and `load_training_data`.
    """
    dtype, _ = choose_compute_dtype(config.model.compute_dtype, jax.devices()[0])
    shape, tokenizer = describe_base(config)
    if isinstance(shape, T5Config):
        raise ConfigError("--suite=finetuning compares decoders; this is an encoder-decoder")
    family = family_of(shape, config)
    data = load_training_data(config, tokenizer, shape.vocab_size, family.tokenize)
    if not data.heldout:
        raise ConfigError("nothing is held out to compare by; set data.eval_fraction or eval_path")
    settings = {
        "suite": "finetuning",
        "config": config.to_dict(),
        "full_learning_rate": full_learning_rate,
        "compute_dtype": dtype.name,
        "model": base_fingerprint(load_model(config.model.path, quant_type=None)[0]),
        "data": data.fingerprint,
        "records": [len(data.train), len(data.heldout)],
    }
    compiled: dict[str, Callable] = {}
    with Journal(out / "finetuning.jsonl", settings) as journal:
        for seed, method in itertools.product(seeds, methods):
            if (key := f"{method}, {seed}") in journal.records:
                continue
            mine = recipe(config, method, seed, full_learning_rate)
            known = (r for k, r in journal.records.items() if k.startswith(f"{method}, "))
            before = next((record["heldout"]["0"] for record in known), None)
            began = time.perf_counter()
            record = train(method, mine, shape, family, data, dtype, compiled, before)
            record["seconds"] = time.perf_counter() - began
            journal.write([(key, record)])
            done = Run.of(key, record)
            print(f"{key}: held-out loss {done.after:.4f}, {done.seconds:.0f} s", flush=True)
        runs = [Run.of(key, record) for key, record in journal.records.items()]
    return finetuning_report.write(runs, out, settings=settings)


def check(
    config: config_dict.ConfigDict | None, seeds: list[str], methods: list[str]
) -> tuple[list[int], list[str]]:
    """The seeds and methods that a user gave.

    Raises:
        ConfigError: flags or fields that cannot be used.

    >>> from qlora_jax.config import get_config
    >>> check(get_config(), ["7", "0"], ["qlora"])
    ([7, 0], ['qlora'])
    """
    if config is None:
        raise ConfigError("--suite=finetuning needs --config=configs/smollm2_135m.py, or another")
    if not seeds or not all(seed.isdigit() for seed in seeds) or len({*seeds}) < len(seeds):
        raise ConfigError(f"--seeds={','.join(seeds)}: give different numbers, such as 0,1,2")
    if not methods or not set(methods) <= set(METHODS):
        raise ConfigError(f"--methods={','.join(methods)}: give some of {', '.join(METHODS)}")
    if config.lora.init != "default" or config.train.neftune_alpha:
        raise ConfigError(
            "--suite=finetuning has neither initialisations from the weights nor noise on the "
            "embeddings; leave lora.init and train.neftune_alpha as they are in the base"
        )
    return [int(seed) for seed in seeds], methods


def recipe(
    config: config_dict.ConfigDict, method: str, seed: int, full_learning_rate: float
) -> config_dict.ConfigDict:
    """The configuration of one run."""
    config = config.copy_and_resolve_references()
    config.seed = seed
    if method != "qlora":
        config.model.vocab_quant_type = "none"
    if method == "full":
        config.optimizer.learning_rate = full_learning_rate
    return config


def train(
    method: str,
    config: config_dict.ConfigDict,
    shape: Shape,
    family: Family,
    data: TrainingData,
    dtype: jnp.dtype,
    compiled: dict[str, Callable],
    before: float | None,
) -> dict[str, Any]:
    """One run, and what it measured, as JSON keeps it.

    Args:
        method: one of `METHODS`.
        config: with the seed and the learning rate of this run.
        shape: of the model.
        family: of the model.
        data: what is trained on and what is held out.
        dtype: compute dtype.
        compiled: steps by method and shape of the batch, which later runs use, too.
        before: held-out loss before training, where it is known: the seed does not matter then.
    """
    parts = take_apart(method, config, shape, family, dtype)
    batches = data.batches(config, family.build)
    total = config.train.steps or batches.num_batches(config.train.epochs)
    tx, _ = build_optimizer(config, total)
    state = init_state(parts.trainable, tx, config.seed)
    step = make_train_step(parts.graphdef, tx, loss_fn=parts.loss)
    heldout = Heldout(config, data.heldout, parts.eval_graphdef, parts.frozen, family)
    losses = {"0": heldout.loss(state) if before is None else before}
    record = {
        "learning_rate": config.optimizer.learning_rate,
        "trainable": sum(x.size for x in jax.tree.leaves(parts.trainable)),
        "step_bytes": 0,
        "loss": [],
        "heldout": losses,
    }
    for number in range(1, total + 1):
        arrays = next(batches).arrays
        key = f"{method}, {arrays['tokens'].shape}"
        if key not in compiled:
            compiled[key] = compile_step(step, state, parts.frozen, arrays)
        needed = peak_bytes(compiled[key].memory_analysis())
        record["step_bytes"] = max(record["step_bytes"], needed)
        state, metrics = compiled[key](state, parts.frozen, arrays)
        record["loss"].append(float(metrics["loss"]))
        if number == total or (config.eval.every and number % config.eval.every == 0):
            losses[str(number)] = heldout.loss(state)
    return record


def take_apart(
    method: str,
    config: config_dict.ConfigDict,
    shape: Shape,
    family: Family,
    dtype: jnp.dtype,
) -> Parts:
    """Loads the base and divides it into what a method trains and what it does not."""
    options = model_options(config, jax.devices()[0])
    if method == "full":
        weights, _ = load_model(config.model.path, quant_type=None, dtype=jnp.float32)
        model = abstract_model(shape, dtype=dtype, param_dtype=jnp.float32, **options)
        model.train()
        graphdef, _, _ = nnx.split(model, nnx.Param, ...)
        model.eval()
        eval_graphdef, _, _ = nnx.split(model, nnx.Param, ...)
        _, params, frozen = nnx.split(weights, nnx.Param, ...)
        loss = functools.partial(
            full_loss, chunk_size=config.train.loss_chunk, packed=config.data.packing
        )
        return Parts(graphdef, eval_graphdef, nnx.to_pure_dict(params), frozen, loss)
    quantization: Mapping[str, Any] = {"quant_type": None}
    if method == "qlora":
        quantization = {
            "quant_type": config.model.quant_type,
            "block_size": config.model.block_size,
            "double_quant": config.model.double_quant,
            "where": config.lora.where,
        }
    model, _ = load_model(config.model.path, dtype=dtype, **quantization, **options)
    model = adapt_model(model, config, quantize=False)
    model.eval()
    eval_graphdef, _, _ = split_model(model)
    model.train()
    graphdef, lora, frozen = split_model(model)
    return Parts(graphdef, eval_graphdef, lora, frozen, family.loss)


def full_loss(
    model: nnx.Module, batch: Batch, *, chunk_size: int, packed: bool
) -> tuple[jax.Array, jax.Array]:
    """`training.next_token_loss` with a gradient for the output head, too."""
    targets, mask = next_token_targets(batch["tokens"], batch["loss_mask"], batch["segment_ids"])
    hidden = model.hidden_states(
        batch["tokens"],
        positions=batch["positions"],
        segment_ids=batch["segment_ids"] if packed else None,
    )
    loss = chunked_cross_entropy(
        model.head, hidden, targets, mask, chunk_size=chunk_size, trainable_head=True
    )
    return loss, jnp.sum(mask)
