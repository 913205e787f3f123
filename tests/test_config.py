"""Tests of qlora_jax.config, qlora_jax.config_rules and the recipes in configs/."""

import pathlib
import re

import pytest
from ml_collections import config_dict

from qlora_jax import config as base
from qlora_jax import config_rules, errors
from qlora_jax.models import remat

RECIPES = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))


@pytest.fixture
def config():
    config = base.get_config()
    config.model.path, config.data.path = "model.gguf", "data.jsonl"
    return config


def _recipe(tmp_path, body, arguments=""):
    path = tmp_path / "recipe.py"
    path.write_text(
        "from qlora_jax import config as base\n"
        f"def get_config({arguments}):\n    config = base.get_config()\n    {body}\n"
        "    return config\n"
    )
    return path


def test_the_whole_base():
    assert base.get_config().to_dict() == {
        "seed": 0,
        "model": {
            "path": "",
            "quant_type": "nf4",
            "block_size": 64,
            "double_quant": True,
            "vocab_quant_type": "none",
            "compute_dtype": "auto",
            "remat": "auto",
            "sequence_chunk": 0,
        },
        "lora": {
            "rank": 64,
            "alpha": 16.0,
            "use_rslora": False,
            "use_dora": False,
            "init": "default",
            "loftq_iterations": 1,
            "dropout": 0.0,
            "where": "all-linear",
            "dtype": "float32",
        },
        "data": {
            "name": "",
            "path": "",
            "mixture": "",
            "format": "auto",
            "chat_format": "auto",
            "max_len": 512,
            "source_max_len": 0,
            "target_max_len": 0,
            "paper_exact": False,
            "train_on": "auto",
            "packing": True,
            "group_by_length": False,
            "eval_path": "",
            "eval_fraction": 0.1,
            "deduplicate": False,
            "on_bad_record": "error",
            "max_records": 0,
            "cache_dir": "auto",
        },
        "optimizer": {
            "name": "adamw",
            "learning_rate": 2e-4,
            "schedule": "constant",
            "warmup_steps": 0,
            "b1": 0.9,
            "b2": 0.999,
            "eps": 1e-8,
            "weight_decay": 0.0,
            "max_grad_norm": 0.3,
            "device_budget_gb": 0.0,
            "check_paging": True,
        },
        "train": {
            "steps": 0,
            "epochs": 1.0,
            "batch_size": 1,
            "grad_accum": 16,
            "log_every": 10,
            "max_skipped_steps": 5,
            "neftune_alpha": 0.0,
            "loss_chunk": 256,
        },
        "eval": {
            "every": 0,
            "batch_size": 4,
            "mmlu": "",
            "mmlu_solved": "",
            "mmlu_max_questions": 0,
        },
        "sample": {"enabled": True, "max_new_tokens": 128},
        "checkpoint": {"every": 100, "keep": 2, "keep_best": True},
    }


def test_every_rule_is_about_a_field_and_every_number_and_choice_has_one():
    fields = config_rules.flatten(base.get_config())
    without = {name for name in fields if name not in config_rules._RULES}
    assert set(config_rules._RULES) <= set(fields)
    assert without == {
        "model.double_quant",
        "lora.use_rslora",
        "lora.use_dora",
        "data.path",
        "data.mixture",
        "data.deduplicate",
        "data.paper_exact",
        "data.packing",
        "data.group_by_length",
        "data.eval_path",
        "eval.mmlu",
        "eval.mmlu_solved",
        "optimizer.check_paging",
        "sample.enabled",
        "checkpoint.keep_best",
    }


def test_the_base_passes_once_its_paths_are_set(config):
    base.validate(config)
    with pytest.raises(errors.ConfigError, match="model.path: got ''"):
        base.validate(base.get_config())


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"path": ""}, "data.path: got '', needs .*, or set data.name"),
        ({"path": "", "name": "flan_v2"}, "data.path: got '', needs to be where you have flan_v2"),
        (
            {"name": "alpaka"},
            "data.name: got 'alpaka', needs to be one of '' .empty., oasst1, alpaca",
        ),
        ({"name": "alpaca", "format": "text"}, "data.format: got 'text', needs to be auto"),
        ({"source_max_len": 384, "target_max_len": 256}, "data.max_len: .* at least 640"),
        ({"source_max_len": 511}, "data.max_len: .* at least 513"),
        ({"paper_exact": True, "name": "alpaca"}, "needs data.source_max_len and .* 1024 and 256"),
        ({"paper_exact": True, "name": "dolly"}, "needs data.name to be one of oasst1, alpaca,"),
        (
            {"paper_exact": True, "name": "oasst1", "train_on": "assistant"},
            "data.train_on='assistant', needs auto",
        ),
        ({"mixture": "oasst1"}, "data.path: got 'data.jsonl', needs to be empty beside"),
        (
            {"path": "", "mixture": "oasst1, alpaka*2"},
            "data.mixture: 'alpaka' is not one of oasst1",
        ),
        ({"path": "", "mixture": "oasst1*0"}, "data.mixture: the weight of oasst1 is 0, needs"),
        ({"path": "", "mixture": "flan_v2"}, "data.mixture: flan_v2 is on no hub .* flan_v2=path"),
        ({"path": "", "mixture": "oasst1 alpaca"}, "data.mixture: 'oasst1 alpaca' is not of the"),
        ({"group_by_length": True}, "data.group_by_length: .* needs data.packing=False"),
    ],
)
def test_fields_of_the_data_that_exclude_one_another(config, fields, message):
    config.data.update(fields)
    with pytest.raises(errors.ConfigError, match=message):
        base.validate(config)


def test_a_named_set_needs_no_path(config):
    config.data.update({"name": "oasst1", "path": "", "packing": False, "group_by_length": True})
    base.validate(config)


def test_remat_names_are_those_of_the_model():
    accepted = re.findall(r"\w+", config_rules._RULES["model.remat"].needs.removeprefix("one of "))
    assert set(accepted) == {"auto", "none", *remat.REMAT_POLICIES}


@pytest.mark.parametrize(
    ("field", "value", "needs"),
    [
        ("seed", -1, "at least 0 and less than"),
        ("model.quant_type", "nf5", "one of nf4, fp4, int4"),
        ("model.block_size", 100, "one of 32, 64"),
        ("model.compute_dtype", "fp16", "one of auto, float32"),
        ("lora.rank", 0, "at least 1"),
        ("lora.alpha", float("inf"), "more than 0 and finite"),
        ("lora.dropout", 1.0, "less than 1"),
        ("lora.init", "pissa_niter_", "one of default, pissa, pissa_niter_<n>, olora, loftq"),
        ("lora.loftq_iterations", 0, "at least 1"),
        ("lora.where", "((", "a regular expression"),
        ("lora.where", "", "a regular expression"),
        ("data.eval_fraction", float("nan"), "less than 1"),
        ("optimizer.learning_rate", 0.0, "more than 0"),
        ("optimizer.schedule", "cosinus", "one of constant, linear, cosine"),
        ("train.epochs", -1.0, "more than 0"),
        ("checkpoint.keep", 0, "at least 1"),
    ],
)
def test_a_value_out_of_range_is_refused(config, field, value, needs):
    config.update_from_flattened_dict({field: value})
    with pytest.raises(errors.ConfigError, match=rf"{field}: got .*{needs}"):
        base.validate(config)


def test_clipping_can_be_switched_off(config):
    config.optimizer.max_grad_norm = float("inf")
    base.validate(config)


def test_all_problems_are_named_at_once(config):
    values = config.to_dict()
    values["lora"]["rnak"] = 3
    values["seed"] = True
    values["train"]["steps"] = 1.5
    del values["sample"]["enabled"]
    with pytest.raises(errors.ConfigError) as raised:
        base.validate(config_dict.ConfigDict(values))
    message = str(raised.value)
    assert "no field lora.rnak; did you mean lora.rank?" in message
    assert "seed: got True, needs to be an integer" in message
    assert "train.steps: got 1.5, needs to be an integer" in message
    assert "sample.enabled is missing" in message


def test_an_integer_is_a_fine_number(config):
    values = config.to_dict()
    values["train"]["epochs"] = 2
    base.validate(config_dict.ConfigDict(values))


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("lora.rnak", "lora.rank"),
        ("rank", "lora.rank"),
        ("lerning_rate", "optimizer.learning_rate"),
        ("optimiser.learning_rate", "optimizer.learning_rate"),
        ("train.keep", "checkpoint.keep"),
        ("model.max_len", "data.max_len"),
        ("qqqqqqq", None),
    ],
)
def test_the_nearest_field(name, nearest):
    assert config_rules.nearest_field(name, base.field_names()) == nearest


def test_json_comes_back_the_same(config, tmp_path):
    config.lora.rank, config.optimizer.max_grad_norm = 8, float("inf")
    path = tmp_path / "config.json"
    path.write_text(base.to_json(config))
    loaded = base.load_config(path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.is_locked
    assert base.to_json(loaded) == base.to_json(config)


def test_json_of_an_older_version_gets_the_bases_values(tmp_path):
    (tmp_path / "config.json").write_text('{"lora": {"alpha": 32}}')
    config = base.load_config(tmp_path / "config.json")
    assert (config.lora.alpha, config.lora.rank) == (32.0, 64)
    assert isinstance(config.lora.alpha, float)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"lora": {"rank": 8}', r"config.json is not JSON: .*line 1"),
        ("[1]", "holds list, needed is an object"),
        ('{"lora": {"rnak": 8}}', "did you mean lora.rank"),
        ('{"lora": 8}', "lora is a section"),
        ('{"lora": {"rank": "8"}}', "lora.rank: got '8', needs to be an integer"),
        ('{"lora": {"rank": null}}', "lora.rank: got None"),
    ],
)
def test_a_bad_json_is_refused(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(errors.ConfigError, match=message):
        base.load_config(tmp_path / "config.json")


def test_a_recipe_with_and_without_an_argument(tmp_path):
    path = _recipe(tmp_path, "config.lora.rank = int(size)", "size='4'")
    assert base.load_config(path).lora.rank == 4
    assert base.load_config(f"{path}:32").lora.rank == 32
    assert base.load_config(path).is_locked


@pytest.mark.parametrize(
    ("body", "arguments", "suffix", "message"),
    [
        ("config.lora.rnak = 1", "", "", r"recipe\.py:4: there is no field rnak.*lora\.rank"),
        ("config.lora.rank = 'x'", "", "", r"recipe\.py:4: TypeError: .*rank"),
        ("config.lora.rank = undefined", "", "", r"recipe\.py:4: NameError: .*undefined"),
        ("import nothing_like_this", "", "", r"recipe\.py:4: ModuleNotFoundError"),
        ("config = = 1", "", "", r"recipe\.py:4: SyntaxError"),
        ("return {}", "", "", "returned dict, needed is the ConfigDict"),
        ("pass", "", ":7b", r"get_config\(\) in .* cannot be called with '7b' after the colon"),
        ("pass", "size", "", r"get_config\(size\) in .* cannot be called with nothing after"),
    ],
)
def test_a_mistake_in_a_recipe_is_named_with_its_line(tmp_path, body, arguments, suffix, message):
    path = _recipe(tmp_path, body, arguments)
    with pytest.raises(errors.ConfigError, match=message):
        base.load_config(f"{path}{suffix}")


def test_a_file_that_is_no_configuration(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(errors.ConfigError, match="needed is a .py or a .json file"):
        base.load_config(tmp_path / "notes.txt")
    with pytest.raises(errors.ConfigError, match="has no function get_config"):
        base.load_config(tmp_path / "empty.py")
    with pytest.raises(errors.UserError, match=r"did you mean .*empty\.py"):
        base.load_config(tmp_path / "emtpy.py:argument")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid(path):
    base.validate(base.load_config(path))
