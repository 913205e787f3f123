"""The decoder against transformers, and the properties training and decoding rely on."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from flax import nnx
from llama_models import GOLDEN, TINY_CASES, golden_tiny, random_model, smollm2, tiny_config

from pallas_kernels.devices import Target, tracing_for
from qlora_jax.models.attention import (
    attend,
    attention_mask,
    grouped_attention,
    implementation,
)
from qlora_jax.models.llama import Llama
from qlora_jax.models.remat import REMAT_POLICIES

TOLERANCE = 2e-4


def make(remat="full", dtype=jnp.float32, **overrides) -> Llama:
    return random_model(tiny_config(**overrides), remat=remat, dtype=dtype)


@nnx.jit
def forward(model: Llama, tokens, **kwargs):
    """The model's call in one program, which is quicker than compiling operation by operation."""
    return model(tokens, **kwargs)


def tokens_of(model: Llama, *shape: int) -> jax.Array:
    return jax.random.randint(jax.random.key(1), shape, 0, model.config.vocab_size)


@pytest.mark.parametrize("case", TINY_CASES)
def test_logits_equal_transformers(case):
    model, ids, logits = golden_tiny(case)
    np.testing.assert_allclose(forward(model, jnp.asarray(ids)), logits, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("case", TINY_CASES)
def test_decoding_with_a_cache_equals_one_pass(case):
    model, ids, logits = golden_tiny(case)
    ids, cache = jnp.asarray(ids), model.init_cache(batch_size=2, max_len=24)
    first, cache = forward(model, ids[:, :7], cache=cache)
    rest = []
    for t in range(7, ids.shape[1]):
        out, cache = forward(model, ids[:, t : t + 1], cache=cache)
        rest.append(out)
    ours = jnp.concatenate([first, *rest], axis=1)
    np.testing.assert_allclose(ours, logits, rtol=0, atol=TOLERANCE)
    assert int(cache.length) == ids.shape[1]


def test_smollm2_logits_equal_transformers():
    model = smollm2()
    with safetensors.safe_open(GOLDEN / "smollm2.safetensors", "np") as file:
        for i in range(3):
            ids = file.get_tensor(f"{i}.ids")
            padded = np.pad(ids, (0, 48 - len(ids)))[None]
            logits = np.asarray(forward(model, padded))[0, : len(ids)]
            golden = file.get_tensor(f"{i}.logits_every_64th")
            np.testing.assert_allclose(logits[:, ::64], golden, rtol=0, atol=TOLERANCE)
            total = jax.nn.logsumexp(logits, axis=-1)
            np.testing.assert_allclose(total, file.get_tensor(f"{i}.logsumexp"), rtol=1e-5)
            np.testing.assert_array_equal(logits.argmax(-1), file.get_tensor(f"{i}.argmax"))


@pytest.mark.parametrize("case", ["llama3", "mistral", "qwen2_windowed"])
def test_packed_sequences_equal_separate_ones(case):
    model, ids, _ = golden_tiny(case)
    first, second = jnp.asarray(ids[:1, :8]), jnp.asarray(ids[1:, :11])
    packed = jnp.concatenate([first, second, jnp.zeros((1, 3), jnp.int32)], axis=1)
    segments = jnp.array([[1] * 8 + [2] * 11 + [0] * 3])
    positions = jnp.array([[*range(8), *range(11), 0, 0, 0]])
    logits = forward(model, packed, positions=positions, segment_ids=segments)
    np.testing.assert_allclose(logits[:, :8], forward(model, first), rtol=0, atol=1e-5)
    np.testing.assert_allclose(logits[:, 8:19], forward(model, second), rtol=0, atol=1e-5)
    assert np.isfinite(logits).all()


def test_left_padding_does_not_change_the_logits():
    model, ids, logits = golden_tiny("mistral")
    pad = 4
    padded = jnp.pad(jnp.asarray(ids), ((0, 0), (pad, 0)))
    segments = (jnp.arange(padded.shape[1]) >= pad).astype(jnp.int32)[None].repeat(2, axis=0)
    positions = jnp.maximum(jnp.arange(padded.shape[1]) - pad, 0)[None].repeat(2, axis=0)
    cache = model.init_cache(2, max_len=32)
    ours, _ = forward(model, padded, positions=positions, segment_ids=segments, cache=cache)
    np.testing.assert_allclose(ours[:, pad:], logits, rtol=0, atol=TOLERANCE)


def test_a_token_sees_nothing_later_and_nothing_beyond_the_window():
    model = make(sliding_window=4, num_hidden_layers=1)
    tokens = tokens_of(model, 1, 12)
    other = tokens.at[0, 5].set((tokens[0, 5] + 1) % 32)
    changed = forward(model, other) != forward(model, tokens)
    assert np.flatnonzero(changed.any(-1)[0]).tolist() == [5, 6, 7, 8]


def loss_and_gradient(model: Llama, tokens: jax.Array):
    def loss(model):
        return jnp.square(model(tokens)).mean()

    return nnx.jit(nnx.value_and_grad(loss))(model)


@pytest.mark.parametrize("remat", sorted(REMAT_POLICIES))
def test_rematerialisation_does_not_change_the_gradient(remat):
    model = make(remat)
    tokens = tokens_of(model, 2, 8)
    loss, gradient = loss_and_gradient(model, tokens)
    plain_loss, plain = loss_and_gradient(make("none"), tokens)
    np.testing.assert_allclose(loss, plain_loss, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), gradient, plain
    )


def test_rematerialisation_saves_what_its_name_says():
    sizes = {}
    for remat in ("none", *REMAT_POLICIES):
        graphdef, state = nnx.split(make(remat))

        def pullback(state, tokens, graphdef=graphdef):
            return jax.vjp(lambda state: nnx.merge(graphdef, state)(tokens), state)[1]

        residuals = jax.eval_shape(pullback, state, jnp.zeros((2, 64), jnp.int32))
        sizes[remat] = sum(leaf.size for leaf in jax.tree.leaves(residuals))
    assert sizes["full"] < sizes["projections"] < sizes["none"]
    assert sizes["full"] < sizes["dots"] < sizes["none"]


def test_unknown_rematerialisation_is_refused():
    with pytest.raises(ValueError, match="remat='ful' must be 'none' or one of"):
        make("ful")


def test_paths_and_shapes():
    state = nnx.state(make(tie_word_embeddings=False, qkv_bias=True, qk_norm=True), nnx.Param)
    shapes = {"/".join(path): leaf.shape for path, leaf in nnx.to_flat_state(state)}
    assert shapes == {
        "embed_tokens/embedding": (32, 16),
        "layers/input_layernorm/scale": (3, 16),
        "layers/mlp/down_proj/kernel": (3, 24, 16),
        "layers/mlp/gate_proj/kernel": (3, 16, 24),
        "layers/mlp/up_proj/kernel": (3, 16, 24),
        "layers/post_attention_layernorm/scale": (3, 16),
        "layers/self_attn/k_norm/scale": (3, 4),
        "layers/self_attn/k_proj/bias": (3, 8),
        "layers/self_attn/k_proj/kernel": (3, 16, 8),
        "layers/self_attn/o_proj/kernel": (3, 16, 16),
        "layers/self_attn/q_norm/scale": (3, 4),
        "layers/self_attn/q_proj/bias": (3, 16),
        "layers/self_attn/q_proj/kernel": (3, 16, 16),
        "layers/self_attn/v_proj/bias": (3, 8),
        "layers/self_attn/v_proj/kernel": (3, 16, 8),
        "lm_head/kernel": (16, 32),
        "norm/scale": (16,),
    }


def test_layers_start_different():
    kernel = Llama(tiny_config(), rngs=nnx.Rngs(0)).layers.mlp.up_proj.kernel[...]
    assert not np.allclose(kernel[0], kernel[1])


def test_a_65b_model_needs_no_memory_until_it_has_weights():
    config = dataclasses.replace(
        tiny_config(),
        vocab_size=32000,
        hidden_size=8192,
        intermediate_size=22016,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=64,
        head_dim=128,
        tie_word_embeddings=False,
    )
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16))
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(leaf.size for leaf in leaves) == 65_285_660_672
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("tied", [True, False])
def test_16_bit_computation_stays_near_and_gives_float32_logits(dtype, tied):
    exact, rounded = make(tie_word_embeddings=tied), make(dtype=dtype, tie_word_embeddings=tied)
    tokens = tokens_of(exact, 2, 8)
    assert nnx.eval_shape(lambda m: m.hidden_states(tokens), rounded).dtype == dtype
    logits = forward(rounded, tokens)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, forward(exact, tokens), atol=0.1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScaledWeight:
    codes: jax.Array
    scale: jax.Array
    shape: tuple[int, int] = dataclasses.field(metadata=dict(static=True))


class FrozenVariable(nnx.Variable):
    pass


class ReplacedLinear(nnx.Module):
    """Stands for what adapters and quantization put in: a pytree weight, a random stream."""

    def __init__(self, codes: jax.Array):
        layers, *shape = codes.shape
        scale = jnp.full((layers,), 1 / 64)
        self.weight = FrozenVariable(ScaledWeight(codes, scale, tuple(shape)))
        self.dropout_rngs = nnx.Rngs(dropout=0).split(layers)

    def __call__(self, x):
        self.dropout_rngs.dropout()
        weight = self.weight.get_value()
        return x @ (weight.codes.astype(x.dtype) * weight.scale)


def test_linears_can_be_replaced_by_anything_callable():
    model = make()
    tokens = tokens_of(model, 2, 8)
    codes = {}
    for parent in (model.layers.self_attn, model.layers.mlp):
        for name, child in list(vars(parent).items()):
            if isinstance(child, nnx.Linear):
                codes[parent, name] = jnp.round(child.kernel[...] * 64).astype(jnp.int8)
                child.kernel[...] = codes[parent, name] / 64
    expected = forward(model, tokens)
    for (parent, name), code in codes.items():
        setattr(parent, name, ReplacedLinear(code))
    np.testing.assert_allclose(forward(model, tokens), expected, atol=1e-5)
    gradient = nnx.jit(nnx.grad(lambda m: m(tokens).sum()))(model)
    assert np.isfinite(gradient.layers.input_layernorm.scale[...]).all()


def test_hidden_states_and_head_make_the_logits():
    model = make()
    tokens = tokens_of(model, 2, 8)
    np.testing.assert_array_equal(model.head(model.hidden_states(tokens)), model(tokens))


@pytest.mark.parametrize(
    ("window", "kv_heads", "dtype"),
    [(None, 2, jnp.float32), (3, 1, jnp.float32), (3, 6, jnp.bfloat16)],
)
def test_grouped_attention_equals_jaxs(window, kv_heads, dtype):
    """Values and gradients, by mask and by default mask."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, y = (jax.random.normal(key, (2, 8, 6, 4), dtype) for key in keys[:2])
    k, v = (jax.random.normal(key, (2, 8, kv_heads, 4), dtype) for key in keys[2:])
    segments = jnp.ones((1, 8))
    mask = attention_mask(jnp.arange(8), segments, segments, window)
    local = None if window is None else (window - 1, 0)

    def jaxs(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=local)

    expected, jax_vjp = jax.vjp(jaxs, q, k, v)
    ours, vjp = jax.vjp(lambda q, k, v: grouped_attention(q, k, v, mask), q, k, v)
    tolerance = 1e-5 if dtype == jnp.float32 else 0.05
    for a, b in [(ours, expected), *zip(vjp(y), jax_vjp(y), strict=True)]:
        assert a.dtype == dtype
        np.testing.assert_allclose(a, b, atol=tolerance, rtol=0)
    np.testing.assert_array_equal(attend(q, k, v, None, window), ours)


@pytest.mark.parametrize(
    ("device", "shape", "expected"),
    [
        (("cpu", None), dict(dtype=jnp.bfloat16), "grouped"),
        (("gpu", "9.0"), dict(dtype=jnp.bfloat16), "cudnn"),
        (("gpu", "8.0"), dict(dtype=jnp.float16), "cudnn"),
        (("gpu", "12.0"), dict(dtype=jnp.bfloat16), "cudnn"),
        (("gpu", "7.5"), dict(dtype=jnp.float16), "xla"),
        (("rocm", None), dict(dtype=jnp.float16), "xla"),
        (("gpu", "9.0"), dict(dtype=jnp.float32), "xla"),
        (("gpu", "9.0"), dict(dtype=jnp.bfloat16, head_dim=256), "xla"),
        (("gpu", "9.0"), dict(dtype=jnp.bfloat16, query_len=1), "xla"),
        (("tpu", None), dict(dtype=jnp.bfloat16), "xla"),
    ],
)
def test_the_implementation_suits_the_device(device, shape, expected):
    platform, capability = device
    shape = dict(head_dim=64, query_len=256, key_len=256) | shape
    with tracing_for(Target("a device", None, platform, capability)):
        assert implementation(**shape) == expected


def test_golden_prompts_are_what_the_test_thinks():
    with safetensors.safe_open(GOLDEN / "smollm2.safetensors", "np") as file:
        records = json.loads(file.metadata()["records"])
    assert records[1]["reply"] == "The capital of France is Paris."
