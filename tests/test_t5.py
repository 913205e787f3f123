"""The encoder-decoder against transformers, and the properties training and decoding rely on."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import t5_models
from flax import nnx

from qlora_jax import config as config_lib
from qlora_jax import planning, targets
from qlora_jax.errors import ConfigError, WeightsError
from qlora_jax.flax_nnx import apply_qlora
from qlora_jax.linear_layers import linear_paths
from qlora_jax.loading import base_fingerprint, load_model
from qlora_jax.models.kinds import abstract_model, read_shape
from qlora_jax.models.relative_attention import RelativePositionBias
from qlora_jax.models.remat import REMAT_POLICIES
from qlora_jax.models.shapes import SHAPES, model_shape
from qlora_jax.models.t5 import T5
from qlora_jax.models.t5_config import T5Config
from qlora_jax.packed_checkpoint import quantize_checkpoint
from qlora_jax.report import measure

ROOT = pathlib.Path(__file__).parents[1]
TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("t5")


def load(folder, case="gated", **options) -> T5:
    return t5_models.load(folder / case, case, **options)


@nnx.jit
def forward(model, tokens, **kwargs):
    return model(tokens, **kwargs)


@functools.cache
def make(case="gated", dtype=jnp.float32, **options) -> T5:
    """A golden model; shared, so do not change it."""
    return t5_models.fill(case, dtype, **options)


def golden_logits(model, found):
    tokens = t5_models.shift_right(model, found["target"])
    return forward(model, tokens, source=found["source"], source_segment_ids=found["source_mask"])


@pytest.mark.parametrize("case", t5_models.CASES)
def test_logits_equal_transformers(case):
    _, _, found = t5_models.golden(case)
    logits = golden_logits(make(case), found)
    np.testing.assert_allclose(logits, found["logits"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("case", t5_models.CASES)
def test_decoding_with_a_cache_equals_one_pass(case):
    model, (_, _, found) = make(case), t5_models.golden(case)
    cache = nnx.jit(T5.init_cache, static_argnums=2)(
        model, found["source"], 24, found["source_mask"]
    )
    tokens = t5_models.shift_right(model, found["target"])
    first, cache = forward(model, tokens[:, :5], cache=cache)
    rest = []
    for t in range(5, tokens.shape[1]):
        logits, cache = forward(model, tokens[:, t : t + 1], cache=cache)
        rest.append(logits)
    ours = jnp.concatenate([first, *rest], axis=1)
    np.testing.assert_allclose(ours, found["logits"], rtol=0, atol=TOLERANCE)
    assert int(cache.target.length) == tokens.shape[1]


def test_the_gradient_equals_that_of_transformers():
    model, (_, _, found) = make(), t5_models.golden("gated")

    def loss(model):
        logits = golden_logits(model, found)
        return -jnp.take_along_axis(
            jax.nn.log_softmax(logits), found["target"][..., None], axis=-1
        ).mean()

    value, gradient = nnx.jit(nnx.value_and_grad(loss))(model)
    np.testing.assert_allclose(value, found["loss"][0], rtol=1e-5)
    ours = gradient["encoder"]["layers"]["self_attn"]["q"]["kernel"].get_value()[1].T
    np.testing.assert_allclose(ours, found["gradient_of_q"], rtol=1e-3, atol=1e-6)


def test_a_model_needs_a_source():
    with pytest.raises(ValueError, match="needs a source"):
        make()(jnp.zeros((1, 1), jnp.int32))


def test_rows_may_be_padded_on_either_side_and_hold_several_pairs():
    model, (_, _, found) = make(), t5_models.golden("gated")
    target = t5_models.shift_right(model, found["target"])
    sources = [found["source"][0], found["source"][1, :11]]
    targets = [target[0], target[1, :9]]
    pad = 3
    packed = np.concatenate([[0] * pad, *sources])[None]
    segments = np.repeat([0, 1, 2], [pad, 23, 11])[None]
    logits = forward(
        model,
        np.concatenate([*targets, [0, 0]])[None],
        source=packed,
        source_segment_ids=segments,
        segment_ids=np.repeat([1, 2, 0], [21, 9, 2])[None],
    )[0]
    assert np.isfinite(logits).all()
    np.testing.assert_allclose(logits[:21], found["logits"][0], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(logits[21:30], found["logits"][1, :9], rtol=0, atol=TOLERANCE)


def gradient(remat):
    _, _, found = t5_models.golden("gated")
    loss = nnx.jit(nnx.grad(lambda model: jnp.square(golden_logits(model, found)).mean()))
    return jax.tree.map(np.asarray, nnx.to_pure_dict(loss(make(remat=remat))))


@pytest.fixture(scope="module")
def plain_gradient():
    return gradient("none")


@pytest.mark.slow
@pytest.mark.parametrize("remat", sorted(REMAT_POLICIES))
def test_rematerialisation_does_not_change_the_gradient(remat, plain_gradient):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        gradient(remat),
        plain_gradient,
    )


# --------------------------------------------------------------------------------- 16-bit numbers


def test_bfloat16_is_as_near_to_float32_as_in_transformers():
    _, _, found = t5_models.golden("gated")
    logits = golden_logits(make(dtype=jnp.bfloat16), found)
    assert logits.dtype == jnp.float32
    ours = np.abs(logits - found["logits"]).mean()
    theirs = np.abs(found["logits_bfloat16"] - found["logits"]).mean()
    assert 0 < ours < 1.1 * theirs


def grown(factor, dtype):
    """A model whose first MLP writes large numbers into the residual stream."""
    model = t5_models.fill(dtype=dtype)
    for name in ("wi_0", "wi_1"):
        kernel = getattr(model.encoder.layers.mlp, name).kernel
        kernel.set_value(kernel.get_value() * factor)
    return model


def test_float16_survives_numbers_that_it_cannot_hold():
    """As in the published XXL: the MLP's output is beyond 65,504, and the norm makes it small."""
    _, _, found = t5_models.golden("gated")
    exact = golden_logits(grown(200.0, jnp.float32), found)
    model = grown(200.0, jnp.float16)
    x = jnp.ones((1, 1, 32), jnp.float16)
    first = nnx.merge(*nnx.split(model.encoder.layers))
    graphdef, state = nnx.split(first)
    layer = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[0], state))
    assert np.abs(layer.mlp(layer.mlp_norm(x))).max() > 65504
    logits = golden_logits(model, found)
    assert np.isfinite(logits).all()
    assert np.abs(logits - exact).mean() < 0.02


# ----------------------------------------------------------------------- the position bias' buckets


def test_buckets_are_those_of_transformers():
    """The rule, in float32 as in `T5Attention._relative_position_bucket`, for every distance."""
    config = T5Config(16, 8, 4, 16, 2, 1, 1)
    for bidirectional in (True, False):
        bias = RelativePositionBias(
            config, bidirectional=bidirectional, rngs=nnx.Rngs(0), param_dtype=jnp.float32
        )
        bias.embedding.set_value(jnp.arange(32.0)[:, None].repeat(2, axis=1))
        ours = np.asarray(bias(jnp.array([200]), 400))[0, 0, 0].astype(int)
        relative = np.arange(400) - 200
        buckets = 16 if bidirectional else 32
        distance = np.abs(relative) if bidirectional else np.maximum(-relative, 0)
        exact = buckets // 2
        scale = np.float32(np.log(128 / exact))
        large = np.log(np.maximum(distance, 1).astype(np.float32) / exact) / scale
        large = np.minimum(exact + (large * (buckets - exact)).astype(int), buckets - 1)
        wanted = np.where(distance < exact, distance, large)
        wanted = wanted + 16 * ((relative > 0) & bidirectional)
        np.testing.assert_array_equal(ours, wanted)


# --------------------------------------------------------------------------- loading and surgery


def test_every_linear_layer_but_the_head_is_adapted():
    model = abstract_model(read_shape(t5_models.golden("gated")[0]))
    assert linear_paths(model, "all-linear") == [
        "decoder/layers/cross_attn/k",
        "decoder/layers/cross_attn/o",
        "decoder/layers/cross_attn/q",
        "decoder/layers/cross_attn/v",
        "decoder/layers/mlp/wi_0",
        "decoder/layers/mlp/wi_1",
        "decoder/layers/mlp/wo",
        *(f"decoder/layers/self_attn/{name}" for name in "koqv"),
        "encoder/layers/mlp/wi_0",
        "encoder/layers/mlp/wi_1",
        "encoder/layers/mlp/wo",
        *(f"encoder/layers/self_attn/{name}" for name in "koqv"),
    ]
    adapted = apply_qlora(model, rank=2, block_size=32, rngs=nnx.Rngs(0))
    assert adapted.encoder.layers.mlp.wo.lora_b.shape == (2, 2, 32)
    assert adapted.decoder.layers.cross_attn.q.kernel.get_value().leading_shape == (3,)


@pytest.mark.slow
def test_a_base_quantized_while_loading_is_that_of_the_surgery(folder, tmp_path):
    _, _, found = t5_models.golden("gated")
    packed = load(folder, quant_type="nf4", block_size=32)
    dense = apply_qlora(make(), rank=1, block_size=32, rngs=nnx.Rngs(0))
    assert base_fingerprint(packed) == base_fingerprint(dense)
    logits = golden_logits(packed, found)
    np.testing.assert_allclose(logits, golden_logits(dense, found), rtol=0, atol=TOLERANCE)
    assert np.abs(logits - found["logits"]).mean() > 0.01
    for format in ("qlora_jax", "bitsandbytes"):
        options = dict(format=format, quant_type="nf4", block_size=32)
        quantize_checkpoint(folder / "gated", tmp_path / format, **options)
        again, _ = load_model(tmp_path / format)
        assert base_fingerprint(again) == base_fingerprint(packed)


def test_an_8_bit_vocabulary_leaves_the_position_bias_alone(folder):
    _, _, found = t5_models.golden("classic")
    model = load(folder, "classic", vocab_quant_type="int8")
    assert model.encoder.relative_attention_bias.embedding.dtype == jnp.float32
    logits = golden_logits(model, found)
    assert 0 < np.abs(logits - found["logits"]).mean() < 0.02


def test_a_config_that_says_tied_of_a_head_of_its_own_is_not_believed():
    """transformers 5 writes it so for all models; the weights say what is true."""
    config, tensors, _ = t5_models.golden("gated")
    config |= {"tie_word_embeddings": True, "scale_decoder_outputs": False}
    shape = read_shape(config, tensors)
    assert (shape.tie_word_embeddings, shape.scale_decoder_outputs) == (False, False)
    classic = read_shape(t5_models.golden("classic")[0], ["shared.weight"])
    assert (classic.tie_word_embeddings, classic.scale_decoder_outputs) == (True, True)


def test_a_missing_tensor_is_named_as_the_file_would(folder, tmp_path):
    path = t5_models.write_folder(tmp_path / "model")
    config = json.loads((path / "config.json").read_text()) | {"num_decoder_layers": 4}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError) as error:
        load_model(path)
    assert "missing: decoder.block.3.layer.1.EncDecAttention.q.weight" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "umt5"}, "umt5"),
        ({"feed_forward_proj": "gated-swish"}, "feed_forward_proj 'gated-swish'"),
        ({"d_ff": "big"}, "d_ff 'big', which must be a whole number"),
    ],
)
def test_what_is_not_supported_is_refused(changes, message):
    with pytest.raises(WeightsError, match=message):
        read_shape({**t5_models.golden("gated")[0], **changes})


def test_chunks_of_rows_are_refused():
    with pytest.raises(ConfigError, match="sequence_chunk=64 is for decoder-only models"):
        make(sequence_chunk=64)


# ---------------------------------------------------------------------------- shapes that are known


@pytest.mark.parametrize(
    ("name", "parameters"),
    [  # of the model cards: 80M, 250M, 780M, 3B and 11B
        ("google/flan-t5-small", 76_961_152),
        ("google/flan-t5-base", 247_577_856),
        ("google/flan-t5-large", 783_150_080),
        ("google/flan-t5-xl", 2_849_757_184),
        ("google/flan-t5-xxl", 11_135_332_352),
    ],
)
def test_known_shapes_have_the_published_number_of_parameters(name, parameters):
    assert name in SHAPES
    shapes = t5_models.parameters(abstract_model(model_shape(name)))
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == parameters


def test_a_plan_counts_every_product_once():
    """All linear layers of FLAN-T5-small, for 32 source and 16 target tokens, by hand."""
    config = config_lib.load_config(ROOT / "configs" / "flan_t5_xl.py")
    config.model.path, config.lora.rank = "google/flan-t5-small", 2
    config.data.source_max_len, config.data.target_max_len, config.data.max_len = 32, 16, 48
    target = targets.find_target("rtx4090")
    run = planning.abstract_run(config, target)
    size = measure(run.state.lora, run.frozen)
    count = planning._count_products(run, size)
    attention, mlp, layers = 4 * 512 * 384, 3 * 512 * 1024, 8
    encoder, decoder = attention + mlp, 2 * attention + mlp
    assert size.quantized == layers * (encoder + decoder)
    cross = 2 * 512 * 384  # keys and values, of the source
    assert count.frozen == layers * (32 * encoder + 16 * decoder + (32 - 16) * cross)
    pairs = 2 * (4 * (512 + 384) + 3 * (512 + 1024))  # rank times both sides
    cross_pairs = 2 * 2 * (512 + 384)
    more = 2 * 4 * (512 + 384)
    assert count.trainable == layers * (32 * pairs + 16 * (pairs + more) + (32 - 16) * cross_pairs)
    assert count.head == 512 * 32128
    assert count.attention == 384 * layers * (32**2 + 16**2 / 2 + 32 * 16)
