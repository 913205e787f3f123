"""`QuantizedTensor` under JAX's transformations, on disk, in memory; its values are tested in
test_pallas_kernels.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1 as ocp

import qlora_jax.quantized as ql
from pallas_kernels import formats

LAYERS, SIZE = 4, 64
FORMATS = [("nf4", True), ("nf4", False), ("fp4", True), ("int4", False)]


def weights(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * 0.1)


def assert_same(a, b):
    """The same tree: metadata, dtypes and bytes."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def layer(stack, i):
    return jax.tree.map(lambda a: a[i], stack)


@functools.cache
def stacked(double_quant=True):
    return jax.vmap(functools.partial(ql.quantize, double_quant=double_quant))(
        weights(LAYERS, SIZE, SIZE)
    )


def scanned_loss(x, stack):
    """A chain of residual layers, as a scanned model has."""
    return (jax.lax.scan(lambda x, q: (x + ql.matmul(x, q), None), x, stack)[0] ** 2).mean()


@pytest.mark.parametrize(
    ("double_quant", "bits"), [(False, 4 + 32 / 64), (True, 4 + 8 / 64 + 32 / (64 * 256))]
)
def test_sizes(double_quant, bits):
    q = jax.eval_shape(
        functools.partial(ql.quantize, double_quant=double_quant),
        jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16),
    )
    offset_bits = 32 / q.size if double_quant else 0
    assert q.bits_per_param == pytest.approx(bits + offset_bits, rel=1e-12)
    assert q.size == 1024 * 1024 and q.leading_shape == () and q.dtype == jnp.bfloat16


@pytest.mark.parametrize(("quant_type", "double_quant"), FORMATS)
@pytest.mark.parametrize("leading_shape", [(), (3,), (2, 3)])
def test_abstract_equals_concrete(quant_type, double_quant, leading_shape):
    settings = dict(quant_type=quant_type, block_size=32, double_quant=double_quant)
    abstract = ql.abstract_quantized(
        (6, 40), leading_shape=leading_shape, dtype=jnp.bfloat16, **settings
    )
    quantize = functools.partial(ql.quantize, **settings)
    for _ in leading_shape:
        quantize = jax.vmap(quantize)
    w = jax.ShapeDtypeStruct((*leading_shape, 6, 40), jnp.bfloat16)
    assert abstract == jax.eval_shape(quantize, w)
    assert abstract.leading_shape == leading_shape


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dequantize_gives_the_original_dtype_unless_told(dtype):
    q = ql.quantize(weights(3, 5, 7).astype(dtype))
    assert ql.dequantize(q).dtype == jnp.dtype(dtype)
    assert ql.dequantize(q, jnp.float32).dtype == jnp.float32
    np.testing.assert_array_equal(ql.dequantize(q, jnp.float32).astype(dtype), ql.dequantize(q))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_refuses_what_is_not_finite_by_name(bad, double_quant, dtype):
    w = weights(3, 100).at[2, 99].set(bad).astype(dtype)
    with pytest.raises(ValueError, match="^layers.3.q_proj: holds a NaN or an infinity"):
        ql.quantize(w, double_quant=double_quant, name="layers.3.q_proj")


def test_other_refusals():
    with pytest.raises(ValueError, match="^up_proj: x.dtype=dtype.'int8'."):
        ql.quantize(jnp.ones(4, jnp.int8), name="up_proj")
    with pytest.raises(ValueError, match="block_size=100 is not supported"):
        ql.abstract_quantized((4, 4), block_size=100)
    with pytest.raises(ValueError, match=r"q.leading_shape=\(4,\).*scan"):
        ql.matmul(jnp.ones((2, SIZE)), stacked())
    with pytest.raises(ValueError, match="matmul takes one matrix"):
        ql.matmul(jnp.ones((2, 5)), ql.quantize(jnp.ones((2, 3, 5))))


@pytest.mark.parametrize("double_quant", [True, False])
def test_vmap_and_jit_equal_one_by_one(double_quant):
    stack, w = stacked(double_quant), weights(LAYERS, SIZE, SIZE)
    one_by_one = [ql.quantize(w[i], double_quant=double_quant) for i in range(LAYERS)]
    jitted = jax.jit(functools.partial(ql.quantize, double_quant=double_quant))
    dense = ql.dequantize(stack)
    assert dense.shape == w.shape and stack.leading_shape == (LAYERS,)
    x = weights(LAYERS, 3, SIZE, seed=1)
    products = jax.vmap(ql.matmul)(x, stack)
    for i, q in enumerate(one_by_one):
        assert_same(layer(stack, i), q)
        assert_same(jitted(w[i]), q)
        np.testing.assert_array_equal(dense[i], ql.dequantize(q))
        np.testing.assert_allclose(products[i], ql.matmul(x[i], q), atol=1e-6)


def test_two_leading_axes():
    w = weights(2, 3, 8, 64)
    stack = jax.vmap(jax.vmap(ql.quantize))(w)
    assert stack.leading_shape == (2, 3) and stack.size == w.size
    np.testing.assert_array_equal(ql.dequantize(stack)[1, 2], ql.dequantize(ql.quantize(w[1, 2])))


@pytest.mark.parametrize("double_quant", [True, False])
def test_scan_and_grad_equal_a_dense_loop(double_quant):
    stack, x = stacked(double_quant), weights(5, SIZE, seed=2)

    def dense_loss(x, dense):
        for w in dense:
            x = x + x @ w.T
        return (x**2).mean()

    value, grad = jax.jit(jax.value_and_grad(scanned_loss))(x, stack)
    expected, expected_grad = jax.value_and_grad(dense_loss)(x, ql.dequantize(stack))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-4, atol=1e-6)


def test_the_weight_gets_no_gradient():
    q = ql.quantize(weights(8, 64))
    grad = jax.grad(lambda q: ql.matmul(jnp.ones((1, 64)), q).sum(), allow_int=True)(q)
    for leaf in jax.tree.leaves(grad):
        assert leaf.dtype == jax.dtypes.float0 or not leaf.any()


# -------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("double_quant", [True, False])
def test_residuals_of_a_product_are_the_packed_weight(double_quant):
    q = ql.quantize(weights(SIZE, SIZE), double_quant=double_quant)
    _, vjp = jax.vjp(lambda x: ql.matmul(x, q), weights(2, SIZE))
    residuals = [leaf for leaf in jax.tree.leaves(vjp) if hasattr(leaf, "dtype")]
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in residuals) <= q.nbytes
    assert not [r for r in residuals if jnp.issubdtype(r.dtype, jnp.floating) and r.size >= SIZE**2]
    # x is no residual either: its gradient does not depend on it, and the weight has none.
    assert {leaf.dtype.name for leaf in residuals} <= {"uint8", "float32"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_eight_more_layers_cost_less_than_one_dense_weight(dtype):
    size, batch = 512, 2
    dense = size * size * jnp.dtype(dtype).itemsize

    def temporaries(layers):
        stack = ql.abstract_quantized((size, size), leading_shape=(layers,))
        x = jax.ShapeDtypeStruct((batch, size), dtype)
        compiled = jax.jit(jax.value_and_grad(scanned_loss)).lower(x, stack).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = temporaries(8), temporaries(16)
    assert many - few < dense
    assert many < 3 * dense, "one weight at a time, and no constants as large as one"


def test_a_donated_stack_is_written_in_place():
    @functools.partial(jax.jit, donate_argnums=0)
    def write(stack, w, i):
        q = ql.quantize(w)
        return jax.tree.map(lambda s, a: jax.lax.dynamic_update_index_in_dim(s, a, i, 0), stack, q)

    stack = jax.tree.map(jnp.copy, stacked())
    w = weights(SIZE, SIZE, seed=7)
    compiled = write.lower(stack, w, 0).compile()
    assert compiled.memory_analysis().alias_size_in_bytes == stack.nbytes
    new = write(stack, w, 2)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(stack))
    assert_same(layer(new, 2), ql.quantize(w))
    assert_same(layer(new, 1), layer(stacked(), 1))


# ---------------------------------------------------------------------- several devices


@pytest.fixture
def mesh():
    if jax.device_count() < 2:
        pytest.skip("needs two devices (tests/conftest.py asks for them)")
    return Mesh(np.array(jax.devices()[:2]), ("data",))


def test_shard_map_over_the_batch(mesh):
    q, x = ql.quantize(weights(96, SIZE)), weights(4, SIZE, seed=3)
    sharded = jax.shard_map(ql.matmul, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
    np.testing.assert_allclose(jax.jit(sharded)(x, q), ql.matmul(x, q), atol=1e-6)

    def loss(x):
        return (sharded(x, q) ** 2).sum()

    expected = jax.grad(lambda x: (ql.matmul(x, q) ** 2).sum())(x)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(x), expected, rtol=1e-5, atol=1e-5)


def test_shard_map_over_the_stack(mesh):
    dequantize = jax.shard_map(ql.dequantize, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    np.testing.assert_array_equal(jax.jit(dequantize)(stacked()), ql.dequantize(stacked()))


def test_named_sharding(mesh):
    split = NamedSharding(mesh, P("data"))
    stack = jax.device_put(stacked(), split)
    assert stack.codes.sharding == split
    dense = ql.dequantize(stack)
    np.testing.assert_array_equal(dense, ql.dequantize(stacked()))
    x = jax.device_put(weights(4, SIZE, seed=4), split)
    replicated = jax.device_put(stacked(), NamedSharding(mesh, P()))
    grad = jax.jit(jax.grad(scanned_loss))(x, replicated)
    assert grad.sharding.is_equivalent_to(split, grad.ndim)
    expected = jax.grad(scanned_loss)(weights(4, SIZE, seed=4), stacked())
    np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------- on disk


@pytest.mark.parametrize("double_quant", [True, False])
def test_orbax_keeps_every_byte(tmp_path, double_quant):
    tree = {"q_proj": stacked(double_quant), "norm": jnp.ones(4, jnp.bfloat16)}
    ocp.save(tmp_path / "base", tree)
    like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)
    restored = ocp.load(tmp_path / "base", like)
    assert isinstance(restored["q_proj"], ql.QuantizedTensor)
    assert_same(restored, tree)


# ------------------------------------------------------------------------ whole pytrees


def test_quantize_params():
    params = {
        "embed": {"embedding": weights(10, 32)},
        "layers": {"q_proj": {"kernel": weights(2, 32, 48), "bias": jnp.ones((2, 48))}},
        "out_proj": {"kernel": weights(32, 64)},
    }
    frozen = ql.quantize_params(params, block_size=32, double_quant=False)
    assert frozen["embed"]["embedding"] is params["embed"]["embedding"]
    assert frozen["layers"]["q_proj"]["bias"] is params["layers"]["q_proj"]["bias"]
    q = frozen["layers"]["q_proj"]["kernel"]
    assert q.leading_shape == (2,) and q.shape == (48, 32) and q.block_size == 32
    kernel = params["layers"]["q_proj"]["kernel"]
    expected = ql.quantize(kernel[1].T, block_size=32, double_quant=False)
    assert_same(layer(q, 1), expected)
    assert frozen["out_proj"]["kernel"].shape == (64, 32)
    only_out = ql.quantize_params(params, where="out_proj/.*", quant_type="fp4")
    assert only_out["layers"]["q_proj"]["kernel"] is kernel
    assert only_out["out_proj"]["kernel"].quant_type == "fp4"


def test_quantize_params_refuses():
    params = {"q_proj": {"kernel": weights(8, 8).at[0, 0].set(jnp.nan), "bias": jnp.ones(8)}}
    with pytest.raises(ValueError, match="matches no leaf; the first paths are .*q_proj/bias"):
        ql.quantize_params(params, where=".*/kernal")
    with pytest.raises(ValueError, match=r"q_proj/bias: a kernel is \(..., in, out\)"):
        ql.quantize_params(params, where=".*/bias")
    with pytest.raises(ValueError, match="^q_proj/kernel: holds a NaN"):
        ql.quantize_params(params)


def test_planes_are_the_upper_and_the_lower_rows():
    """What `formats` promises, and what the transposed product relies on."""
    w = weights(6, 64)
    q = ql.quantize(w, double_quant=False)
    upper = ql.quantize(w[:3], double_quant=False)
    high = np.asarray(q.codes) >> 4
    packed = formats.planar_to_interleaved(upper.codes, 3 * 64, 64)
    np.testing.assert_array_equal(high, np.stack([packed >> 4, packed & 15], 1).reshape(-1))
