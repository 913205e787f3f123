"""Model files made to do harm: each is refused with one sentence, fast and in little memory."""

import json
import os
import pathlib
import struct
import time
import tracemalloc

import pytest
from hostile_files import (
    CORPUS,
    SUFFIXES,
    entry,
    gguf_bytes,
    gguf_text,
    open_file,
    safetensors_bytes,
    small_gguf,
    small_safetensors,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_jax.errors import WeightsError
from qlora_jax.guarded_files import parse_json
from qlora_jax.models.config import LlamaConfig
from qlora_jax.weights import open_checkpoint
from qlora_jax.weights.gguf_header import read_gguf_header
from qlora_jax.weights.safetensors_header import read_header

U64 = 2**64 - 1


def peak_memory(path: pathlib.Path) -> int:
    """Bytes that Python and NumPy had at most while the file was read."""
    tracemalloc.start()
    try:
        open_file(path)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


SAFETENSORS = {
    "a name twice": (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        "two tensors named 'a'",
    ),
    "a name twice, once escaped": (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        b'"\\u0061":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        "two tensors named 'a'",
    ),
    "a key twice": (
        b'{"a":{"dtype":"U8","dtype":"F32","shape":[1],"data_offsets":[0,1]}}',
        "the key 'dtype' is there twice",
    ),
    "metadata twice": (b'{"__metadata__":{},"__metadata__":{}}', "__metadata__ is there twice"),
    "metadata that is no text": (b'{"__metadata__":{"a":[[[]]]}}', "expected a text at byte"),
    "overlap": (
        {"a": entry(shape=[4], offsets=[0, 4]), "b": entry(shape=[4], offsets=[3, 7])},
        "'a' and 'b' overlap",
    ),
    "the same place": (
        {"a": entry(shape=[4], offsets=[0, 4]), "b": entry(shape=[4], offsets=[0, 4])},
        "'a' and 'b' overlap",
    ),
    "a hole": (
        {"a": entry(shape=[4], offsets=[0, 4]), "b": entry(shape=[4], offsets=[5, 9])},
        "'a' and 'b' leave a hole",
    ),
    "bytes of nobody": ({"a": entry()}, "bytes at its end belong to no tensor"),
    "a product that overflows": (
        {"a": entry("F32", [2**32, 2**32, 2**32], [0, 0])},
        "0 bytes for F32",
    ),
    "a product that wraps to fit": ({"a": entry("U8", [2**63, 2], [0, 0])}, "0 bytes for U8"),
    "an end before the beginning": ({"a": entry("U8", [1], [64, 63])}, "-1 bytes for"),
    "fractions": ({"a": entry("U8", [1.0], [0, 1])}, "where numbers are needed"),
    "truth values": ({"a": entry("U8", [True], [0, 1])}, "where numbers are needed"),
    "a dtype that is no text": ({"a": entry(["U8"])}, "unknown dtype"),
    "many dimensions": ({"a": entry("U8", [1] * 9, [0, 1])}, "9 dimensions"),
    "three offsets": ({"a": entry("U8", [1], [0, 1, 2])}, "cannot be read"),
    "a long name": ({"a" * 300: entry()}, "a name of 302 bytes"),
    "a name that is no text": (
        b'{"\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        "a name that is no text",
    ),
    "a comma too many": (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},}',
        "expected a name",
    ),
    "something behind the header": (b'{}{"a":1}', "expected nothing but spaces"),
    "spaces before the header": (b" {}", "does not begin with"),
    "a huge number": (b'{"a":{"dtype":"U8","shape":[' + b"9" * 4300 + b"]}}", "an entry of"),
    "an entry that nests": (b'{"a":{"dtype":{},"shape":[1],"data_offsets":[0,1]}}', "expected an"),
}


@pytest.mark.parametrize("case", SAFETENSORS)
def test_safetensors_headers_that_lie(tmp_path, case):
    header, message = SAFETENSORS[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_bytes(header, bytes(64)))
    with pytest.raises(WeightsError, match=message):
        read_header(path)


GGUF = {
    "a count beyond the file": (gguf_bytes(counts=(U64, 0)), "is cut off or damaged: its header"),
    "fields beyond the file": (gguf_bytes(counts=(0, 2**40)), "is cut off or damaged: its header"),
    "a key twice": (gguf_bytes([("k", 4, bytes(4))] * 2), "the key 'k' twice"),
    "a tensor twice": (
        gguf_bytes(tensors=[("t", [4], 0, 0), ("t", [4], 0, 32)], data=bytes(64)),
        "two tensors named 't'",
    ),
    "overlap": (
        gguf_bytes(tensors=[("a", [16], 0, 0), ("b", [4], 0, 32)], data=bytes(64)),
        "'a' and 'b' in the same place",
    ),
    "an offset between": (
        gguf_bytes(tensors=[("a", [4], 0, 8)], data=bytes(64)),
        "'a' at byte 8, no multiple of 32",
    ),
    "an offset that wraps": (
        gguf_bytes(tensors=[("a", [4], 0, U64 - 31)], data=bytes(64)),
        "is cut off: tensor 'a' reaches",
    ),
    "dimensions that wrap": (
        gguf_bytes(tensors=[("a", [2**32, 2**32], 0, 0)], data=bytes(64)),
        "is cut off: tensor 'a' reaches",
    ),
    "five dimensions": (gguf_bytes(tensors=[("a", [1] * 5, 0, 0)]), "with 5 dimensions"),
    "no dimensions": (gguf_bytes(tensors=[("a", [], 0, 0)]), "'a' of shape"),
    "half a block": (gguf_bytes(tensors=[("a", [33], 8, 0)], data=bytes(64)), "of shape .33."),
    "an alignment of 3": (
        gguf_bytes([("general.alignment", 4, struct.pack("<I", 3))]),
        "an alignment of 3",
    ),
    "an alignment that is text": (
        gguf_bytes([("general.alignment", 8, gguf_text("32"))]),
        "an alignment of '32'",
    ),
    "an array of arrays": (
        gguf_bytes([("a", 9, struct.pack("<IQ", 9, 1))], data=bytes(64)),
        "a metadata array of type 9",
    ),
    "an array beyond the file": (
        gguf_bytes([("a", 9, struct.pack("<IQ", 4, 2**60))], data=bytes(64)),
        "is cut off or damaged",
    ),
    "texts beyond the file": (
        gguf_bytes([("a", 9, struct.pack("<IQ", 8, 2**61))], data=bytes(64)),
        "is cut off or damaged",
    ),
    "a long key": (gguf_bytes([("k" * 300, 4, bytes(4))]), "a name of 300 bytes"),
    "a key that is no text": (gguf_bytes([(b"\xff", 4, bytes(4))]), "not UTF-8"),
    "a truth value of 2": (gguf_bytes([("k", 7, b"\2")]), "a truth value of 2"),
    "a type of metadata": (gguf_bytes([("k", 13, bytes(8))]), "metadata of type 13"),
    "a version": (gguf_bytes(version=0x03000000), "big-endian"),
}


@pytest.mark.parametrize("case", GGUF)
def test_gguf_headers_that_lie(tmp_path, case):
    content, message = GGUF[case]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        read_gguf_header(path)


MIB = 1 << 20


def many_tensors(count: int) -> bytes:
    header = {f"t{i}": entry("U8", [0], [0, 0]) for i in range(count)}
    return safetensors_bytes(header)


LARGE = {
    "lists.safetensors": lambda: safetensors_bytes(b'{"a":' + b"[]," * (2 * MIB) + b"}"),
    "deep.safetensors": lambda: safetensors_bytes(b'{"a":' * MIB),
    "entry.safetensors": lambda: safetensors_bytes(b'{"a":{"shape":[' + b"0.5," * MIB + b"]}}"),
    "metadata.safetensors": lambda: safetensors_bytes(
        b'{"__metadata__":{"a":"' + b"\\n" * (2 * MIB) + b'"}}'
    ),
    "wide.safetensors": lambda: safetensors_bytes(
        ('{"__metadata__":{"a":"\U0001f600' + "x" * (4 * MIB) + '"}}').encode()
    ),
    "tensors.safetensors": lambda: many_tensors(30_000),
    "numbers.gguf": lambda: gguf_bytes(
        [("a", 9, struct.pack("<IQ", 0, 4 * MIB) + b"\x80" * (4 * MIB))]
    ),
    "texts.gguf": lambda: gguf_bytes(
        [
            (
                "tokenizer.ggml.tokens",
                9,
                struct.pack("<IQ", 8, MIB // 32) + gguf_text("é") * (MIB // 32),
            )
        ]
    ),
    "text.gguf": lambda: gguf_bytes(
        [(f"k{i}", 8, gguf_text("\U0001f600" + "x" * 900_000)) for i in range(5)]
    ),
    "tensors.gguf": lambda: gguf_bytes(tensors=[(f"t{i}", [1], 0, 0) for i in range(30_000)]),
    "fields.gguf": lambda: gguf_bytes([(f"k{i}", 0, b"\1") for i in range(30_000)]),
    "lists.json": lambda: b"[" + b"[]," * (2 * MIB) + b"[]]",
    "deep.json": lambda: b"[" * (4 * MIB),
    "large.json": lambda: b'"' + b"x" * (17 * MIB) + b'"',
}


@pytest.mark.parametrize("name", LARGE)
def test_large_headers_take_no_more_than_twice_the_file(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(LARGE[name]())
    started = time.monotonic()
    peak = peak_memory(path)
    assert peak <= 2 * path.stat().st_size + 4 * MIB, peak
    # Measured: 0.1 to 3 s with tracemalloc, which makes it several times slower.
    assert time.monotonic() - started < 60


def corpus() -> list[pathlib.Path]:
    return sorted(path for kind in SUFFIXES for path in (CORPUS / kind).glob("*"))


@pytest.mark.parametrize("kind", SUFFIXES)
def test_the_corpus_is_read_or_refused(tmp_path, kind):
    """Inputs that the fuzzer found worth keeping; names say nothing, suffixes the kind."""
    found = [path for path in corpus() if path.parent.name == kind]
    assert found
    for source in found:
        path = tmp_path / f"model{SUFFIXES[kind]}"
        path.write_bytes(source.read_bytes())
        peak = peak_memory(path)
        assert peak <= 2 * path.stat().st_size + MIB, source.name


MUTATED = settings(
    max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
MUTATIONS = st.lists(
    st.tuples(
        st.sampled_from(("set", "cut", "insert", "u64", "swap", "grow")),
        st.floats(0, 1, exclude_max=True),
        st.one_of(st.integers(0, 255), st.sampled_from((2**31, 2**32, 2**53, 2**63, U64))),
    ),
    min_size=1,
    max_size=4,
)


def mutate(data: bytes, mutations) -> bytes:
    data = bytearray(data)
    for kind, place, value in mutations:
        i = int(place * len(data))
        if kind == "set" and data:
            data[i] = value % 256
        elif kind == "cut":
            del data[i:]
        elif kind == "insert":
            data[i:i] = bytes([value % 256])
        elif kind == "u64":
            data[i : i + 8] = struct.pack("<Q", value)
        elif kind == "swap":
            data[i:] = data[i + 16 :] + data[i : i + 16]
        else:
            data += bytes(value % 256)
    return bytes(data)


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeds")
    config = {"model_type": "llama", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 2, "rope_scaling": None}
    return folder, {
        "safetensors": [small_safetensors()],
        "gguf": [small_gguf(folder / f"{k}.gguf", k).read_bytes() for k in ("gpt2", "llama")],
        "json": [json.dumps(config).encode()],
    }


@pytest.mark.parametrize("kind", SUFFIXES)
def test_the_seeds_are_accepted(seeds, kind):
    folder, found = seeds
    for data in found[kind]:
        path = folder / f"seed{SUFFIXES[kind]}"
        path.write_bytes(data)
        assert open_file(path)


@pytest.mark.parametrize("kind", SUFFIXES)
def test_whatever_the_bytes_are_a_file_is_read_or_refused(seeds, kind):
    folder, found = seeds

    @MUTATED
    @given(st.sampled_from(found[kind]), MUTATIONS)
    def check(data, mutations):
        path = folder / f"mutated{SUFFIXES[kind]}"
        path.write_bytes(mutate(data, mutations))
        open_file(path)  # any other exception than WeightsError fails

    check()


@MUTATED
@given(st.binary(max_size=200))
def test_json_of_any_bytes_ends_in_a_value_or_a_value_error(raw):
    try:
        parse_json(raw)
    except ValueError:
        pass


@MUTATED
@given(st.lists(st.none() | st.integers() | st.text(max_size=8), max_size=8))
def test_json_of_any_value_comes_back(value):
    assert parse_json(json.dumps({"a": value}).encode()) == {"a": value}


def test_json_limits():
    for raw, message in (
        (b"[" * 65 + b"]" * 65, "nested more than 64 deep"),
        (b'{"a": {"b": 1, "b": 2}}', "the key 'b' is there twice"),
        (b"[" + b"0," * (1 << 20) + b"0]", "more than 1,048,576 values"),
        (b"1" * 5000, "Exceeds the limit"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_json(raw)
    assert parse_json(b"[" * 64 + b"]" * 64)
    assert parse_json(json.dumps("[" * 99 + '"' + "{" * 99).encode()) == "[" * 99 + '"' + "{" * 99


def model_folder(folder: pathlib.Path) -> pathlib.Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(safetensors_bytes({"norm": entry()}, b"\1"))
    return folder


@pytest.mark.parametrize("value", [3, ["llama"], {"a": 1}, True])
def test_a_family_that_is_no_name(tmp_path, value):
    folder = model_folder(tmp_path / "model")
    (folder / "config.json").write_text(json.dumps({"model_type": value}))
    with pytest.raises(WeightsError, match="model_type in config.json is .*, which must be a name"):
        open_checkpoint(folder)
    array = struct.pack("<IQ", 0, 1) + b"\1"
    (tmp_path / "x.gguf").write_bytes(gguf_bytes([("general.architecture", 9, array)]))
    with pytest.raises(WeightsError, match="general.architecture is .*, which must be a name"):
        open_checkpoint(tmp_path / "x.gguf")


SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "head_dim")


@pytest.mark.parametrize("value", [0, -1, 2**40, "8", 1.5, [8], {"a": 1}, True])
@pytest.mark.parametrize("key", SIZES)
def test_sizes_of_a_model_are_checked_before_it_is_made(key, value):
    config = {"model_type": "llama", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 4}
    assert LlamaConfig.from_hf(config).num_hidden_layers == 2
    if (key, value) == ("head_dim", 0):  # says nothing, so it is computed
        return
    with pytest.raises(WeightsError):
        LlamaConfig.from_hf(config | {key: value})


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_link_out_of_the_folder_is_not_followed(tmp_path, name):
    outside, folder = model_folder(tmp_path / "outside"), model_folder(tmp_path / "model")
    (folder / name).unlink()
    (folder / name).symlink_to(outside / name)
    with pytest.raises(WeightsError, match=f"{name} is a link that leads out of its folder"):
        open_checkpoint(folder)
    (folder / name).unlink()
    (folder / f"the-{name}").write_bytes((outside / name).read_bytes())
    (folder / name).symlink_to(f"the-{name}")
    assert open_checkpoint(folder).names() == ["norm"]
    (tmp_path / "link").symlink_to(folder)  # the folder's own name is the user's choice
    assert open_checkpoint(tmp_path / "link").names() == ["norm"]


def test_links_of_the_hub_cache_lead_to_the_blobs_of_their_own_repository(tmp_path):
    repository = tmp_path / "hub" / "models--owner--name"
    folder = model_folder(repository / "snapshots" / "abc")
    other = tmp_path / "hub" / "models--owner--other" / "blobs"
    for blobs in (repository / "blobs", other):
        blobs.mkdir(parents=True)
        (blobs / "1234").write_text('{"model_type": "llama"}')
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("../../blobs/1234")
    assert open_checkpoint(folder).names() == ["norm"]
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(other / "1234")
    with pytest.raises(WeightsError, match="leads out of its folder"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.gguf"])
def test_a_pipe_is_not_waited_for(tmp_path, name):
    folder = model_folder(tmp_path / "model")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(WeightsError):
        open_checkpoint(folder / name if name.endswith(".gguf") else folder)
