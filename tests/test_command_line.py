"""Tests of qlora_jax.command_line: what a user types, and what a mistake is answered with."""

import sys

import pytest
from absl import flags

from qlora_jax import command_line, config, errors


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.py"
    path.write_text(
        "from qlora_jax import config as base\n"
        "def get_config(rank='64'):\n"
        "    config = base.get_config()\n"
        "    config.model.path, config.data.path = 'm', 'd'\n"
        "    config.lora.rank = int(rank)\n"
        "    return config\n"
    )
    return path


@pytest.fixture
def parse(monkeypatch):
    """Parses a command line as a script would, and returns its flags."""

    def parse(*arguments, required=True):
        values = flags.FlagValues()
        flags.DEFINE_string("workdir", None, "", flag_values=values)
        flags.DEFINE_integer("count", 1, "", flag_values=values)
        argv = ["script.py", *map(str, arguments)]
        # config_flags looks for the overrides there.
        monkeypatch.setattr(sys, "argv", argv)
        holder = command_line.define_config(required=required, flag_values=values)
        command_line.parse(argv, values)
        return holder.value, values

    return parse


def test_overrides_in_every_spelling(parse, recipe):
    result, values = parse(
        f"--config={recipe}:16",
        "--config.optimizer.learning_rate=1e-3",
        "--config.optimizer.schedule",
        "cosine",
        "--noconfig.data.packing",
        "--config.train.epochs=2",
        "--workdir=runs/x",
    )
    assert result.lora.rank == 16
    assert result.optimizer.learning_rate == 1e-3
    assert result.optimizer.schedule == "cosine"
    assert result.data.packing is False
    assert (result.train.epochs, type(result.train.epochs)) == (2.0, float)
    assert values["workdir"].value == "runs/x"


def test_the_last_override_wins(parse, recipe):
    result, _ = parse(f"--config={recipe}", "--config.lora.rank=8", "--config.lora.rank=4")
    assert result.lora.rank == 4


def test_the_json_of_a_run_is_accepted_and_can_be_overridden(parse, recipe, tmp_path):
    first, _ = parse(f"--config={recipe}", "--config.lora.rank=8")
    (tmp_path / "config.json").write_text(config.to_json(first))
    again, _ = parse(f"--config={tmp_path}/config.json", "--config.seed=7")
    assert (again.lora.rank, again.seed) == (8, 7)


def test_a_script_may_do_without_a_config(parse):
    assert parse("--workdir=x", required=False)[0] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=CONFIG", "--config.lora.rnak=3"], "no field lora.rnak; did you mean lora.rank"),
        (["--config=CONFIG", "--config.lora=3"], "lora is a section, not a field"),
        (["--config=CONFIG", "--noconfig.data.paking"], "did you mean data.packing"),
        (["--config=CONFIG", "--config.lora.rank=abc"], "rank: got 'abc', needs to be an integer"),
        (["--config=CONFIG", "--config.lora.rank=1.5"], "rank: got '1.5', needs to be an integer"),
        (["--config=CONFIG", "--config.seed"], "Missing value for flag --config.seed"),
        (["--config=CONFIG", "--config.data.packing=x"], "got 'x', needs to be true or false"),
        (["--config=CONFIG", "--config.lora.rank=0"], "lora.rank: got 0, needs to be at least 1"),
        (["--config=CONFIG", "--wrkdir=x"], "no flag --wrkdir; did you mean --workdir?"),
        (["--config=CONFIG", "--lora.rank=3"], "did you mean --config.lora.rank?"),
        (["--config=CONFIG", "--qqqqq=3"], "no flag --qqqqq; --help lists them"),
        (["--config=CONFIG", "--count=x"], "--count=x"),
        (["--config=CONFIG", "data.jsonl"], "cannot use 'data.jsonl'"),
        (["--config=CONFIGG"], r"did you mean .*recipe\.py"),
        (["--config.lora.rank=3"], "--config=file.py is not given"),
        (["--config.lora.rank=3", "--config=CONFIG"], "before a value for --config"),
        ([], "--config is needed; for example --config=configs/"),
    ],
)
def test_a_mistake_is_one_message(parse, recipe, arguments, message):
    with pytest.raises(errors.UserError, match=message):
        parse(*[argument.replace("CONFIG", str(recipe)) for argument in arguments])


def test_every_wrong_name_is_in_the_one_message(parse, recipe):
    with pytest.raises(errors.ConfigError, match="lora.rank(.|\n)*optimizer.learning_rate"):
        parse(f"--config={recipe}", "--config.lora.rnak=3", "--config.lerning_rate=1")


def test_run_ends_with_code_2_and_without_a_traceback(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script.py", "--no_such_flag=1"])
    with pytest.raises(SystemExit) as raised:
        command_line.run(lambda: pytest.fail("main must not run"))
    assert raised.value.code == 2
    assert capsys.readouterr().err.startswith("error: there is no flag --no_such_flag; ")
