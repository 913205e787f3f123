"""An encoder-decoder in a whole run: its batches, its loss, and that a run can stop and go on."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import t5_models
from tiny_run import REPOSITORY, quiet_report, write_data

from qlora_jax import config as config_lib
from qlora_jax.data.batches import BatchIterator
from qlora_jax.data.formats import Record, pair
from qlora_jax.data.pairs import make_pair_batch, tokenize_pairs
from qlora_jax.data.report import DataReport
from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.errors import ConfigError, DataError
from qlora_jax.export import export_merged
from qlora_jax.generation import generate
from qlora_jax.loading import load_model
from qlora_jax.peft import save_adapter
from qlora_jax.training import load_trained, train
from qlora_jax.training.family import family_of, sequence_to_sequence_loss

END = 1


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    path = tmp_path_factory.mktemp("t5")
    return t5_models.write_folder(path / "model"), write_data(path / "data.jsonl")


@pytest.fixture(scope="module")
def tokenizer(files) -> Tokenizer:
    return Tokenizer.from_file(files[0]).with_chat_format("plain")


def tiny_config(files):
    """The recipe itself, shrunken."""
    config = config_lib.load_config(REPOSITORY / "configs" / "flan_t5_xl.py")
    config.model.path, config.data.path = map(str, files)
    config.model.block_size, config.model.compute_dtype = 32, "float32"
    config.data.name, config.data.cache_dir, config.data.max_len = "", "none", 40
    config.data.source_max_len, config.data.target_max_len = 24, 12
    config.data.group_by_length = False
    config.lora.rank, config.lora.dropout = 4, 0.1
    config.train.batch_size, config.train.grad_accum, config.train.steps = 2, 2, 8
    config.train.log_every, config.train.loss_chunk = 4, 16
    config.optimizer.learning_rate = 2e-2
    config.sample.max_new_tokens = 4
    return config


# ------------------------------------------------------------------------------ from text to rows


def tokenize(records, tokenizer, report=None, **options):
    report = report or DataReport()
    examples = [example for _, example in tokenize_pairs(records, tokenizer, report, **options)]
    return [example for example in examples if len(example.tokens)]


def record(source, target):
    return Record("a.jsonl:1", "prompt_completion", **pair(source, target))


def test_source_and_target_end_with_the_end_token(tokenizer):
    (example,) = tokenize(
        [record("what is one ", "it is one")], tokenizer, source_max_len=9, target_max_len=9
    )
    source, target = (tokenizer.encode(text) for text in ("what is one", "it is one"))
    assert example.tokens.tolist() == [*source, END, *target, END]
    assert example.loss_mask.tolist() == [0] * 4 + [1] * 4 and not example.truncated


def test_what_is_too_long_keeps_its_end_token(tokenizer):
    report = DataReport()
    (example,) = tokenize(
        [record("what is one and two", "it is one and two")],
        tokenizer,
        source_max_len=4,
        target_max_len=3,
        report=report,
    )
    wanted = [*tokenizer.encode("what is one"), END, *tokenizer.encode("it is"), END]
    assert example.tokens.tolist() == wanted and example.truncated and report.truncated == 1


def test_the_last_answer_of_a_conversation_is_the_target(tokenizer):
    turns = ("user", "what is one"), ("assistant", "one"), ("user", "and two"), ("assistant", "two")
    messages = tuple({"role": role, "content": content} for role, content in turns)
    (example,) = tokenize(
        [Record("a:1", "messages", messages)], tokenizer, source_max_len=16, target_max_len=16
    )
    target = example.tokens[example.loss_mask == 1].tolist()
    assert target == [*tokenizer.encode("two"), END]
    assert len(example.tokens) > 8


def test_a_text_without_an_answer_is_refused_or_skipped(tokenizer):
    records = [Record("a.jsonl:1", "text", text="one two"), record("what", "one")]
    options = dict(source_max_len=8, target_max_len=8)
    with pytest.raises(DataError, match="a.jsonl:1: text: found a text without an answer"):
        tokenize(records, tokenizer, **options)
    assert len(tokenize(records, tokenizer, on_bad_record="skip", **options)) == 1
    with pytest.raises(DataError, match="target_max_len=1"):
        tokenize(records, tokenizer, source_max_len=8, target_max_len=1)


def test_grouped_batches_are_cut_in_both_rows(tokenizer):
    records = [record("what is " * n, "it " * n) for n in (1, 1, 9, 9)]
    examples = tokenize(records, tokenizer, source_max_len=40, target_max_len=24)

    def build(*args):
        return make_pair_batch(*args, source_len=40, target_len=24)

    options = dict(batch_size=2, seq_len=64, packing=False, group_by_length=True, build=build)
    batches = BatchIterator(examples, **options)
    shapes = [{name: array.shape for name, array in next(batches).arrays.items()} for _ in range(2)]
    assert shapes[0] == dict.fromkeys(shapes[0], (1, 2, 32)) | {
        name: (1, 2, 24) for name in ("tokens", "loss_mask", "segment_ids", "positions")
    }
    assert {shape["source_tokens"] for shape in shapes} == {(1, 2, 32)}


# ----------------------------------------------------------------------------------------- the loss


def test_the_loss_is_that_of_transformers_whatever_the_padding():
    """Rows padded on the right, of different lengths; its mean over all target tokens."""
    _, _, found = t5_models.golden("gated")
    model, rows, targets = t5_models.fill(), found["source"].shape[0], found["target"].shape[1]
    pad = ((0, 0), (0, 3))
    batch = {
        "source_tokens": np.pad(found["source"], pad),
        "source_segment_ids": np.pad(found["source_mask"], pad),
        "tokens": np.pad(found["target"], pad),
        "positions": np.pad(np.arange(targets)[None].repeat(rows, 0), pad),
    }
    mask = np.pad(np.ones((rows, targets), np.int32), pad)
    batch |= {"loss_mask": mask, "segment_ids": mask}
    batch = {name: jnp.asarray(array, jnp.int32) for name, array in batch.items()}
    loss, count = sequence_to_sequence_loss(model, batch, chunk_size=7)
    assert int(count) == rows * targets
    np.testing.assert_allclose(loss / count, found["loss"][0], rtol=1e-5)


# ------------------------------------------------------------------------------------- a whole run


@pytest.fixture(scope="module")
def run(files, tmp_path_factory):
    config, workdir = tiny_config(files), tmp_path_factory.mktemp("runs") / "whole"
    report, text = quiet_report()
    losses = {}
    result = train(config, workdir, report=report, on_step=lambda i, row: losses.update({i: row}))
    return config, workdir, result, losses, text.getvalue()


@pytest.mark.slow
def test_a_run_learns_and_asks(run):
    _, workdir, result, losses, text = run
    assert result.steps == 8 and result.heldout_after < 0.9 * result.heldout_before
    assert losses[8]["loss"] < losses[1]["loss"]
    # Both rows count: 4 sources and 4 targets a step.
    assert losses[1]["tokens"] > 2 * losses[1]["loss_tokens"] > 0
    assert result.question.startswith("what is the sum of")
    assert result.answer_after is not None and "continuing" not in text
    assert json.loads((workdir / "result.json").read_text())["steps"] == 8


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_bit(run, tmp_path):
    config, _, _, losses, _ = run
    workdir, report = tmp_path / "half", quiet_report()[0]
    first = config.copy_and_resolve_references()
    first.train.steps = 4
    train(first, workdir, report=report)
    again = {}
    train(config, workdir, report=report, on_step=lambda i, row: again.update({i: row}))
    assert sorted(again) == [5, 6, 7, 8]
    assert [again[i]["loss"] for i in again] == [losses[i]["loss"] for i in again]


@pytest.mark.slow
def test_a_trained_model_answers(run):
    _, workdir, result, _, _ = run
    model, tokenizer = load_trained(workdir)
    question = [{"role": "user", "content": result.question}]
    assert generate(model, tokenizer, [question], max_new_tokens=4) == [result.answer_after]


@pytest.mark.slow
def test_the_model_without_a_run_answers_as_before(run, files):
    _, _, result, _, _ = run
    model, tokenizer = load_model(files[0], block_size=32)
    assert generate(model, tokenizer, [result.question], max_new_tokens=4) == [result.answer_before]


@pytest.mark.slow
def test_a_run_with_rows_grouped_by_length_learns(files, tmp_path):
    config = tiny_config(files)
    config.data.group_by_length = True
    result = train(config, tmp_path / "run", report=quiet_report()[0])
    assert result.heldout_after < result.heldout_before


def test_settings_of_decoders_are_refused_together(files):
    config = tiny_config(files)
    config.data.packing, config.data.source_max_len = True, 0
    config.train.neftune_alpha = 5.0
    shape = t5_models.fill().config
    with pytest.raises(ConfigError) as error:
        family_of(shape, config)
    for name in ("data.packing=True", "data.source_max_len=0", "train.neftune_alpha"):
        assert name in str(error.value)
    assert "target_max_len" not in str(error.value)


@pytest.mark.slow
def test_a_merge_is_refused_by_name_and_an_adapter_is_written(run, tmp_path):
    _, workdir, _, _, _ = run
    with pytest.raises(ConfigError, match="trained an encoder-decoder, whose adapters are not"):
        export_merged(workdir, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    model, _ = load_trained(workdir)
    out = save_adapter(model, tmp_path / "adapter", base_model="google/flan-t5-xl")
    assert json.loads((out / "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"
