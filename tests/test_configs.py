"""The recipes in configs/: what they hold, that they can be built, and the card that they name."""

import functools
import pathlib
import re

import jax
import pytest
from cuda_wheels import needs_cuda_wheels

from qlora_jax import config as config_lib
from qlora_jax import planning
from qlora_jax.errors import UserError
from qlora_jax.models.shapes import SHAPES
from qlora_jax.models.t5_config import T5Config
from qlora_jax.report import measure
from qlora_jax.targets import find_target
from qlora_jax.training import data

ROOT = pathlib.Path(__file__).parents[1]
RECIPES = sorted(path.name for path in (ROOT / "configs").glob("*.py"))
GUANACO = [name for name in RECIPES if name.startswith("guanaco_")]
PLANNED = [*GUANACO, "flan_t5_xl.py"]
GIB = 2**30


def load(name):
    return config_lib.load_config(ROOT / "configs" / name)


def docstring(name):
    return (ROOT / "configs" / name).read_text().split('"""')[1]


def card(name):
    """The device that the docstring plans for, and the GiB that it says the run takes."""
    text = docstring(name)
    (device,) = re.findall(r"--device=(\w+)", text)
    (gib,) = re.findall(r"It takes ([\d.]+) GiB", text)
    return device, float(gib)


@functools.cache
def build(name, device="h100"):
    """A recipe's step without values."""
    try:
        return planning.abstract_run(load(name), find_target(device))
    except UserError as error:
        if "which is not installed" in str(error):
            pytest.skip(str(error))  # the quickstart's model is in a package
        raise


# ------------------------------------------------------------------------------------ the recipe


@pytest.mark.parametrize(
    ("name", "path", "dropout", "learning_rate"),
    [
        ("guanaco_7b.py", "huggyllama/llama-7b", 0.1, 2e-4),
        ("guanaco_13b.py", "huggyllama/llama-13b", 0.05, 2e-4),
        ("guanaco_33b.py", "huggyllama/llama-30b", 0.05, 1e-4),
        ("guanaco_65b.py", "huggyllama/llama-65b", 0.05, 1e-4),
    ],
)
def test_guanaco_is_what_its_authors_trained(name, path, dropout, learning_rate):
    config = load(name)
    config_lib.validate(config)
    model, lora, data = config.model, config.lora, config.data
    optimizer, train = config.optimizer, config.train
    assert (model.path, model.compute_dtype) == (path, "bfloat16") and path in SHAPES
    assert (model.quant_type, model.block_size, model.double_quant) == ("nf4", 64, True)
    assert (lora.rank, lora.alpha, lora.dropout, lora.where) == (64, 16, dropout, "all-linear")
    assert not lora.use_rslora
    assert (data.name, data.max_len) == ("oasst1", 512)
    assert (data.group_by_length, data.packing) == (True, False)
    assert (optimizer.learning_rate, optimizer.schedule) == (learning_rate, "constant")
    assert (optimizer.warmup_steps, optimizer.weight_decay) == (0, 0)
    assert (optimizer.b1, optimizer.b2, optimizer.max_grad_norm) == (0.9, 0.999, 0.3)
    assert (train.batch_size, train.grad_accum, train.steps) == (1, 16, 1875)


def test_oasst1_is_the_authors_file_with_loss_on_the_whole_dialogue():
    config = load("guanaco_7b.py")
    assert data.data_path(config) == "timdettmers/openassistant-guanaco"
    assert data.token_options(config)["train_on"] == "all"


def test_there_are_the_four_sizes_of_the_paper():
    assert GUANACO == [f"guanaco_{size}.py" for size in ("13b", "33b", "65b", "7b")]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_the_command_that_runs_it_and_imports_no_other(name):
    command = rf"python scripts/train.py --config=configs/{re.escape(name)}(:\w+)? --workdir=runs/"
    assert re.search(command, docstring(name))
    assert "configs." not in (ROOT / "configs" / name).read_text().split('"""')[-1]
    overrides = re.findall(r"^ +config\.", (ROOT / "configs" / name).read_text(), re.M)
    assert 3 <= len(overrides) <= 16


# -------------------------------------------------------------------------------------- the card


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_can_be_built_without_its_weights(name):
    config, run = load(name), build(name, card(name)[0] if name in PLANNED else "h100")
    rows = (config.train.grad_accum, config.train.batch_size)
    width = config.data.max_len
    if isinstance(run.shape, T5Config):
        assert run.batch["source_tokens"].shape == (*rows, config.data.source_max_len)
        width = config.data.target_max_len
    assert run.batch["tokens"].shape == (*rows, width)
    assert measure(run.state.lora, run.frozen).trainable > 0


@pytest.mark.parametrize("name", PLANNED)
def test_what_must_be_there_fits_into_the_card_of_the_docstring(name):
    """By arithmetic: base, embeddings, adapters and two trees of gradients, without a compiler."""
    device, gib = card(name)
    target = find_target(device)
    run = build(name, device)
    size = measure(run.state.lora, run.frozen)
    adapters = sum(x.size for x in jax.tree.leaves(run.state.lora))
    least = size.frozen_bytes + size.trainable_bytes + 2 * 4 * adapters
    assert least <= gib * GIB and gib <= round(
        (target.memory_bytes - planning.CONTEXT_BYTES) / GIB, 1
    )
    assert least >= 0.75 * gib * GIB - 2 * 4 * adapters  # the moments may be on the host


@needs_cuda_wheels
@pytest.mark.slow
@pytest.mark.parametrize("name", PLANNED)
def test_the_card_of_the_docstring_is_large_enough(name):
    device, gib = card(name)
    plan = planning.plan(load(name), device, suggest=False)
    assert plan.verdict in ("fits", "fits with paging")
    assert plan.peak_bytes <= plan.budget_bytes
    assert round(plan.peak_bytes / GIB, 1) <= gib


@needs_cuda_wheels
@pytest.mark.slow
def test_the_smallest_trains_on_a_t4():
    config = load("guanaco_7b.py")
    (gib,) = re.findall(r"float16, which takes ([\d.]+) GiB", docstring("guanaco_7b.py"))
    config.model.compute_dtype = "float16"
    plan = planning.plan(config, "t4", suggest=False)
    assert plan.fits and round(plan.peak_bytes / GIB, 1) <= float(gib)
