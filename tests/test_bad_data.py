"""Bad data, one case each: named by file, line and field with what to do, or skipped and counted.

Every case goes the way of a run, `load_training_data`; anything but a `UserError` would be a
traceback for the user.
"""

import json

import pytest
import tiny_run
from fake_tokenizer import CHATML, FakeTokenizer

from qlora_jax.data import data_files
from qlora_jax.errors import DataError
from qlora_jax.training.data import load_training_data

GOOD = b'{"prompt": "2+2?", "completion": "4"}\n'
ROLES = {"u": "user", "a": "assistant", "s": "system", "b": "bot"}


def chat(roles):
    """A line with one message for each letter."""
    messages = [{"role": ROLES[role], "content": role} for role in roles]
    return json.dumps({"messages": messages}).encode() + b"\n"


@pytest.fixture
def config(tmp_path):
    config = tiny_run.tiny_config(tmp_path / "model", tmp_path / "a.jsonl")
    config.data.update({"eval_fraction": 0.0, "max_len": 200})
    return config


def load(config, tmp_path, content, tokenizer=None, **fields):
    (tmp_path / "a.jsonl").write_bytes(content)
    config.data.update(fields)
    return load_training_data(config, tokenizer or FakeTokenizer())


def message_of(config, tmp_path, content, **options):
    with pytest.raises(DataError) as error:
        load(config, tmp_path, content, **options)
    return str(error.value)


# What the second of three lines may be, and what is said of it.
BAD_LINES = {
    "broken JSON": (b'{"prompt": "a" "completion": "b"}\n', "json: found broken JSON at column 16"),
    "invalid UTF-8": (b'{"prompt": "caf\xe9", "completion": "b"}\n', "bytes: found byte 0xe9 at"),
    "NUL": (b'{"prompt": "a\0", "completion": "b"}\n', "bytes: found a NUL byte at byte 14"),
    "escaped NUL": (b'{"prompt": "a\\u0000", "completion": "b"}\n', "prompt: found a NUL char"),
    "missing field": (b'{"prompt": "a"}\n', "completion: found no such field (fields: prompt)"),
    "empty answer": (b'{"prompt": "a", "completion": " "}\n', "completion: found blank text ' '"),
    "wrong kind": (b'{"prompt": "a", "completion": 4}\n', "completion: found a number, need the"),
    "no object": (b"[1, 2]\n", "record: found a list, need one JSON object a line"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line(config, tmp_path, case):
    line, expected = BAD_LINES[case]
    content = GOOD + line + GOOD
    message = message_of(config, tmp_path, content)
    assert message.startswith(f"a.jsonl:2: {expected}"), message
    assert "need " in message and message.endswith(
        "data.on_bad_record=skip leaves such records out)"
    )
    data = load(config, tmp_path, content, on_bad_record="skip")
    assert [e.record_id for e in data.train] == ["a.jsonl:1", "a.jsonl:3"]
    assert data.report.lines()[0].startswith("2 records read, 1 skipped")
    assert data.report.lines()[1].strip().startswith(f"a.jsonl:2: {expected}")


@pytest.mark.parametrize(
    "roles, expected",
    [
        ("uaau", "messages[2].role: found 'assistant', need 'user'"),
        ("au", "messages[0].role: found 'assistant', need 'user'"),
        ("uasua", "messages[2].role: found 'system', need 'user'"),
        ("ub", "messages[1].role: found 'bot' (a text), need one of system, user, assistant"),
        ("uau", "messages: found a conversation that ends with 'user', need an assistant's answer"),
    ],
)
def test_roles_out_of_order_and_unknown_ones(config, tmp_path, roles, expected):
    assert message_of(config, tmp_path, chat("ua") + chat(roles)).startswith(
        f"a.jsonl:2: {expected}"
    )
    data = load(config, tmp_path, chat("ua") + chat(roles), on_bad_record="skip")
    assert len(data.train) == 1 and data.report.skipped == 1


def test_a_last_line_that_was_cut_off(config, tmp_path):
    message = message_of(config, tmp_path, GOOD + GOOD[:25])
    assert (
        message.startswith("a.jsonl:2: json: found the end of the file after")
        and "cut off" in message
    )
    data = load(config, tmp_path, GOOD + GOOD[:25], on_bad_record="skip")
    assert len(data.train) == 1 and data.report.skipped == 1


def test_a_byte_order_mark_and_windows_line_ends_are_no_mistake(config, tmp_path):
    plain = load(config, tmp_path, GOOD * 2).train
    other = load(config, tmp_path, b"\xef\xbb\xbf" + GOOD.replace(b"\n", b"\r\n") * 2).train
    assert [e.tokens.tolist() for e in other] == [e.tokens.tolist() for e in plain]
    message = message_of(config, tmp_path, GOOD + b"\xef\xbb\xbf" + GOOD)
    assert message.startswith("a.jsonl:2: bytes: found a byte order mark inside the file")


def test_a_line_of_fifty_megabytes(config, tmp_path):
    long = json.dumps({"prompt": "a", "completion": "b" * 50_000_000}).encode() + b"\n"
    message = message_of(config, tmp_path, GOOD + long)
    assert message.startswith(
        f"a.jsonl:2: bytes: found a line of {len(long):,} bytes, need at most "
    )
    data = load(config, tmp_path, GOOD + long + GOOD, on_bad_record="skip")
    assert [e.record_id for e in data.train] == ["a.jsonl:1", "a.jsonl:3"]
    assert len(long) > data_files.MAX_LINE_BYTES


def test_duplicate_records_are_counted(config, tmp_path):
    data = load(config, tmp_path, GOOD * 3)
    assert data.report.duplicates == 2 and len(data.train) == 3
    assert "2 duplicates kept (data.deduplicate=True drops them)" in data.report.lines()[0]


def test_a_template_that_fails_on_one_record(config, tmp_path):
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    options = dict(tokenizer=FakeTokenizer(template + CHATML))
    message = message_of(config, tmp_path, chat("ua") + chat("sua"), **options)
    assert message.startswith("a.jsonl:2: messages: found that the chat template refused the")
    assert "no system" in message
    data = load(config, tmp_path, chat("ua") + chat("sua"), on_bad_record="skip", **options)
    assert len(data.train) == 1 and data.report.skipped == 1


def test_a_template_that_is_broken(config, tmp_path):
    message = message_of(config, tmp_path, GOOD, tokenizer=FakeTokenizer("{% for %}"))
    assert (
        "chat template is not valid Jinja: line 1" in message and "Correct chat_template" in message
    )


def test_ids_that_exceed_the_embedding(config, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    with pytest.raises(DataError, match=r"^a.jsonl:1: token \d+ .* has no row .* belong together"):
        load_training_data(config, FakeTokenizer(), vocab_size=40)


def test_all_labels_masked(config, tmp_path):
    message = message_of(config, tmp_path, GOOD, max_len=8)
    assert message.startswith("no token of any of the 1 records carries loss; the first of them:")
    assert "a.jsonl:1" in message and "raise max_len" in message


def test_a_directory_instead_of_a_file(config, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "weights.bin").write_bytes(b"x")
    message = message_of(config, tmp_path, GOOD, path=str(tmp_path / "folder"))
    assert "is a directory without a data file (in it: weights.bin)" in message
    (tmp_path / "folder" / "train.jsonl").write_bytes(GOOD)
    (tmp_path / "folder" / "test.jsonl").write_bytes(GOOD)
    (tmp_path / "folder" / "dataset_info.json").write_bytes(b"{}")
    assert [e.record_id for e in load_training_data(config, FakeTokenizer()).train] == [
        "train.jsonl:1"
    ]


@pytest.mark.parametrize("content, expected", [(b"", "is empty"), (b"\n \n", "but blank lines")])
def test_an_empty_file(config, tmp_path, content, expected):
    assert expected in message_of(config, tmp_path, content)


def test_a_file_that_changes_has_another_fingerprint(config, tmp_path):
    """A run is refused then: see test_training.py."""
    before = load(config, tmp_path, GOOD * 2).fingerprint
    assert load(config, tmp_path, GOOD * 2).fingerprint == before
    assert load(config, tmp_path, GOOD + GOOD.replace(b"4", b"5")).fingerprint != before


@pytest.mark.parametrize(
    "name, content, expected",
    [
        (
            "a.json",
            b'[{"text": "x"},\n{"text": }]',
            "a.json: json: found broken JSON at line 2, col",
        ),
        (
            "a.csv",
            b"prompt,completion\nx,y\nonly one\n",
            "a.csv:3: columns: found 1 fields, need 2",
        ),
        ("a.csv", b'prompt,completion\nx,y\n"open,z\n', "a.csv:3: csv: found "),
        ("a.csv", b"prompt,completion\nx,caf\xe9\n", "a.csv:2: completion: found byte 0xe9 at"),
        ("a.tsv", b"prompt\tcompletion\nx\t\n", "a.tsv:2: completion: found empty text"),
    ],
)
def test_other_kinds_of_files_are_named_by_line_and_field_too(
    config, tmp_path, name, content, expected
):
    (tmp_path / name).write_bytes(content)
    config.data.path = str(tmp_path / name)
    with pytest.raises(DataError) as error:
        load_training_data(config, FakeTokenizer())
    assert str(error.value).startswith(expected)


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.json", b'[{"prompt": "Q", "completion": "A\\nB"}]'),
        (
            "a.csv",
            b'\xef\xbb\xbfprompt,completion,id\r\nQ,"A\r\nB",7\r\n'.replace(b"\r\nB", b"\nB"),
        ),
        ("a.tsv", b"prompt\tcompletion\nQ\tA\\nB\n"),
        ("a.jsonl", b'{"prompt": "Q", "completion": "A\\nB"}'),
        ("a.data", b'{"input": "Q", "output": "A\\nB"}\n'),
    ],
)
def test_every_kind_of_file_gives_the_same_record(config, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    config.data.path = str(tmp_path / name)
    (example,) = load_training_data(config, FakeTokenizer(None)).train
    assert FakeTokenizer(None).decode(example.tokens) == "QA\nB"
