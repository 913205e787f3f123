"""The mark of tests that compile for GPUs: they need JAX's CUDA plugin, but no GPU."""

import importlib.util

import pytest

ABSENT = importlib.util.find_spec("jax_cuda13_plugin") is None
REASON = (
    "the cuda13 wheels are not installed, so nothing is compiled for GPUs; "
    "`make test EXTRAS=dev,cuda` downloads them (a few GB)"
)
needs_cuda_wheels = pytest.mark.skipif(ABSENT, reason=REASON)
