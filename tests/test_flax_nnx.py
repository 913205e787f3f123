"""The surgery on NNX models: ours to be, hand-made ones, and those of flax.nnx itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.errors import ConfigError, WeightsError
from qlora_jax.flax_nnx import (
    QLoRALinear,
    QuantizedParam,
    apply_qlora,
    merge_model,
    quantize_model,
)
from qlora_jax.linear_layers import linear_paths
from qlora_jax.quantized import QuantizedTensor
from qlora_jax.tree import flatten_paths

FEATURES, LAYERS = 16, 2


class MLP(nnx.Module):
    def __init__(self, rngs, dtype=None):
        self.up = nnx.Linear(FEATURES, 24, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(24, FEATURES, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.gelu(self.up(x)))


class Block(nnx.Module):
    """A transformer block made of what flax.nnx offers."""

    def __init__(self, rngs, dtype=None):
        self.norm = nnx.LayerNorm(FEATURES, dtype=dtype, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, FEATURES, decode=False, dtype=dtype, rngs=rngs)
        self.mlp = MLP(rngs, dtype)

    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.mlp(x)


class ListModel(nnx.Module):
    def __init__(self, rngs, dtype=None):
        self.layers = nnx.List([Block(rngs, dtype) for _ in range(LAYERS)])
        self.lm_head = nnx.Linear(FEATURES, 11, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


class StackedModel(nnx.Module):
    """Layers created under nnx.vmap and run by lax.scan over their state, as Llama does."""

    def __init__(self, rngs, dtype=None):
        @nnx.split_rngs(splits=LAYERS)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def create(rngs):
            return Block(rngs, dtype)

        self.layers = create(rngs)
        self.lm_head = nnx.Linear(FEATURES, 11, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        graphdef, state = nnx.split(self.layers)

        @jax.checkpoint
        def body(x, layer):
            return nnx.merge(graphdef, layer)(x), None

        x, _ = jax.lax.scan(body, x, state)
        return self.lm_head(x)


MODELS = [ListModel, StackedModel]


def inputs(dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(2, 5, FEATURES)), dtype)


@functools.cache
def base_of(make, dtype=None):
    """One model for all tests: surgery must not change it, and one test sees to that."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0), dtype)))
    rng = np.random.default_rng(0)  # compiling the initializers would take most of a test's time
    values = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.3, x.dtype), state)
    return nnx.merge(graphdef, values)


@nnx.jit
def call(model, x):
    return model(x)


def is_qlora(module):
    return isinstance(module, QLoRALinear)


def shapes(model):
    return jax.tree.map(lambda x: (x.shape, x.dtype), nnx.to_pure_dict(nnx.state(model)))


def perturb(model):
    """Puts values that are not zero into every B, as training does."""
    graphdef, lora, rest = nnx.split(model, nnx.LoRAParam, ...)
    rng = np.random.default_rng(5)
    lora = jax.tree.map(lambda x: x + jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype), lora)
    return nnx.merge(graphdef, lora, rest)


# ----------------------------------------------------------------------- choosing


BLOCK_PATHS = ["attention/key", "attention/out", "attention/query", "attention/value"]
BLOCK_PATHS += ["mlp/down", "mlp/up"]


def test_all_linear_is_every_linear_but_the_head():
    assert linear_paths(base_of(StackedModel), "all-linear") == [
        f"layers/{path}" for path in BLOCK_PATHS
    ]
    in_list = [f"layers/{i}/{path}" for i in range(LAYERS) for path in BLOCK_PATHS]
    assert linear_paths(base_of(ListModel), "all-linear") == in_list
    assert linear_paths(base_of(ListModel)) == in_list + ["lm_head"]


def test_a_layer_named_output_inside_a_list_is_no_head():
    class Layer(nnx.Module):
        def __init__(self, rngs):
            self.output = nnx.Linear(4, 4, rngs=rngs)

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([Layer(rngs)])
            self.output = nnx.Linear(4, 4, rngs=rngs)

    assert linear_paths(Model(nnx.Rngs(0)), "all-linear") == ["layers/0/output"]


def test_a_regular_expression_chooses_and_leaves_the_rest_dense():
    model = apply_qlora(base_of(ListModel), where=".*/(query|value)", rank=2, rngs=nnx.Rngs(1))
    kinds = {
        path: is_qlora(node)
        for path, node in nnx.iter_modules(model)
        if isinstance(node, nnx.Linear | nnx.LinearGeneral | QLoRALinear)
    }
    assert sum(kinds.values()) == 2 * LAYERS
    assert {path[-1] for path, chosen in kinds.items() if chosen} == {"query", "value"}


@pytest.mark.parametrize("surgery", [quantize_model, apply_qlora])
def test_choosing_nothing_lists_what_there_is(surgery):
    options = {"rngs": nnx.Rngs(0)} if surgery is apply_qlora else {}
    with pytest.raises(ConfigError, match=r"'q_proj' chooses no linear.*: down, up"):
        surgery(MLP(nnx.Rngs(0)), where="q_proj", **options)
    with pytest.raises(ConfigError, match="not a regular expression"):
        surgery(MLP(nnx.Rngs(0)), where="*", **options)


# ----------------------------------------------------------------------- the surgery


@pytest.mark.parametrize("make", MODELS)
def test_the_given_model_stays_as_it_is(make):
    model = base_of(make)
    before, arrays = nnx.graphdef(model), jax.tree.leaves(nnx.state(model))
    adapted = apply_qlora(model, rank=2, rngs=nnx.Rngs(1))
    adapted.eval()
    assert nnx.graphdef(model) == before
    after = jax.tree.leaves(nnx.state(model))
    assert all(old is new for old, new in zip(arrays, after, strict=True))
    # unadapted variables are new objects over the same arrays
    assert adapted.lm_head.kernel is not model.lm_head.kernel
    assert adapted.lm_head.kernel.get_value() is model.lm_head.kernel.get_value()


def test_shapes_of_the_lora_tree_as_one_literal():
    model = apply_qlora(base_of(StackedModel), where=".*(out|up)", rank=4, rngs=nnx.Rngs(1))
    _, lora, _ = nnx.split(model, nnx.LoRAParam, ...)
    assert jax.tree.map(jnp.shape, nnx.to_pure_dict(lora)) == {
        "layers": {
            "attention": {"out": {"lora_a": (2, 16, 4), "lora_b": (2, 4, 16)}},
            "mlp": {"up": {"lora_a": (2, 16, 4), "lora_b": (2, 4, 24)}},
        }
    }


@pytest.mark.parametrize(
    ("make", "jit", "dtype"),
    [
        (ListModel, False, jnp.float32),
        (ListModel, True, jnp.bfloat16),
        (StackedModel, True, jnp.float32),
        (StackedModel, True, jnp.bfloat16),
    ],
)
def test_first_outputs_equal_the_quantized_bases_to_the_bit(make, jit, dtype):
    base = quantize_model(base_of(make, dtype))
    adapted = apply_qlora(base, rank=4, rngs=nnx.Rngs(1))
    run = call if jit else lambda model, x: model(x)
    x = inputs(dtype)
    y, expected = run(adapted, x), run(base, x)
    assert y.dtype == expected.dtype == dtype
    assert (y == expected).all()


@pytest.mark.parametrize(
    ("make", "dtype"), [(ListModel, jnp.float32), (StackedModel, jnp.bfloat16)]
)
def test_adapters_on_a_dense_base_change_no_bit(make, dtype):
    base = base_of(make, dtype)
    adapted = apply_qlora(base, rank=4, quant_type=None, rngs=nnx.Rngs(1))
    x = inputs(dtype)
    assert (call(adapted, x) == call(base, x)).all()
    kernel = nnx.state(adapted)["layers"]
    assert not any(isinstance(leaf, QuantizedTensor) for leaf in flatten_paths(kernel).values())


def test_the_quantized_layers_compute_with_the_dequantized_kernels():
    model = base_of(ListModel)
    quantized, x = quantize_model(model), inputs()
    dense, report = merge_model(quantized)
    assert report == {} and nnx.graphdef(dense) == nnx.graphdef(model)
    y, original = call(quantized, x), call(model, x)
    np.testing.assert_allclose(y, call(dense, x), rtol=1e-4, atol=1e-4)
    difference = np.linalg.norm(y - original) / np.linalg.norm(original)
    assert 0.001 < difference < 0.3


def test_surgery_on_an_abstract_model_has_the_shapes_of_the_concrete_one():
    abstract = nnx.eval_shape(lambda: StackedModel(nnx.Rngs(0)))
    concrete = base_of(StackedModel)
    options = dict(rank=2, dropout=0.1)
    from_abstract = apply_qlora(quantize_model(abstract), rngs=nnx.Rngs(1), **options)
    assert shapes(from_abstract) == shapes(apply_qlora(concrete, rngs=nnx.Rngs(1), **options))
    leaves = jax.tree.leaves(nnx.state(from_abstract, (QuantizedParam, nnx.LoRAParam)))
    assert leaves and all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


def test_surgery_under_eval_shape_has_the_same_shapes():
    def build():
        return apply_qlora(StackedModel(nnx.Rngs(0)), rank=2, dropout=0.1, rngs=nnx.Rngs(1))

    assert shapes(nnx.eval_shape(build)) == shapes(build())


def test_values_can_be_filled_into_an_abstract_model():
    concrete = quantize_model(base_of(StackedModel))
    model = quantize_model(nnx.eval_shape(lambda: StackedModel(nnx.Rngs(0))))
    nnx.update(model, nnx.state(concrete))
    assert (call(model, inputs()) == call(concrete, inputs())).all()


def test_a_quantized_base_is_kept_and_may_be_larger_than_what_is_adapted():
    base = quantize_model(base_of(ListModel))
    model = apply_qlora(base, where=".*/query", rank=2, rngs=nnx.Rngs(1))
    query, old = model.layers[0].attention.query, base.layers[0].attention.query
    assert query.kernel.get_value().codes is old.kernel.get_value().codes
    assert query.rank == 2 and model.layers[0].mlp.up.rank == 0 == old.rank


def test_adapting_twice_is_refused():
    model = apply_qlora(MLP(nnx.Rngs(0)), where="up", rank=2, rngs=nnx.Rngs(1))
    with pytest.raises(ConfigError, match="have an adapter: up"):
        apply_qlora(model, rank=2, rngs=nnx.Rngs(1))


@pytest.mark.parametrize("options", [{"rank": 0}, {"dropout": 1.0}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        apply_qlora(MLP(nnx.Rngs(0)), rngs=nnx.Rngs(1), **options)


def test_a_weight_that_is_not_finite_is_refused_by_name():
    model = nnx.clone(base_of(ListModel))
    model.layers[1].mlp.up.kernel[0, 0] = jnp.nan
    with pytest.raises(WeightsError, match="layers/1/mlp/up/kernel: holds a NaN .* Leave this"):
        quantize_model(model)


@pytest.mark.parametrize("options", [{"quant_type": "nf5"}, {"block_size": 48}])
@pytest.mark.parametrize("abstract", [False, True])
def test_an_unknown_format_is_a_mistake_of_the_user(options, abstract):
    model = nnx.eval_shape(lambda: MLP(nnx.Rngs(0))) if abstract else MLP(nnx.Rngs(0))
    with pytest.raises(ConfigError, match=f"{next(iter(options))}=.* use one of"):
        quantize_model(model, **options)
    with pytest.raises(ConfigError, match="cannot be quantized"):
        apply_qlora(model, rank=2, rngs=nnx.Rngs(1), **options)


class Containers(nnx.Module):
    """Layers in a dict, a tuple and a list; one module and one kernel are shared; a cycle."""

    def __init__(self, rngs):
        shared = nnx.Linear(4, 4, rngs=rngs)
        self.table = nnx.Dict(a=shared, b=nnx.Linear(4, 4, rngs=rngs))
        self.pair = nnx.data((shared, nnx.Linear(4, 4, rngs=rngs)))
        self.nested = nnx.data([{"x": nnx.Linear(4, 4, rngs=rngs)}])
        self.tied = nnx.Linear(4, 4, rngs=rngs)
        self.tied.kernel = shared.kernel
        self.me = self

    def __call__(self, x):
        for layer in (*self.table.values(), *self.pair, self.nested[0]["x"], self.tied):
            x = layer(x)
        return x


def test_every_container_is_searched_and_sharing_is_kept():
    base = Containers(nnx.Rngs(0))
    model = apply_qlora(base, rank=2, rngs=nnx.Rngs(1))
    layers = [*model.table.values(), *model.pair, model.nested[0]["x"], model.tied]
    assert all(isinstance(layer, QLoRALinear) for layer in layers)
    assert model.table.a is model.pair[0] and model.me is model
    assert model.tied.kernel is model.table.a.kernel
    assert model.tied.lora_a is not model.table.a.lora_a
    assert isinstance(base.pair[0], nnx.Linear) and isinstance(base.nested[0]["x"], nnx.Linear)
    np.testing.assert_allclose(model(jnp.ones((1, 4))), base(jnp.ones((1, 4))), atol=0.3)


def test_a_single_layer_is_a_model():
    layer = apply_qlora(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), rank=1, rngs=nnx.Rngs(1))
    assert isinstance(layer, QLoRALinear) and layer(jnp.ones(4)).shape == (3,)


def test_layers_with_a_meaning_of_their_own_are_left_alone():
    class Doubled(nnx.Linear):
        def __call__(self, x):
            return 2 * super().__call__(x)

    class Renamed(nnx.Linear):
        pass

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.doubled, self.renamed = Doubled(4, 4, rngs=rngs), Renamed(4, 4, rngs=rngs)
            self.batched = nnx.LinearGeneral(4, 4, batch_axis={0: 2}, rngs=rngs)

    assert linear_paths(Model(nnx.Rngs(0))) == ["renamed"]
