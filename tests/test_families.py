"""Gemma 2 and 3, Phi-3, OPT and GPT-NeoX against transformers, and what training relies on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_models import CASES, golden_family
from flax import nnx

from qlora_jax.errors import ConfigError
from qlora_jax.flax_nnx import apply_qlora
from qlora_jax.generation import generate_ids
from qlora_jax.linear_layers import linear_paths
from qlora_jax.models.remat import REMAT_POLICIES
from qlora_jax.neftune import add_embedding_noise
from qlora_jax.vocabulary import quantize_vocabulary

TOLERANCE = 2e-4


@nnx.jit
def forward(model, tokens, **kwargs):
    return model(tokens, **kwargs)


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """Models by case, made once."""
    made = {}

    def get(case):
        if case not in made:
            made[case] = golden_family(case, tmp_path_factory.mktemp(case))
        return made[case]

    return get


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(golden, case):
    model, ids, logits = golden(case)
    np.testing.assert_allclose(forward(model, ids), logits, rtol=0, atol=TOLERANCE)


def slow_but(*quick):
    """All cases, those that others stand for marked slow."""
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in CASES]


@pytest.mark.parametrize("case", slow_but("gemma2", "phi3"))
def test_decoding_with_a_cache_equals_one_pass(golden, case):
    model, ids, logits = golden(case)
    cache = model.init_cache(batch_size=2, max_len=24)
    first, cache = forward(model, ids[:, :12], cache=cache)
    rest = []
    for t in range(12, ids.shape[1]):
        out, cache = forward(model, ids[:, t : t + 1], cache=cache)
        rest.append(out)
    ours = jnp.concatenate([first, *rest], axis=1)
    np.testing.assert_allclose(ours, logits, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("case", slow_but("gemma3", "opt", "gpt_neox"))
def test_greedy_text_is_the_argmax_of_whole_sequences(golden, case):
    """Prompts of different lengths, and windows shorter than the text."""
    model, ids, _ = golden(case)
    prompts = [ids[0, :3].tolist(), ids[1, :9].tolist()]
    for prompt, new in zip(prompts, generate_ids(model, prompts, max_new_tokens=10), strict=True):
        row = prompt + new
        logits = forward(model, jnp.array([row + [0] * (20 - len(row))]))[0]
        assert new == logits[len(prompt) - 1 : len(row) - 1].argmax(-1).tolist()


@pytest.mark.parametrize(
    "case",
    ["gemma3", "opt", *(pytest.param(c, marks=pytest.mark.slow) for c in ("gemma2", "gpt_neox"))],
)
def test_packed_sequences_equal_separate_ones(golden, case):
    model, ids, logits = golden(case)
    packed = jnp.concatenate([ids[:1, :8], ids[1:, :11], jnp.zeros((1, 3), jnp.int32)], axis=1)
    segments = jnp.array([[1] * 8 + [2] * 11 + [0] * 3])
    positions = jnp.array([[*range(8), *range(11), 0, 0, 0]])
    ours = forward(model, packed, positions=positions, segment_ids=segments)
    np.testing.assert_allclose(ours[0, :8], logits[0, :8], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(ours[0, 8:19], logits[1, :11], rtol=0, atol=TOLERANCE)
    assert np.isfinite(ours).all()


def test_a_token_sees_as_far_as_the_windows_of_its_layers(golden):
    """Gemma 3: 5 tokens in the first layer, all in the second; only the second sees further."""
    model, ids, _ = golden("gemma3")
    assert (model.config.sliding_window, model.config.full_attention_layers) == (5, (1,))
    other = ids.at[:, 2].set((ids[:, 2] + 1) % 48)
    changed = forward(model, other) != forward(model, ids)
    assert changed.any(-1)[:, 2:].all() and not changed[:, :2].any()
    local = nnx.clone(model)
    local.config = dataclasses.replace(model.config, full_attention_layers=())
    changed = forward(local, other) != forward(local, ids)
    assert changed.any(-1)[0].tolist() == [2 <= i <= 2 + 3 * 4 for i in range(20)]


def adapted(model, **options):
    """With random adapters on everything, 4-bit weights in blocks of 32."""
    options = dict(rank=2, alpha=4.0, block_size=32, rngs=nnx.Rngs(0)) | options
    model = apply_qlora(model, **options)
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
        if path[-1] == "lora_b":
            variable.set_value(0.1 * jax.random.normal(jax.random.key(1), variable.shape))
    return model


LINEARS = {
    "gemma2": 7,
    "gemma3": 7,
    "phi3": 7,
    "opt": 6,
    "gpt_neox": 6,
}


def gradient_of(model, ids, segments=None):
    graphdef, lora, rest = nnx.split(model, nnx.LoRAParam, ...)

    def loss(lora):
        logits = nnx.merge(graphdef, lora, rest)(ids, segment_ids=segments)
        return jnp.square(logits).mean()

    return jax.jit(jax.grad(loss))(lora)


@pytest.mark.parametrize(
    "case",
    ["gpt_neox", *(pytest.param(c, marks=pytest.mark.slow) for c in LINEARS if c != "gpt_neox")],
)
def test_every_linear_layer_is_trained_in_4_bits(golden, case):
    model, ids, _ = golden(case)
    assert len(linear_paths(model, "all-linear")) == LINEARS[case]
    gradient = gradient_of(adapted(model), ids)
    leaves = jax.tree.leaves(gradient)
    assert len(leaves) == 2 * LINEARS[case]
    assert all(jnp.abs(leaf).max() > 0 and jnp.isfinite(leaf).all() for leaf in leaves)


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("gemma3", dict(sequence_chunk=8)),
        ("gpt_neox", dict(remat="projections")),
        *(
            pytest.param(case, option, marks=pytest.mark.slow)
            for case, option in [
                ("gemma2", dict(sequence_chunk=8)),
                ("gemma2", dict(remat="offload")),
                ("gemma3", dict(remat="none")),
                ("gemma3", dict(remat="projections")),
                ("opt", dict(remat="projections")),
                ("opt", dict(sequence_chunk=8)),
                ("gpt_neox", dict(remat="dots")),
                ("gpt_neox", dict(sequence_chunk=8)),
            ]
        ),
    ],
)
@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_is_stored_and_in_which_pieces_does_not_change_the_gradient(
    golden, case, options, packed
):
    model, ids, _ = golden(case)
    segments = jnp.array([[1] * 9 + [2] * 11] * 2) if packed else None
    expected = gradient_of(adapted(model, quant_type=None), ids, segments)
    other = nnx.clone(model)
    for name, value in options.items():
        assert name != "remat" or value in ("none", *REMAT_POLICIES)
        setattr(other, name, value)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6),
        gradient_of(adapted(other, quant_type=None), ids, segments),
        expected,
    )


@pytest.mark.parametrize("case", ["gemma2", "opt"])
def test_a_vocabulary_in_8_bits_stays_near(golden, case):
    model, ids, logits = golden(case)
    ours = forward(quantize_vocabulary(model), ids)
    assert 0 < np.abs(ours - logits).max() < 0.1


def test_rows_longer_than_the_learned_positions_are_refused(golden):
    model, _, _ = golden("opt")
    with pytest.raises(ConfigError, match="rows of 65 tokens .* those of 64 tokens only"):
        model(jnp.ones((1, 65), jnp.int32))


def test_noise_on_scaled_embeddings_has_the_size_it_says(golden):
    """NEFTune's bound is for what the layers see."""
    model, ids, _ = golden("gemma2")
    noisy = add_embedding_noise(nnx.clone(model), alpha=5.0, seed=0)
    noise = noisy.embed(ids) - model.embed(ids)
    bound = 5.0 / (20 * 32) ** 0.5
    assert 0.9 * bound < jnp.abs(noise).max() <= bound * 1.001
