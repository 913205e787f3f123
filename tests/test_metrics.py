"""Tests of qlora_jax.metrics."""

import json
import math
import struct
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib import image
from tensorboardX.proto import event_pb2

from qlora_jax import metrics
from qlora_jax.errors import TrainingError


def _write(workdir, steps, resume_step=0, **more):
    with metrics.MetricsWriter(workdir, resume_step) as writer:
        for step in steps:
            writer.write(step, {"loss": 10.0 - step, **more})


def _steps(workdir):
    return [row["step"] for row in metrics.read_metrics(workdir)]


def test_rows_come_back(tmp_path):
    with metrics.MetricsWriter(tmp_path / "new" / "run") as writer:
        writer.write(1, {"loss": np.float32(1.5), "tokens": jnp.asarray(7), "note": 2})
    header, row = (tmp_path / "new" / "run" / "metrics.jsonl").read_text().splitlines()
    assert header == '{"schema": "qlora_jax/metrics", "version": 1}'
    assert row == '{"step": 1, "loss": 1.5, "tokens": 7, "note": 2}'


def test_a_row_is_on_disk_when_write_returns(tmp_path):
    writer = metrics.MetricsWriter(tmp_path)
    writer.write(1, {"loss": 1.0})
    assert _steps(tmp_path) == [1]
    writer.close()


def test_a_number_that_is_not_finite_is_null(tmp_path):
    with metrics.MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": math.nan, "grad_norm": math.inf})

    def refuse(constant):
        raise AssertionError(constant)

    line = (tmp_path / "metrics.jsonl").read_text().splitlines()[1]
    assert json.loads(line, parse_constant=refuse) == {"step": 1, "loss": None, "grad_norm": None}


def test_resuming_leaves_no_gap_and_no_repeat(tmp_path):
    _write(tmp_path, range(1, 8))
    _write(tmp_path, range(5, 11), resume_step=4)
    assert _steps(tmp_path) == list(range(1, 11))


def test_a_file_from_before_the_schema_is_read_and_gets_one(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
    assert metrics.read_metrics(tmp_path) == [{"step": 1, "loss": 2.5}]
    _write(tmp_path, [2], resume_step=1)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"schema": "qlora_jax/metrics", "version": 1}
    assert _steps(tmp_path) == [1, 2] and len(lines) == 3


def test_a_file_of_a_newer_schema_is_left_alone(tmp_path):
    newer = '{"schema": "qlora_jax/metrics", "version": 2}\n{"step": 1, "losses": [2.5]}\n'
    (tmp_path / "metrics.jsonl").write_text(newer)
    with pytest.raises(TrainingError, match="version 2 of its schema.*knows 1; update qlora_jax"):
        metrics.MetricsWriter(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == newer


def test_resuming_from_nothing_begins_anew(tmp_path):
    _write(tmp_path, range(0, 8))
    _write(tmp_path, range(0, 3), resume_step=0)
    assert _steps(tmp_path) == [0, 1, 2]


def test_what_was_written_for_a_step_is_not_written_again(tmp_path):
    with metrics.MetricsWriter(tmp_path) as writer:
        writer.write(0, {"heldout_loss": 3.0})
        writer.write(1, {"loss": 2.0})
    with metrics.MetricsWriter(tmp_path, resume_step=1) as writer:
        writer.write(0, {"heldout_loss": 3.0})
        writer.write(1, {"loss": 2.0, "heldout_loss": 2.5})
    assert metrics.read_metrics(tmp_path) == [
        {"step": 0, "heldout_loss": 3.0},
        {"step": 1, "loss": 2.0},
        {"step": 1, "heldout_loss": 2.5},
    ]


@pytest.mark.parametrize("torn", ['{"step": 5, "lo', "5\n", '{"loss": 1}\n', "\x00\x00\x00"])
def test_a_torn_last_row_is_cut(tmp_path, torn):
    _write(tmp_path, range(1, 5))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    _write(tmp_path, range(5, 7), resume_step=4)
    assert _steps(tmp_path) == list(range(1, 7))


def _events(path):
    """The events of one file; a record is length, checksum, content, checksum."""
    content, events = path.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        events.append(event_pb2.Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    return events


def test_tensorboard_gets_the_same_and_forgets_the_steps_that_come_again(tmp_path):
    _write(tmp_path, [1, 2])
    _write(tmp_path, [2], resume_step=1)
    paths = sorted((tmp_path / "tensorboard").iterdir(), key=lambda path: path.name[-1])
    first, second = map(_events, paths)
    scalars = [
        [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]
        for events in (first, second)
    ]
    assert scalars == [[(1, "loss", 9.0), (2, "loss", 8.0)], [(2, "loss", 8.0)]]
    restarts = [event.step for event in second if event.HasField("session_log")]
    assert restarts == [2]


def test_nothing_is_left_over(tmp_path):
    _write(tmp_path, [1])
    metrics.plot_loss(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["loss.png", "metrics.jsonl", "tensorboard"]


def test_the_picture_shows_the_losses(tmp_path):
    _write(tmp_path, range(1, 30), learning_rate=1e-4)
    with metrics.MetricsWriter(tmp_path, resume_step=29) as writer:
        writer.write(29, {"heldout_loss": 5.0})
    path = metrics.plot_loss(tmp_path)
    assert path == tmp_path / "loss.png"
    pixels = image.imread(path)[..., :3]
    assert pixels.shape[0] > 300
    blue = (pixels[..., 2] - pixels[..., 0] > 0.3).sum()
    orange = (pixels[..., 0] - pixels[..., 2] > 0.5).sum()
    assert blue > 200 and orange > 20


def test_the_picture_of_a_run_without_rows_or_with_one_kind_of_row(tmp_path):
    assert metrics.plot_loss(tmp_path) is None
    with metrics.MetricsWriter(tmp_path) as writer:
        writer.write(0, {"heldout_loss": math.nan})
        writer.write(1, {"heldout_loss": 2.0})
    assert metrics.plot_loss(tmp_path).exists()


def test_host_memory_follows_this_process():
    before, _ = metrics.host_memory()
    block = np.ones(64 << 20, np.uint8)
    now, peak = metrics.host_memory()
    assert now - before > 50 << 20
    assert peak >= now
    del block


def test_the_peak_is_not_that_of_the_parent_process():
    block = np.ones(512 << 20, np.uint8)
    code = "from qlora_jax import metrics; print(metrics.host_memory()[1])"
    peak = int(subprocess.check_output([sys.executable, "-c", code]))
    assert peak < 450 << 20 < metrics.host_memory()[0]
    del block


def test_device_memory_names_what_the_device_knows():
    class Device:
        def memory_stats(self):
            return {"bytes_in_use": 1, "peak_bytes_in_use": 2, "num_allocs": 3}

    assert metrics.device_memory(Device()) == {"in_use": 1, "peak": 2}
    assert metrics.device_memory() is None
