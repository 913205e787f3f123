"""The descriptions of GPUs, and compiling for them on a machine that has none."""

import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import optax
import pytest
from cuda_wheels import needs_cuda_wheels
from jax.experimental.pallas import mosaic_gpu as plgpu
from test_train_step import random_batch, tiny_model

from pallas_kernels import devices
from qlora_jax import compile_only, targets
from qlora_jax.targets import TARGETS, TargetError, compile_for, find_target
from qlora_jax.training.building import split_model
from qlora_jax.training.step import init_state, make_train_step

MATRIX = jax.ShapeDtypeStruct((256, 128), jnp.float32)
BYTES = 256 * 128 * 4


def on_host(x):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def test_every_description_is_read():
    facts = {
        t.name: (t.device_kind, t.compute_capability, t.core_count, t.memory_bytes >> 20)
        for t in map(find_target, TARGETS)
    }
    assert facts == {
        "a100_40gb": ("NVIDIA A100-SXM4-40GB", "8.0", 108, 40339),
        "a100_80gb": ("NVIDIA A100-SXM4-80GB", "8.0", 108, 81157),
        "a6000": ("NVIDIA RTX A6000", "8.6", 84, 48676),
        "h100": ("NVIDIA H100 80GB HBM3", "9.0", 132, 81007),
        "h200": ("NVIDIA H200", "9.0", 132, 144384),
        "l4": ("NVIDIA L4", "8.9", 58, 23034),
        "l40s": ("NVIDIA L40S", "8.9", 142, 46068),
        "rtx3090": ("NVIDIA GeForce RTX 3090", "8.6", 82, 24259),
        "rtx4090": ("NVIDIA GeForce RTX 4090", "8.9", 128, 24217),
        "t4": ("Tesla T4", "7.5", 40, 15109),
    }


def test_a_description_holds_what_rooflines_and_occupancy_need():
    h100 = find_target("h100")
    assert (h100.memory_bandwidth, h100.l2_bytes, h100.clock_ghz) == (3352320000000, 50 << 20, 1.98)
    assert (h100.threads_per_core, h100.registers_per_core) == (2048, 65536)
    assert (h100.shared_bytes_per_core, h100.shared_bytes_per_block) == (228 << 10, 227 << 10)
    assert h100.device == devices.Target("NVIDIA H100 80GB HBM3", 132, "gpu", "9.0")


def test_text_of_protocol_buffers_nests_and_has_comments():
    text = '# note: 1\na { b: 2 c: -1.5 d { e: NONE } }\nf: { g: "x y" } # h: 3\n'
    assert targets._parse(text) == {"a": {"b": 2, "c": -1.5, "d": {"e": "NONE"}}, "f": {"g": "x y"}}


def test_an_unknown_target_is_answered_with_the_nearest():
    with pytest.raises(TargetError, match="did you mean 'rtx4090'"):
        compile_for(jnp.sin, MATRIX, target="rtx4091")
    with pytest.raises(TargetError, match=r"no GPU target 'mi300'; The targets are a100_40gb, "):
        find_target("mi300")


def test_without_the_plugin_it_says_what_to_install(monkeypatch):
    def absent(*args, **keywords):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(compile_only.topologies, "get_topology_desc", absent)
    monkeypatch.setattr(compile_only, "_PLUGINS", ("jax_plugins.no_such_plugin",))
    compile_only._device.cache_clear()
    with pytest.raises(TargetError, match=r'pip install "qlora-jax\[cuda\]"'):
        compile_for(jnp.sin, MATRIX)


def test_where_the_cpu_is_left_out_it_says_so():
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", "cuda")
    try:
        with pytest.raises(TargetError, match="use JAX_PLATFORMS=cuda,cpu"):
            compile_for(jnp.sin, MATRIX)
    finally:
        jax.config.update("jax_platforms", before)


@needs_cuda_wheels
def test_the_memory_plan_counts_arguments_outputs_and_what_they_share():
    def update(p, m):
        return p - 0.1 * m, 0.9 * m + p

    kept = compile_for(update, MATRIX, MATRIX, target="l4").memory_analysis()
    assert kept.argument_size_in_bytes == 2 * BYTES and kept.alias_size_in_bytes == 0
    donated = compile_for(jax.jit(update, donate_argnums=(0, 1)), MATRIX, MATRIX, target="l4")
    assert donated.memory_analysis().alias_size_in_bytes == 2 * BYTES
    # The output's size includes the table of its two pointers.
    assert 2 * BYTES <= donated.peak_bytes < 2 * BYTES + 1024
    assert donated.host_bytes == 0


@needs_cuda_wheels
def test_what_lies_in_the_hosts_memory_is_counted_there():
    """The reason for the way over the CPU: a sharding over compile-only devices forgets it."""

    @partial(jax.jit, donate_argnums=(0, 1))
    def paged_update(p, m):
        m = 0.9 * jax.device_put(m, jax.memory.Space.Device) + p
        return p - 0.1 * m, jax.device_put(m, jax.memory.Space.Host)

    compiled = compile_for(paged_update, MATRIX, on_host(MATRIX), target="rtx4090")
    stats = compiled.memory_analysis()
    assert stats.host_argument_size_in_bytes == stats.host_output_size_in_bytes == BYTES
    assert stats.argument_size_in_bytes == BYTES
    assert compiled.host_bytes == BYTES  # donated: the new moment takes the place of the old
    assert BYTES < compiled.peak_bytes <= 3 * BYTES + 1024
    assert "copy-start" in compiled.as_text()


@needs_cuda_wheels
@pytest.mark.parametrize("name", TARGETS)
def test_programs_are_traced_and_compiled_for_that_gpu(name):
    seen = []

    def product(x, y):
        seen.append(devices.current_target())
        return x @ y

    half = jax.ShapeDtypeStruct((64, 64), jnp.float16)
    compiled = compile_for(product, half, half, target=name)
    assert seen == [find_target(name).device]
    assert compiled.memory_analysis().argument_size_in_bytes == 2 * 64 * 64 * 2


@needs_cuda_wheels
def test_static_arguments_keywords_and_concrete_arrays_go_through():
    @partial(jax.jit, static_argnames=("power", "name"))
    def f(x, power, *, shift, name):
        return x**power + shift if name == "add" else x

    compiled = compile_for(f, jnp.ones((8, 4)), 3, shift=jnp.float32(2), name="add")
    assert compiled.memory_analysis().argument_size_in_bytes == 8 * 4 * 4 + 4


@needs_cuda_wheels
def test_compiler_options_reach_the_compiler():
    with pytest.raises(Exception, match="xla_no_such_option"):
        compile_for(jnp.sin, MATRIX, options={"xla_no_such_option": "1"})


def mosaic_increment(x):
    def kernel(x_gmem, out_gmem):
        row = jax.lax.axis_index("row")
        out_gmem[row] = x_gmem[row] + 1

    return plgpu.kernel(kernel, out_type=x, grid=(x.shape[0],), grid_names=("row",))(x)


@needs_cuda_wheels
def test_mosaic_kernels_are_compiled_for_the_target_in_any_order():
    """Mosaic GPU assembles for the first architecture of a process, and for no other."""
    for name in ("a6000", "h100", "rtx4090"):
        compiled = compile_for(mosaic_increment, MATRIX, target=name)
        assert compiled.memory_analysis().argument_size_in_bytes == BYTES
        assert "mosaic_gpu" in compiled.as_text()


@needs_cuda_wheels
def test_a_compiler_that_ends_is_an_error_with_its_code_and_the_next_one_works():
    compile_for(mosaic_increment, MATRIX, target="h100")
    process = compile_only._process("9.0").process
    process.kill()
    process.wait()
    with pytest.raises(compile_only.CompilerError, match="ended with code -9"):
        compile_for(mosaic_increment, MATRIX, target="h100")
    assert compile_for(mosaic_increment, MATRIX, target="h100").peak_bytes == 2 * BYTES


@needs_cuda_wheels
@pytest.mark.slow
def test_a_training_step_has_a_plan_for_a_gpu():
    graphdef, lora, frozen = split_model(tiny_model(dropout=0.1))
    tx = optax.adamw(1e-3)
    state, batch = init_state(lora, tx, 0), random_batch(2, 2)
    abstract = jax.eval_shape(lambda *args: args, state, frozen, batch)
    compiled = compile_for(make_train_step(graphdef, tx), *abstract, target="rtx4090")
    stats = compiled.memory_analysis()
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((lora, state.opt_state)))
    assert held <= stats.alias_size_in_bytes < stats.argument_size_in_bytes
    assert compiled.peak_bytes > stats.argument_size_in_bytes


@needs_cuda_wheels
@pytest.mark.slow
def test_it_compiles_where_jax_looks_for_a_gpu_first_and_finds_none():
    """Without JAX_PLATFORMS=cpu the plugin declines to start on a machine that has no GPU."""
    code = (
        "import jax; jax.devices()\n"
        "from qlora_jax.targets import compile_for\n"
        "x = jax.ShapeDtypeStruct((8, 8), 'float16')\n"
        "print(compile_for(lambda x: x @ x, x, target='t4').peak_bytes, jax.default_backend())"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[0]) >= 2 * 8 * 8 * 2
