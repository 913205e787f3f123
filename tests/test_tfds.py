"""TFDS without TensorFlow: what goes in comes out, and what is missing is said."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tiny_run
from fake_tokenizer import FakeTokenizer

from qlora_jax.data import tfds_files
from qlora_jax.data.example_arrays import Examples
from qlora_jax.data.records import load_records
from qlora_jax.data.tfds_oasst import build_oasst
from qlora_jax.data.token_cache import load_tokenized
from qlora_jax.errors import DataError
from qlora_jax.training.data import describe_data, load_training_data

TREES = pathlib.Path(__file__).parents[2] / "shared/data/instruct/oasst_en_100_tree.jsonl"
needs_tfds = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow_datasets") is None, reason="tensorflow-datasets is missing"
)


def tree(question, *answers):
    replies = [
        {"role": "assistant", "text": text, "rank": rank} for rank, text in enumerate(answers)
    ]
    return {"prompt": {"role": "prompter", "text": question, "replies": replies[::-1]}}


def write(path, trees):
    path.write_text("".join(json.dumps(one) + "\n" for one in trees))
    return path


@pytest.fixture
def trees(tmp_path):
    return write(tmp_path / "trees.jsonl", [tree(f"Été {i}?", f"Yes {i}", "no") for i in range(20)])


@pytest.fixture
def folder(tmp_path, trees):
    heldout = write(tmp_path / "heldout.jsonl", [tree("Why?", "So"), tree("How?", "Thus")])
    return build_oasst(trees, tmp_path / "tfds", heldout=heldout)


def contents(records):
    return [(record.text, record.spans, record.messages) for record in records]


@needs_tfds
def test_the_records_of_the_trees_in_their_order(folder, trees):
    records = load_records(f"tfds:{folder}", "oasst1")
    assert contents(records) == contents(load_records(trees, "oasst1"))
    assert records[7].text == "### Human: Été 7?### Assistant: Yes 7"
    assert records[7].record_id == "oasst_dialogues-train.array_record-00000-of-00001[7]"


@needs_tfds
def test_no_part_of_it_needs_tensorflow(folder):
    assert importlib.util.find_spec("tensorflow") is None, "this environment has TensorFlow"
    code = (
        "import sys\n"
        "from qlora_jax.data import load_records\n"
        f"print(len(load_records('tfds:{folder}#test', 'oasst1')))\n"
        "assert 'tensorflow_datasets' in sys.modules and 'tensorflow' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "2\n", done.stderr


@needs_tfds
def test_a_run_reads_it_with_a_split_and_keeps_its_tokens(folder, tmp_path, trees):
    config = tiny_run.tiny_config(tmp_path, f"tfds:{folder}")
    config.data.update({"name": "oasst1", "eval_path": f"tfds:{folder}#test", "max_len": 100})
    config.data.cache_dir = str(tmp_path / "cache")
    for cached in (False, True):
        data = load_training_data(config, FakeTokenizer())
        assert data.cached is cached and len(data.train) == 20 and len(data.heldout) == 2
    assert describe_data(config) == f"tfds:{folder}"
    config.data.path = str(trees)
    direct = load_training_data(config, FakeTokenizer())
    assert [e.tokens.tolist() for e in direct.train] == [e.tokens.tolist() for e in data.train]
    assert direct.fingerprint != data.fingerprint


@needs_tfds
def test_a_name_is_looked_up_where_tfds_keeps_its_data(folder, monkeypatch):
    import tensorflow_datasets as tfds

    by_name = tfds.builder
    monkeypatch.setattr(tfds, "builder", lambda name: by_name(name, data_dir=folder.parents[1]))
    assert len(load_records("tfds:oasst_dialogues", "oasst1")) == 20
    assert len(load_records("tfds:oasst_dialogues:1.0.0#test", "oasst1")) == 2
    with pytest.raises(DataError, match="has no split 'dev', but train, test"):
        load_records("tfds:oasst_dialogues#dev", "oasst1")
    with pytest.raises(DataError, match="is not prepared in .*mnist.*array_record"):
        load_records("tfds:mnist")
    with pytest.raises(DataError, match="neither a prepared folder nor a name: .*nosuch"):
        load_records("tfds:nosuch")


@needs_tfds
def test_lists_of_objects_and_numbers_come_out_as_in_json(tmp_path):
    import tensorflow_datasets as tfds

    conversation = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4 ½"}]
    features = tfds.features.FeaturesDict(
        {
            "messages": tfds.features.Sequence(
                {"role": tfds.features.Text(), "content": tfds.features.Text()}
            ),
            "tags": tfds.features.Sequence(tfds.features.Text()),
            "rank": tfds.features.Scalar(np.int32),
        }
    )
    example = {"messages": conversation, "tags": ["a", "b"], "rank": 3}
    stored = features.deserialize_example_np(
        features.serialize_example(features.encode_example(example))
    )
    assert tfds_files._plain(tfds, features, stored) == example


@needs_tfds
def test_other_formats_damage_and_what_is_there_are_refused(folder, trees, tmp_path):
    with pytest.raises(DataError, match="is there already"):
        build_oasst(trees, tmp_path / "tfds")
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps({**info, "fileFormat": "tfrecord"}))
    with pytest.raises(DataError, match="format tfrecord, need array_record"):
        load_records(f"tfds:{folder}", "oasst1")
    (folder / "dataset_info.json").write_text(json.dumps(info))
    (folder / "oasst_dialogues-train.array_record-00000-of-00001").write_bytes(b"x" * 100)
    with pytest.raises(DataError, match="cannot be read after record 0"):
        load_records(f"tfds:{folder}", "oasst1")


@needs_tfds
def test_a_bad_tree_stops_the_builder_with_its_line(tmp_path):
    path = write(tmp_path / "bad.jsonl", [tree("a", "b"), {"prompt": 3}])
    with pytest.raises(DataError, match="bad.jsonl:2"):
        build_oasst(path, tmp_path / "tfds")
    assert build_oasst(path, tmp_path / "tfds", on_bad_record="skip").is_dir()


def test_without_the_library_the_message_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    for call in (lambda: load_records("tfds:x"), lambda: build_oasst(tmp_path / "x", tmp_path)):
        with pytest.raises(DataError, match=r"pip install tensorflow-datasets .*qlora-jax\[tfds\]"):
            call()


@needs_tfds
@pytest.mark.skipif(not TREES.exists(), reason="the trees are not here")
def test_real_trees_have_the_tokens_of_their_file(tmp_path):
    folder = build_oasst(TREES, tmp_path)
    options = dict(cache_dir=None, max_len=512, train_on="all", literal=True)
    found = [
        load_tokenized(path, "oasst1", FakeTokenizer(), **options)
        for path in (TREES, f"tfds:{folder}")
    ]
    first, second = (Examples([one.table]) for one in found)
    assert len(first) == 100
    assert [e.tokens.tolist() for e in first] == [e.tokens.tolist() for e in second]
