import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.losses import chunked_cross_entropy, next_token_targets

BATCH, LENGTH, FEATURES, VOCABULARY = 4, 128, 32, 4096


@pytest.fixture(scope="module")
def problem():
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (BATCH, LENGTH, FEATURES))
    weight = jax.random.normal(keys[1], (FEATURES, VOCABULARY)) / FEATURES**0.5
    targets = jax.random.randint(keys[2], (BATCH, LENGTH), 0, VOCABULARY)
    mask = jax.random.bernoulli(keys[3], 0.6, (BATCH, LENGTH)).astype(jnp.int32)
    return hidden, weight, targets, mask


def dense_loss(weight, hidden, targets, mask):
    log_probabilities = jax.nn.log_softmax(hidden @ weight)
    picked = jnp.take_along_axis(log_probabilities, targets[..., None], axis=-1)[..., 0]
    return -jnp.sum(picked * mask)


def chunked_loss(weight, hidden, targets, mask, chunk_size, trainable_head=False):
    return chunked_cross_entropy(
        lambda h: h @ weight,
        hidden,
        targets,
        mask,
        chunk_size=chunk_size,
        trainable_head=trainable_head,
    )


@pytest.mark.parametrize("chunk_size", [64, 100, 512, 10_000])
def test_value_and_gradient_equal_the_dense_loss(problem, chunk_size):
    hidden, weight, targets, mask = problem
    for argnums, trainable_head in (((0, 1), True), (1, False)):
        expected = jax.value_and_grad(dense_loss, argnums)(weight, hidden, targets, mask)
        got = jax.value_and_grad(chunked_loss, argnums)(
            weight, hidden, targets, mask, chunk_size, trainable_head
        )
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), got, expected
        )


def test_a_trained_head_must_be_declared(problem):
    """Its gradient would be missing; JAX refuses instead."""
    with pytest.raises(Exception, match="closed-over value"):
        jax.grad(chunked_loss)(*problem[1::-1], *problem[2:], 64)


def test_masked_positions_count_exactly_nothing(problem):
    hidden, weight, targets, mask = problem
    poisoned = jnp.where(mask[..., None] > 0, hidden, 1e4)
    clean = chunked_loss(weight, jnp.where(mask[..., None] > 0, hidden, 0), targets, mask, 64)
    loss, grad = jax.value_and_grad(chunked_loss, argnums=1)(weight, poisoned, targets, mask, 64)
    assert float(loss) == float(clean)
    assert np.all(np.asarray(grad)[np.asarray(mask) == 0] == 0)


def test_no_token_counts():
    loss = chunked_cross_entropy(
        lambda h: h, jnp.ones((1, 4, 8)), jnp.zeros((1, 4), int), jnp.zeros((1, 4), int)
    )
    assert float(loss) == 0.0


def test_the_logits_of_the_whole_batch_never_exist(problem):
    """Forward and backward need a few chunks of logits, not those of the batch."""
    hidden, weight, targets, mask = problem
    chunk_size = 32
    one_chunk = chunk_size * VOCABULARY * 4
    whole = BATCH * LENGTH * VOCABULARY * 4

    def temporaries(loss, *extra):
        step = jax.jit(jax.value_and_grad(lambda h, w, t, m: loss(w, h, t, m, *extra)))
        compiled = step.lower(hidden, weight, targets, mask).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(dense_loss) >= whole
    bound = 4 * one_chunk + 2 * hidden.nbytes
    assert temporaries(chunked_loss, chunk_size) < bound < whole / 3


def matrix_products(jaxpr):
    """The shapes of all matrix products, also those inside scans and checkpoints."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.outvars[0].aval.shape
        for parameter in equation.params.values():
            inner = getattr(parameter, "jaxpr", parameter)  # a ClosedJaxpr holds a Jaxpr
            if hasattr(inner, "eqns"):
                yield from matrix_products(inner)


def test_a_frozen_head_gets_no_gradient(problem):
    hidden, weight, targets, mask = problem
    of_the_head = {weight.shape, weight.shape[::-1]}

    def products(argnums):
        trainable = argnums == 0
        gradient = jax.grad(lambda w, h: chunked_loss(w, h, targets, mask, 64, trainable), argnums)
        return set(matrix_products(jax.make_jaxpr(gradient)(weight, hidden).jaxpr))

    assert products(argnums=0) & of_the_head  # the test can see one
    assert (1, 64, FEATURES) in products(argnums=1)
    assert not products(argnums=1) & of_the_head


def test_targets_stay_inside_their_segment():
    tokens = jnp.array([[11, 12, 13, 21, 22, 23, 0, 0]])
    segments = jnp.array([[1, 1, 1, 2, 2, 2, 0, 0]])
    loss_mask = jnp.array([[0, 1, 1, 1, 0, 1, 0, 0]])
    targets, mask = next_token_targets(tokens, loss_mask, segments)
    assert targets.tolist() == [[12, 13, 21, 22, 23, 0, 0, 0]]
    # token 21 is marked, but it is the first of its segment: nothing may predict it
    assert mask.tolist() == [[1, 1, 0, 0, 1, 0, 0, 0]]
