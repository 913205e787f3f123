"""Tokens and keys of the environment are in nothing that a run prints or writes."""

import importlib.util
import pathlib

import pytest
import tiny_run

from qlora_jax import doctor
from qlora_jax.data import chat_template
from qlora_jax.training import train
from qlora_jax.training.stepping import Steps

pytestmark = pytest.mark.usefixtures("compile_each_program_once")

SECRETS = {
    name: f"{prefix}SecretOfThisTest{i:02}"
    for i, (name, prefix) in enumerate(
        {
            "HF_TOKEN": "hf_",
            "HUGGING_FACE_HUB_TOKEN": "hf_",
            "OPENAI_API_KEY": "sk-",
            "ANTHROPIC_API_KEY": "sk-ant-",
            "WANDB_API_KEY": "",
            "AWS_SECRET_ACCESS_KEY": "",
            "GITHUB_TOKEN": "ghp_",
        }.items()
    )
}
IN_A_FILE = "hf_SecretOfTheTokenFile"


def found_in(folder: pathlib.Path) -> list[str]:
    """The files, also their names, that have a secret in them."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 5
    contents = {str(path): path.read_bytes() + str(path).encode() for path in files}
    return [name for name, content in contents.items() if has_secret(content)]


def has_secret(content: bytes) -> bool:
    return any(secret.encode() in content for secret in [*SECRETS.values(), IN_A_FILE])


def test_a_secret_would_be_found(tmp_path):
    for i in range(6):
        (tmp_path / f"{i}.json").write_text("{}")
    assert found_in(tmp_path) == []
    (tmp_path / "7.json").write_text(f'{{"token": "{SECRETS["OPENAI_API_KEY"]}"}}')
    assert found_in(tmp_path) == [str(tmp_path / "7.json")]


@pytest.mark.parametrize("ending", ["whole", "crash"])
def test_no_secret_in_what_a_run_leaves(tmp_path, monkeypatch, capfd, ending):
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    home = tmp_path / "home"
    home.mkdir()
    (home / "token").write_text(IN_A_FILE)
    monkeypatch.setenv("HF_HOME", str(home))
    if importlib.util.find_spec("huggingface_hub"):  # read when it was imported
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(chat_template, "_worker", None)
    config = tiny_run.tiny_config(
        tiny_run.write_model(tmp_path / "model"), tiny_run.write_data(tmp_path / "sums.jsonl")
    )
    config.train.steps, config.train.log_every = 2, 1
    report, text = tiny_run.quiet_report()
    if ending == "crash":

        def broken(self, *arguments, **options):
            raise RuntimeError("something that nobody expected")

        monkeypatch.setattr(Steps, "__call__", broken)
        with pytest.raises(RuntimeError, match="nobody expected"):
            train(config, str(tmp_path / "run"), report=report)
    else:
        train(config, str(tmp_path / "run"), report=report)
    printed = text.getvalue() + "".join(capfd.readouterr())
    assert printed and not has_secret(printed.encode())
    if ending == "whole":
        assert found_in(tmp_path / "run") == []
        assert not has_secret(doctor.report().encode())
    else:
        left = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
        assert left and not any(has_secret(path.read_bytes()) for path in left)
