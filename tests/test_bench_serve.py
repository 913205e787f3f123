"""The arithmetic of the part `serve`, and a short run of it."""

import pathlib
import sys

import pytest
from rich.console import Console

sys.path.append(str(pathlib.Path(__file__).parents[1] / "scripts"))
import bench_serve


def sample(clients, tokens, rss, errors=0):
    return {
        "clients": clients,
        "seconds": 10.0,
        "requests": 5,
        "errors": errors,
        "tokens": tokens,
        "reply_seconds": [1.0, 2.0, 9.0],
        "rss": rss,
    }


def test_throughput_is_compared_and_memory_early_with_late():
    memory = [50, 50, 100, 100, *[107] * 6, 110, 110]
    summary = bench_serve.summarize({"1": sample(1, 100, [1]), "32": sample(32, 800, memory)})
    assert summary["throughput_ratio"] == 8
    assert summary["loads"]["1"]["tokens_per_second"] == 10
    assert summary["loads"]["32"]["median_reply_s"] == 2
    assert (summary["rss_early"], summary["rss_late"]) == (100, 110)
    assert summary["rss_growth"] == pytest.approx(0.1)


@pytest.mark.slow
def test_32_clients_get_their_replies_and_leave_nothing_behind():
    summary = bench_serve.summarize(bench_serve.bench(seconds=12, console=Console()))
    assert summary["loads"]["32"]["errors"] == summary["loads"]["1"]["errors"] == 0
    assert summary["loads"]["32"]["requests"] > 32
    assert abs(summary["rss_growth"]) < 0.05
    assert summary["throughput_ratio"] > 1.5  # 3 is asked for, of a machine without other work
