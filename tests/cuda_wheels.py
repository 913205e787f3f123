"""The mark of tests that compile for GPUs: they need JAX's CUDA plugin, but no GPU."""

import importlib.util

import pytest

ABSENT = importlib.util.find_spec("jax_cuda13_plugin") is None
needs_cuda_wheels = pytest.mark.skipif(
    ABSENT,
    reason="the cuda13 wheels are not installed, so nothing here is compiled for GPUs; "
    "`make test EXTRAS=dev,cuda` downloads them (a few GB)",
)
