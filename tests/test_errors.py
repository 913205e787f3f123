"""Tests of qlora_jax.errors."""

import pytest

from qlora_jax import errors


def _exit_code(main, capsys):
    with pytest.raises(SystemExit) as exit_info:
        errors.run_main(main)
    return exit_info.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    "kind",
    [
        errors.UserError,
        errors.ConfigError,
        errors.DataError,
        errors.WeightsError,
        errors.CheckpointError,
        errors.TrainingError,
    ],
)
def test_a_users_mistake_is_one_message_and_exit_code_2(kind, capsys):
    def main():
        raise kind("what was given, what is needed")

    assert _exit_code(main, capsys) == (2, "error: what was given, what is needed\n")


def test_the_notes_of_a_mistake_are_printed(capsys):
    def main():
        error = errors.TrainingError("what ended it")
        error.add_note("where to read more")
        raise error

    expected = (2, "error: what ended it\nwhere to read more\n")
    assert _exit_code(main, capsys) == expected


def test_ctrl_c_exits_130(capsys):
    def main():
        raise KeyboardInterrupt

    assert _exit_code(main, capsys)[0] == 130


@pytest.mark.parametrize("code", [None, 3])
def test_the_exit_code_of_main_is_the_exit_code(code, capsys):
    assert _exit_code(lambda: code, capsys) == (code, "")


def test_a_defect_keeps_its_traceback():
    def main():
        raise ValueError("a defect")

    with pytest.raises(ValueError, match="a defect"):
        errors.run_main(main)


def test_nearest():
    assert errors.nearest("lerning_rate", ["learning_rate", "alpha"]) == "learning_rate"
    assert errors.nearest("zzz", ["learning_rate", "alpha"]) is None
    assert errors.nearest("zzz", []) is None
