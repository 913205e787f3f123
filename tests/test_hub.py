"""Names on the Hugging Face Hub: what is fetched, what is not, and every way in which it fails.

The client is the real one; the hub it talks to is a server in this process.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from fake_hub import COMMIT, FakeHub

from qlora_jax import hub
from qlora_jax.errors import UserError
from qlora_jax.files import resolve_path
from qlora_jax.hub import HubName, parse_name

ROOT = pathlib.Path(__file__).parents[1]
needs_client = pytest.mark.skipif(hub.huggingface_hub is None, reason="needs huggingface_hub")


def index_of(*shards):
    return json.dumps({"weight_map": {f"w{i}": shard for i, shard in enumerate(shards)}}).encode()


REPOSITORIES = {
    "models/meta/sharded": {
        "config.json": b"{}",
        "tokenizer.json": b"{}",
        "tokenizer_config.json": b"{}",
        "model.safetensors.index.json": index_of("m-1.safetensors", "m-2.safetensors"),
        "m-1.safetensors": b"one",
        "m-2.safetensors": b"two",
        "consolidated.safetensors": b"the same again",
        "pytorch_model.bin": b"pickle",
        "original/consolidated.00.pth": b"pickle",
        "README.md": b"#",
    },
    "models/meta/single": {
        "config.json": b"{}",
        "tokenizer.json": b"{}",
        "model.safetensors": b"all",
    },
    "models/meta/pickled": {
        "config.json": b"{}",
        "tokenizer.json": b"{}",
        "pytorch_model.bin": b"pickle",
    },
    "models/meta/empty": {"config.json": b"{}", "notes.txt": b""},
    "models/meta/ggufs": {"model-q4.gguf": b"GGUF"},
    "models/meta/gated": (403, "GatedRepo"),
    "models/meta/broken": (418, "Teapot"),
    "datasets/people/chats": {
        "one/chats.jsonl.gz": b"gzip",
        "two/chats.parquet": b"PAR1",
        "README.md": b"#",
        "chat.png": b"PNG",
    },
    "datasets/people/guanaco": {
        "openassistant_best_replies_train.jsonl": b"train",
        "openassistant_best_replies_eval.jsonl": b"eval",
    },
    "datasets/people/pictures": {"cat.png": b"PNG"},
}

CHILD = """
import json, sys
from qlora_jax import errors, hub
from qlora_jax.files import resolve_path
for spec, kind in json.load(sys.stdin):
    try:
        kind, *patterns = kind.split()
        path = resolve_path(spec, kind=kind, patterns=patterns)
        print(json.dumps([str(path), hub.describe(spec, kind, patterns)]))
    except errors.UserError as error:
        print(json.dumps([type(error).__name__, str(error)]))
"""


def ask(cases, endpoint, home, **environment):
    """Resolves names in a process of their own: the client reads its settings when imported."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_TOKEN": "hf_secret",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        **environment,
    }
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        cwd=home,
    )
    assert done.returncode == 0, done.stderr
    assert "hf_secret" not in done.stdout + done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    return dict(zip([f"{spec} {kind}" for spec, kind in cases], answers, strict=True))


@pytest.fixture(scope="module")
def online(tmp_path_factory):
    """Answers of the hub, what it served, and where the cache is."""
    if hub.huggingface_hub is None:
        pytest.skip("needs huggingface_hub")
    home, server = tmp_path_factory.mktemp("home"), FakeHub(REPOSITORIES)
    cases = [
        ["meta/sharded", "model"],
        ["meta/sharded@main", "config"],
        [f"meta/single@{COMMIT}", "model"],
        ["meta/single@v9", "model"],
        ["meta/pickled", "model"],
        ["meta/empty", "config"],
        ["meta/pickled", "tokenizer"],
        ["meta/empty", "model"],
        ["meta/ggufs", "model"],
        ["meta/ggufs/model-q4.gguf", "model"],
        ["meta/ggufs/model-q5.gguf", "model"],
        ["meta/gated", "model"],
        ["meta/broken", "model"],
        ["meta/nothing", "config"],
        ["people/chats", "dataset"],
        ["people/guanaco", "dataset *train*"],
        ["people/chats", "dataset *train*"],
        ["people/guanaco/openassistant_best_replies_eval.jsonl", "dataset"],
        ["people/pictures", "dataset"],
        ["people/nobody", "dataset"],
    ]
    with server.running() as endpoint:
        return ask(cases, endpoint, home), server.served, home


# ------------------------------------------------------------------------------ what is fetched


def test_a_model_is_its_configuration_tokenizer_and_safetensors(online):
    answers, served, _ = online
    folder = pathlib.Path(answers["meta/sharded model"][0])
    wanted = set(REPOSITORIES["models/meta/sharded"]) - {
        "consolidated.safetensors",
        "pytorch_model.bin",
        "original/consolidated.00.pth",
        "README.md",
    }
    assert {file.name for file in folder.iterdir()} == wanted
    assert (folder / "m-2.safetensors").read_bytes() == b"two"
    assert not [name for name in served if name.endswith((".bin", ".pth", ".md"))]


def test_a_revision_is_shown_as_the_commit_it_stands_for(online):
    answers, _, _ = online
    assert answers["meta/sharded model"][1] == f"meta/sharded (commit {COMMIT})"
    folder, described = answers[f"meta/single@{COMMIT} model"]
    assert pathlib.Path(folder).name == COMMIT
    assert described == f"meta/single@{COMMIT} (commit {COMMIT})"


def test_a_plan_takes_the_configuration_alone(online):
    answers, served, _ = online
    assert answers["meta/sharded@main config"][0].endswith(f"snapshots/{COMMIT}/config.json")
    alone = answers["meta/empty config"][0]
    assert [file.name for file in pathlib.Path(alone).parent.iterdir()] == ["config.json"]
    folder = pathlib.Path(answers["meta/pickled tokenizer"][0])
    assert {file.name for file in folder.iterdir()} == {"config.json", "tokenizer.json"}
    # Of one model, asked for twice, in one cache: fetched once.
    assert served.count("m-1.safetensors") == 1


def test_one_file_of_a_repository(online):
    answers, _, _ = online
    assert pathlib.Path(answers["meta/ggufs/model-q4.gguf model"][0]).read_bytes() == b"GGUF"
    found = answers["people/guanaco/openassistant_best_replies_eval.jsonl dataset"][0]
    assert pathlib.Path(found).read_bytes() == b"eval"


def test_a_data_set_is_the_files_that_match_or_all_that_hold_data(online):
    answers, served, _ = online
    chosen = pathlib.Path(answers["people/guanaco dataset *train*"][0])
    # One file more was asked for by its name.
    assert {file.name for file in chosen.iterdir()} == set(REPOSITORIES["datasets/people/guanaco"])
    assert served.count("openassistant_best_replies_train.jsonl") == 1
    folder = pathlib.Path(answers["people/chats dataset"][0])
    files = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    assert files == {"one/chats.jsonl.gz", "two/chats.parquet"}
    assert answers["people/chats dataset *train*"] == answers["people/chats dataset"]
    assert answers["people/chats dataset"][1] == f"people/chats (commit {COMMIT})"


@pytest.mark.parametrize(
    ("case", "kind", "message"),
    [
        ("meta/single@v9 model", "UserError", "meta/single has no revision v9"),
        ("meta/pickled model", "WeightsError", "only in pickle files (pytorch_model.bin)"),
        ("meta/empty model", "WeightsError", "has no safetensors; it has config.json, notes.txt"),
        ("meta/ggufs model", "UserError", "give one: meta/ggufs/model-q4.gguf"),
        ("meta/ggufs/model-q5.gguf model", "UserError", "mean meta/ggufs/model-q4.gguf?"),
        ("meta/gated model", "UserError", "is gated: accept its terms on https://huggingface.co/"),
        ("meta/broken model", "UserError", "answered with status 418 for meta/broken"),
        ("meta/nothing config", "UserError", "neither a local path nor a model"),
        ("people/pictures dataset", "DataError", "which is what data can be in; it has cat.png"),
        ("people/nobody dataset", "UserError", "nor a data set on the Hugging Face Hub"),
    ],
)
def test_each_failure_says_what_to_do(online, case, kind, message):
    answers, _, _ = online
    assert answers[case][0] == kind
    assert message in answers[case][1]


def test_how_to_log_in(online):
    answers, _, _ = online
    for case in ("meta/gated model", "meta/nothing config", "people/nobody dataset"):
        assert "`hf auth login`" in answers[case][1]


# --------------------------------------------------------------------------- without a network


def test_a_cached_copy_is_enough_without_a_network(online):
    answers, _, home = online
    cases = [
        ["meta/sharded", "model"],
        ["meta/sharded", "config"],
        ["people/guanaco/openassistant_best_replies_eval.jsonl", "dataset"],
        ["people/chats", "dataset"],
        ["meta/pickled", "model"],
        ["meta/nothing", "model"],
    ]
    offline = ask(cases, "http://127.0.0.1:9", home, HF_HUB_OFFLINE="1")
    for case in ("meta/sharded model", "people/chats dataset"):
        assert offline[case] == answers[case]
    assert "config.json" in offline["meta/sharded config"][0]
    assert offline["people/guanaco/openassistant_best_replies_eval.jsonl dataset"][0].endswith("l")
    for case in ("meta/pickled model", "meta/nothing model"):
        kind, message = offline[case]
        assert kind == "UserError" and "cannot be reached" in message
        assert str(home / "hub") in message and "HF_HUB_OFFLINE" in message


def test_a_part_of_a_model_in_the_cache_is_not_taken_for_the_whole(online):
    _, _, home = online
    shards = list(home.rglob(f"{COMMIT}/m-2.safetensors"))
    target = os.readlink(shards[0])
    shards[0].unlink()
    try:
        cases = [["meta/sharded", "model"], ["meta/sharded", "config"]]
        offline = ask(cases, "http://127.0.0.1:9", home, HF_HUB_OFFLINE="1")
    finally:
        shards[0].symlink_to(target)
    assert "not (or not whole) in the cache" in offline["meta/sharded model"][1]
    assert offline["meta/sharded config"][0].endswith("config.json")


# ------------------------------------------------------------------------------------- by name


def test_what_is_a_name_and_what_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert parse_name("Qwen/Qwen2.5-7B@a/b") == HubName("Qwen/Qwen2.5-7B", None, "a/b")
    assert str(parse_name("o/n/sub/x.gguf@v1")) == "o/n/sub/x.gguf@v1"
    for local in ("model", "/a/b", "./a/b", "~/a", "a//b", "a/../b", "data/x.jsonl", "runs/first"):
        assert parse_name(local) is None, local


def test_what_exists_here_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "meta" / "sharded").mkdir(parents=True)
    assert resolve_path("meta/sharded", kind="model") == pathlib.Path("meta/sharded")
    assert hub.describe("meta/sharded", "model") == "meta/sharded"
    with pytest.raises(UserError, match="did you mean meta/sharded"):
        resolve_path("meta/shardd", kind="model")


def test_without_the_client_the_message_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(hub, "huggingface_hub", None)
    with pytest.raises(UserError, match="pip install huggingface_hub"):
        resolve_path("meta/sharded", kind="model")
    with pytest.raises(UserError, match="does not exist"):  # for what is never on the hub
        resolve_path("meta/sharded")


@needs_client
def test_a_full_disk_is_no_network_failure(monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub.huggingface_hub, "hf_hub_download", full)
    with pytest.raises(UserError, match="No space left on device; make room or point HF_HOME"):
        resolve_path("meta/never-asked-before", kind="model")


@needs_client
def test_a_damaged_index_is_named(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(UserError, match="holds list, not a JSON object"):
        hub._shards(tmp_path / "model.safetensors.index.json")
