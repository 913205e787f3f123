"""Which implementation runs where, and what happens when one declines."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import devices
from pallas_kernels.devices import Target

H100 = Target("NVIDIA H100 80GB HBM3", 132, "gpu", "9.0")
A100 = Target("NVIDIA A100-SXM4-80GB", 108, "gpu", "8.0")
T4 = Target("Tesla T4", 40, "gpu", "7.5")
CPU = Target("cpu", None, "cpu")
TPU = Target("TPU v5e", 1, "tpu")


@pytest.fixture
def forget():
    """Clears which lines were logged, before and after."""
    devices._log_once.cache_clear()
    yield
    devices._log_once.cache_clear()


def test_the_target_is_the_default_device_unless_something_says_otherwise():
    assert devices.current_target().platform == "cpu"
    with devices.tracing_for(H100):
        assert devices.current_target() == H100
        inside = []
        jax.jit(lambda x: inside.append(devices.current_target()) or x).trace(1.0)
        assert inside == [H100]
    assert devices.current_target().platform == "cpu"


def test_one_function_is_traced_anew_for_another_target():
    seen = []
    f = jax.jit(lambda x: seen.append(devices.current_target().device_kind) or x)
    for target in (H100, T4, H100):
        with devices.tracing_for(target):
            f.trace(jnp.float32(1))
    assert set(seen) == {"NVIDIA H100 80GB HBM3", "Tesla T4"}


def test_arguments_over_other_meshes_fit_into_tracing_for():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("d",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    x = jax.ShapeDtypeStruct((4, 8), jnp.float32, sharding=sharding)
    with devices.tracing_for(H100):
        assert jax.jit(lambda x: x.reshape(-1) * 2).trace(x).out_info.shape == (32,)


@pytest.mark.parametrize(
    ("implementation", "target", "dtype", "expected"),
    [
        ("xla", CPU, "float32", True),
        ("xla", TPU, "bfloat16", True),
        ("mosaic_gpu", CPU, "bfloat16", False),
        ("triton", TPU, "bfloat16", False),
        ("mosaic_gpu", H100, "bfloat16", True),
        ("mosaic_gpu", A100, "bfloat16", False),
        ("triton", A100, "bfloat16", True),
        ("mosaic_gpu", T4, "float16", False),
        ("triton", T4, "float16", True),
        ("triton", T4, "bfloat16", False),
        ("xla", T4, "bfloat16", False),
        ("dequantize", T4, "float16", True),
        ("dequantize", CPU, "float32", False),
    ],
)
def test_supported(implementation, target, dtype, expected):
    assert devices.supported("matmul_4bit", implementation, target, jnp.dtype(dtype)) is expected


def decline(x):
    raise NotImplementedError(f"{x.shape=} is odd")


def named(name, calls):
    def implementation(x):
        calls.append(name)
        return x + 1

    return implementation


def run(implementations, target, **kwargs):
    """Traces, and gives the names that were traced first and last."""
    with devices.tracing_for(target):
        jax.jit(
            lambda x: devices.run(
                "matmul_4bit", implementations, (x,), dtype=jnp.dtype("float16"), **kwargs
            )
        ).trace(jnp.ones(3, jnp.float16))


def test_the_first_that_can_is_used():
    calls = []
    run({n: named(n, calls) for n in ("mosaic_gpu", "triton", "xla")}, H100)
    assert calls[0] == "mosaic_gpu" and "triton" not in calls
    calls.clear()
    run({n: named(n, calls) for n in ("mosaic_gpu", "triton", "xla")}, T4)
    assert calls[0] == "triton" and "mosaic_gpu" not in calls
    calls.clear()
    run({n: named(n, calls) for n in ("mosaic_gpu", "triton", "xla")}, CPU)
    assert calls == ["xla"]


def test_one_that_declines_is_passed_over_with_one_log_line(forget, caplog):
    calls = []
    table = {"mosaic_gpu": decline, "triton": named("triton", calls), "xla": named("xla", calls)}
    with caplog.at_level(logging.INFO, "pallas_kernels"):
        run(table, H100)
        run(dict(table), H100)
    assert calls[0] == "triton"
    (line,) = [record.getMessage() for record in caplog.records]
    assert "not mosaic_gpu" in line and "(3,)" in line and "H100" in line


def test_an_implementation_can_be_demanded():
    calls = []
    table = {"mosaic_gpu": decline, "xla": named("xla", calls)}
    run(table, H100, implementation="xla")
    assert calls == ["xla"]
    with pytest.raises(ValueError, match="does not serve this: .*is odd"):
        run(table, H100, implementation="mosaic_gpu")
    with pytest.raises(ValueError, match=r"unknown: use one of \('mosaic_gpu', 'xla'\)"):
        run(table, H100, implementation="cuda")


def test_a_program_traced_for_a_gpu_still_runs_on_a_cpu():
    w = jnp.asarray(np.random.default_rng(0).standard_normal((8, 64)), jnp.float16)
    packed = pk.quantize_4bit(w)
    here = pk.dequantize_4bit(*packed, shape=w.shape, dtype=jnp.float16)
    with devices.tracing_for(H100):
        there = jax.jit(lambda *p: pk.dequantize_4bit(*p, shape=w.shape, dtype=jnp.float16))
        np.testing.assert_array_equal(there(*packed), here)


def test_a_stack_runs_the_kernel_tensor_by_tensor():
    shapes = []
    table = {"triton": lambda x: shapes.append(x.shape) or x, "xla": lambda x: x}

    def call(x):
        return devices.run("quantize_4bit", table, (x,), dtype=jnp.dtype("float16"))

    with devices.tracing_for(H100):
        jax.jit(jax.vmap(call)).trace(jnp.ones((5, 3), jnp.float16))
    assert set(shapes) == {(3,)}
