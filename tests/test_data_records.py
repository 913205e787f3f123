"""Reading records: three formats, and every kind of bad line named by file, line and field."""

import gzip
import importlib.util
import json
import os
import pathlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_jax.data.formats import ROLES, BadField, check_messages
from qlora_jax.data.records import load_records
from qlora_jax.data.report import DataReport
from qlora_jax.errors import DataError

GOOD = b'{"prompt": "2+2?", "completion": "4"}\n'
USER = {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "4"}


def write(tmp_path, content, name="a.jsonl"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def messages(*items):
    return json.dumps({"messages": list(items)}).encode() + b"\n"


@pytest.mark.parametrize("format", ["explicit", "auto"])
@pytest.mark.parametrize(
    "name, line, expected_messages, text",
    [
        ("messages", messages(USER, ANSWER), (USER, ANSWER), ""),
        (
            "messages",
            messages({"role": "system", "content": ""}, USER, ANSWER, USER, ANSWER),
            ({"role": "system", "content": ""}, USER, ANSWER, USER, ANSWER),
            "",
        ),
        ("prompt_completion", GOOD, (USER, ANSWER), "2+2?4"),
        ("text", b'{"text": "Once upon\\na time", "source": "x"}\n', (), "Once upon\na time"),
    ],
)
def test_formats(tmp_path, format, name, line, expected_messages, text):
    path = write(tmp_path, line * 2)
    records = load_records(path, name if format == "explicit" else "auto")
    assert [record.record_id for record in records] == ["a.jsonl:1", "a.jsonl:2"]
    assert records[0].format == name
    assert records[0].messages == expected_messages and records[0].text == text
    assert records[0].prompt == list(expected_messages[:-1])


def test_harmless_habits_of_editors_are_accepted(tmp_path):
    plain = load_records(write(tmp_path, GOOD * 2))
    for content in (
        b"\xef\xbb\xbf" + GOOD * 2,
        GOOD.replace(b"\n", b"\r\n") * 2,
        GOOD + GOOD.rstrip(b"\n"),
    ):
        assert load_records(write(tmp_path, content)) == plain
    spaced = load_records(write(tmp_path, b"\n" + GOOD + b"  \r\n\n" + GOOD + b"\n\n"))
    assert [record.record_id for record in spaced] == ["a.jsonl:2", "a.jsonl:5"]


BAD_LINES = {
    "broken json": (b'{"prompt": "x", completion: "y"}\n', r"json: found broken JSON at column 17"),
    "two objects": (GOOD.strip() + GOOD, r"json: found broken JSON at column 38 .*Extra data"),
    "bare CR": (GOOD.strip() + b"\r" + GOOD, r"json: found broken JSON .*Extra data"),
    "a list": (b"[1, 2]\n", r"record: found a list, need one JSON object a line"),
    "deep": (b'{"prompt":' + b"[" * 99999 + b"\n", r"json: found .*recursion"),
    "huge number": (b'{"prompt": ' + b"9" * 5000 + b"}\n", r"json: found Exceeds the limit"),
    "latin1": ('{"prompt": "é"}\n'.encode("latin1"), r"bytes: found byte 0xe9 at byte 13.*UTF-8"),
    "nul": (b'{"prompt": "a\0b"}\n', r"bytes: found a NUL byte at byte 14"),
    "escaped nul": (
        b'{"prompt": "a\\u0000b", "completion": "c"}\n',
        r"prompt: found a NUL character at position 1",
    ),
    "surrogate": (
        b'{"prompt": "a\\ud800", "completion": "c"}\n',
        r"prompt: found half of a surrogate pair",
    ),
    "late BOM": (b"\xef\xbb\xbf" + GOOD, r"bytes: found a byte order mark inside the file"),
    "cut line": (b'{"prompt": "2+2?", "comple', r"json: found the end of the file .* cut off"),
    "missing field": (
        b'{"prompt": "x", "answer": "y"}\n',
        r"completion: found no such field \(fields: answer, prompt\), need the answer",
    ),
    "empty answer": (b'{"prompt": "x", "completion": ""}\n', r"completion: found empty text, need"),
    "blank answer": (
        b'{"prompt": "x", "completion": " \\n"}\n',
        r"completion: found blank text ' \\n', need the answer as non-empty text",
    ),
    "number": (b'{"prompt": 4, "completion": "y"}\n', r"prompt: found a number, need non-empty"),
    "null": (b'{"prompt": "x", "completion": null}\n', r"completion: found null, need the answer"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named_or_skipped_and_counted(tmp_path, name):
    line, message = BAD_LINES[name]
    path = write(tmp_path, GOOD + line + (b"" if name == "cut line" else GOOD))
    with pytest.raises(DataError, match=rf"^a\.jsonl:2: {message}"):
        load_records(path)
    report = DataReport()
    records = load_records(path, on_bad_record="skip", report=report)
    assert (len(records), report.records, report.skipped) == (
        (1, 1, 1) if name == "cut line" else (2, 2, 1)
    )
    assert report.samples[0].startswith("a.jsonl:2: ")


@pytest.mark.parametrize(
    "items, message",
    [
        ([], r"messages: found an empty list, need a list"),
        (["hi"], r"messages\[0\]: found 'hi' \(a text\), need an object"),
        ([{"content": "x"}], r"messages\[0\].role: found no such field, need one of system"),
        ([{"role": "human", "content": "x"}], r"messages\[0\].role: found 'human'"),
        ([{"role": ["user"], "content": "x"}], r"messages\[0\].role: found a list"),
        ([{"role": "user"}, ANSWER], r"messages\[0\].content: found no such field"),
        ([USER, {"role": "assistant", "content": ""}], r"messages\[1\].content: found empty text"),
        ([USER, {"role": "assistant", "content": [{"text": "x"}]}], r"messages\[1\].*found a list"),
        ([ANSWER, USER], r"messages\[0\].role: found 'assistant', need 'user': an optional"),
        ([USER, USER, ANSWER], r"messages\[1\].role: found 'user', need 'assistant'"),
        ([USER, {"role": "system", "content": "x"}], r"messages\[1\].role: found 'system'"),
        ([USER, ANSWER, USER], r"messages: found a conversation that ends with 'user', need an"),
        ([{"role": "system", "content": "x"}], r"messages: .* ends with 'system'"),
    ],
)
def test_bad_conversations(tmp_path, items, message):
    path = write(tmp_path, messages(USER, ANSWER) + messages(*items))
    with pytest.raises(DataError, match=rf"^a\.jsonl:2: {message}"):
        load_records(path)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.sampled_from(ROLES),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.fixed_dictionaries({"role": inner, "content": inner})
        | st.dictionaries(st.sampled_from(["role", "content"]), inner)
    ),
)


@settings(deadline=None)
@given(JSON_VALUES)
def test_no_json_value_as_messages_ends_in_another_error(value):
    try:
        checked = check_messages(value)
    except BadField:
        return
    assert checked[-1]["role"] == "assistant"


@settings(deadline=None)
@given(st.binary(max_size=60))
def test_no_bytes_end_in_another_error(tmp_path_factory, content):
    path = write(tmp_path_factory.getbasetemp(), content, "noise.jsonl")
    with pytest.raises(DataError):
        load_records(path)


def test_files_that_are_none(tmp_path):
    for name in ("none", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "other" / "model.bin").write_bytes(b"x")
    cases = [
        (tmp_path / "none", r"is a directory without a data file \(it is empty\); need a file"),
        (tmp_path / "other", r"without a data file \(in it: model.bin\)"),
        (tmp_path / "blnk.jsonl", r"does not exist; did you mean .*blank.jsonl"),
        (write(tmp_path, b"", "empty.jsonl"), "is empty"),
        (write(tmp_path, b" \n\n", "blank.jsonl"), "holds nothing but blank lines"),
        (write(tmp_path, "{}\n".encode("utf-16"), "d.jsonl"), "found UTF-16 text, need UTF-8"),
        (write(tmp_path, b"\x1f\x8b\x08\0", "e.jsonl.gz"), "e.jsonl.gz:1: .* damaged or cut off"),
        (write(tmp_path, b"PK\x03\x04", "f.zip"), "is a zip file.*unpack"),
        (write(tmp_path, b'[{"text": "x"},\n{"te', "l.json"), "l.json: json: .* line 2, column 2"),
        (pathlib.Path("/dev/null"), "is not a regular file"),
    ]
    for path, message in cases:
        with pytest.raises(DataError, match=message):
            load_records(path)


def test_a_pretty_printed_list_is_told_from_a_broken_line(tmp_path):
    with pytest.raises(DataError, match=r"a.jsonl:1: json: found a lone '\[', need one whole"):
        load_records(write(tmp_path, b'[\n  {"text": "x"}\n]\n'))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_named(tmp_path):
    path = write(tmp_path, GOOD)
    path.chmod(0)
    with pytest.raises(DataError, match="cannot be read: Permission denied"):
        load_records(path)


def test_unknown_fields_and_options_are_answered_with_what_is_known(tmp_path):
    path = write(tmp_path, b'{"question": "x", "answer": "y"}\n')
    with pytest.raises(DataError, match=r"found the fields answer, question, need one of"):
        load_records(path)
    with pytest.raises(DataError, match="did you mean 'messages'"):
        load_records(path, "mesages")
    with pytest.raises(DataError, match="on_bad_record='ignore' is not one of error, skip"):
        load_records(path, on_bad_record="ignore")


def test_skipping_everything_is_refused_with_the_reasons(tmp_path):
    path = write(tmp_path, b'{"text": ""}\n' * 7)
    with pytest.raises(
        DataError, match=r"all 7 records are bad; the first of them:\n  a.jsonl:1: text"
    ):
        load_records(path, on_bad_record="skip")


def test_skipped_records_are_logged_when_nobody_takes_the_report(tmp_path, caplog):
    load_records(write(tmp_path, GOOD + b"{\n" * 8), on_bad_record="skip")
    assert "1 records read, 8 skipped" in caplog.text
    assert "... and 3 more" in caplog.text


def test_a_directory_is_all_its_data_files_without_those_that_are_held_out(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path, b'[{"text": "one"}]', "b.json")
    write(tmp_path, gzip.compress(b'{"text": "two"}\n{"text": "three"}\n'), "sub/a.jsonl.gz")
    for name in ("test.jsonl", "x-eval.jsonl", "sub/validation.jsonl", "dataset_infos.json"):
        write(tmp_path, b'{"text": "held out"}\n', name)
    write(tmp_path, b"Read me.", "README.md")
    write(tmp_path, b'{"text": "hidden"}', ".cache.jsonl")
    assert [record.text for record in load_records(tmp_path)] == ["one", "two", "three"]
    ids = [record.record_id for record in load_records(tmp_path)]
    assert ids == ["b.json[0]", "a.jsonl.gz:1", "a.jsonl.gz:2"]


def test_a_set_takes_its_own_files_of_a_directory(tmp_path):
    dialogue = b'{"text": "### Human: Hi### Assistant: Oh"}\n'
    for name in ("openassistant_best_replies_train.jsonl", "openassistant_best_replies_eval.jsonl"):
        write(tmp_path, dialogue, name)
    write(tmp_path, b"{", "other.jsonl")
    (record,) = load_records(tmp_path, "oasst1")
    assert record.record_id == "openassistant_best_replies_train.jsonl:1"


def test_parquet_needs_pyarrow_and_says_so(tmp_path):
    path = write(tmp_path, b"PAR1 and no more", "a.parquet")
    expected = "cannot be read as Parquet after row 0"
    if importlib.util.find_spec("pyarrow") is None:
        expected = "pyarrow, which reads it, is not installed: pip install pyarrow"
    with pytest.raises(DataError, match=f"a.parquet.*{expected}"):
        load_records(path, "text")


def test_parquet_gives_the_records_of_its_rows(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"prompt": ["2+2?", "3+3?"], "completion": ["4", ""]})
    parquet.write_table(table, tmp_path / "a.parquet")
    report = DataReport()
    (record,) = load_records(tmp_path / "a.parquet", on_bad_record="skip", report=report)
    assert record.record_id == "a.parquet[0]" and record.text == "2+2?4"
    assert report.samples[0].startswith("a.parquet[1]: completion: found empty text")


def test_max_records_stops_reading(tmp_path):
    path = write(tmp_path, GOOD * 3 + b"broken\n")
    assert len(load_records(path, max_records=3)) == 3
