"""A paged optimizer is the optimizer itself, wherever its state lies."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cuda_wheels import needs_cuda_wheels

import qlora_jax as ql
from qlora_jax.errors import ConfigError
from qlora_jax.placement import bytes_by_memory, eval_placed
from qlora_jax.targets import compile_for

SHAPES = {"a": (8, 64, 400), "b": (8, 400, 64), "c": (4, 30_000), "same": (8, 64, 400), "d": (7,)}
INNER = {
    "adamw": lambda: optax.adamw(1e-3, weight_decay=0.01),
    "adamw on a schedule": lambda: optax.adamw(optax.linear_schedule(1e-2, 0.0, 60)),
    "adamw in 8 bits": lambda: ql.adamw8bit(1e-3),
    "lion": lambda: optax.lion(1e-3),
    "sgd with momentum": lambda: optax.sgd(1e-2, momentum=0.9),
    "adamw without decay of c": lambda: optax.adamw(
        1e-3, weight_decay=0.1, mask={"a": True, "b": True, "c": False, "same": True, "d": True}
    ),
}
PAGE = 512 << 10


def tree(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.standard_normal(s) * 0.1, dtype) for k, s in SHAPES.items()}


def kinds(state):
    return {x.sharding.memory_kind for x in jax.tree.leaves(state) if x.size >= 100_000 // 8}


def run(tx, steps):
    """Parameters, and every update."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def take_step(params, state, gradients):
        found, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, jax.lax.optimization_barrier(found)), state, found

    params, updates = tree(0), []
    state = tx.init(params)
    for step in range(steps):
        params, state, found = take_step(params, state, tree(step + 1))
        updates.append(found)
    return params, updates, state


@functools.cache
def unpaged(name):
    return run(INNER[name](), 50)


@pytest.mark.parametrize(
    ("name", "share"),
    [("adamw", share) for share in (None, 0.0, 0.3, 0.7)]
    + [(name, 0.5) for name in INNER if name != "adamw"],
)
def test_updates_are_equal_to_the_bit(name, share):
    total = bytes_by_memory(INNER[name]().init(tree(0)))["device"]
    budget = None if share is None else int(share * total)
    params, updates, state = run(ql.paged(INNER[name](), budget, page_bytes=PAGE), 50)
    jax.tree.map(np.testing.assert_array_equal, (params, updates), unpaged(name)[:2])
    expected = {None: {"device"}, 0.0: {"pinned_host"}}.get(share, {"device", "pinned_host"})
    assert kinds(state) == expected


def test_the_budget_is_kept_and_the_largest_leaves_go_first():
    params = {
        "large": jnp.ones((32, 100_000)),
        "middle": jnp.ones((8, 20_000)),
        "small": jnp.ones(9),
    }
    total = sum(bytes_by_memory(optax.adam(1.0).init(params)).values())
    for budget in (0, total // 50, total // 3, total // 2, total - 1, total):
        state = ql.paged(optax.adam(1.0), budget, page_bytes=PAGE).init(params)
        on_device = bytes_by_memory(state)["device"]
        assert sum(bytes_by_memory(state).values()) == total
        # Less a page, what is small stays.
        assert on_device <= max(budget, 8 * 9 + 4) and on_device > budget - 2 * PAGE
        assert {x.sharding.memory_kind for x in jax.tree.leaves(state[0].mu["small"])} == {"device"}
    middle = {x.sharding.memory_kind for x in jax.tree.leaves(state[0].mu["middle"])}
    assert middle == {"device"}


def test_a_leaf_of_few_elements_stays():
    state = ql.paged(optax.adam(1.0), 0).init({"w": jnp.ones(99_999), "v": jnp.ones(100_000)})
    assert state[0].mu["w"].sharding.memory_kind == "device"
    assert state[0].mu["v"].sharding.memory_kind == "pinned_host"


def test_state_is_cut_alike_whatever_the_budget():
    """So that a checkpoint of one placement is restored into another."""
    states = [ql.paged(optax.adam(1.0), b, page_bytes=PAGE).init(tree(0)) for b in (None, 0, 10**6)]
    shapes = [jax.tree.map(jnp.shape, state) for state in states]
    assert shapes[0] == shapes[1] == shapes[2]


def test_abstract_state_knows_its_memory():
    tx = ql.paged(optax.adam(1.0), 0, page_bytes=PAGE)
    abstract, real = eval_placed(tx.init, tree(0)), tx.init(tree(0))
    assert bytes_by_memory(abstract) == bytes_by_memory(real)
    assert jax.tree.structure(abstract) == jax.tree.structure(real)


@pytest.mark.parametrize(
    "inner",
    [
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)),
        optax.lamb(1e-3),
        optax.adafactor(1e-3),
        optax.chain(optax.clip_by_block_rms(1.0), optax.adam(1.0)),
        optax.chain(optax.adaptive_grad_clip(0.01), optax.adam(1.0)),
    ],
    ids=["global norm", "lamb", "adafactor", "block rms", "adaptive clipping"],
)
def test_an_optimizer_that_looks_further_is_refused(inner):
    tx = ql.paged(inner, page_bytes=PAGE)
    with pytest.raises(ConfigError, match=r"outside, as in\s+optax.chain"):
        state = tx.init(tree(0))
        tx.update(tree(1), state, tree(0))


def test_clipping_goes_outside():
    outside = optax.chain(optax.clip_by_global_norm(0.5), ql.paged(optax.adam(1e-3), 0))
    plain = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(1e-3))
    # Not to the bit: side by side in one program, XLA multiplies the constants of both together.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-7),
        run(outside, 3)[:2],
        run(plain, 3)[:2],
    )


def test_it_works_without_jit_and_without_parameters():
    tx, plain = (
        ql.paged(optax.sgd(0.1, momentum=0.9), 0, page_bytes=PAGE),
        optax.sgd(0.1, momentum=0.9),
    )
    found, _ = tx.update(tree(1), tx.init(tree(0)))
    expected, _ = plain.update(tree(1), plain.init(tree(0)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)


def test_an_optimizer_without_state():
    tx = ql.paged(optax.sgd(0.1), 0)
    found, state = jax.jit(tx.update)(tree(1), tx.init(tree(0)))
    assert jax.tree.leaves(state) == []
    np.testing.assert_array_equal(found["c"], tree(1)["c"] * np.float32(-0.1))


def test_a_tree_of_one_leaf():
    params, gradients = jnp.ones((8, 64, 400)), jnp.full((8, 64, 400), 0.3)
    tx, plain = ql.paged(optax.adamw(1e-3), 0, page_bytes=PAGE), optax.adamw(1e-3)
    found, _ = jax.jit(tx.update)(gradients, tx.init(params), params)
    expected, _ = jax.jit(plain.update)(gradients, plain.init(params), params)
    np.testing.assert_array_equal(found, expected)


@needs_cuda_wheels
def test_on_a_gpu_the_state_comes_in_pages_beside_the_update():
    """Reads the compiled program: what is in memory, and in which order things happen."""
    rows, width, mib = 32, 1 << 19, 1 << 20
    params = {k: jax.ShapeDtypeStruct((rows, width), jnp.float32) for k in "abcd"}
    tx = ql.paged(optax.adamw(1e-3), 0, page_bytes=16 * mib)
    state = eval_placed(tx.init, params)
    step = jax.jit(tx.update, donate_argnums=(0, 1))
    compiled = compile_for(step, params, state, params, target="h100")
    moments = 2 * 4 * rows * width * 4
    assert compiled.host_bytes == moments
    arguments = 2 * 4 * rows * width * 4
    # Not the moments: old and new state of the pages that are there at once, and the heap's gaps.
    assert compiled.peak_bytes - arguments < 2 * 3 * 16 * mib + mib
    there = pages_there(compiled.text[compiled.text.index("\nENTRY") :])
    count = 4 * rows * width * 8 // (16 * mib)
    # Every page comes and goes in asynchronous copies, three at most are there at once, and they
    # overlap: the next comes before the last has gone.
    assert len(set.union(*there)) == count
    assert max(map(len, there)) == 3
    assert sum(len(pages) >= 2 for pages in there) > len(there) / 2


def pages_there(program):
    """The pages of moments on the device after each line of a compiled program.

    From where its first copy starts to where both copies of its moments back to the host are done.
    """
    page_of, back, now, found = {}, collections.Counter(), set(), []
    for line in program.splitlines():
        if not (match := re.match(r" *(?:ROOT )?%?(\S+) = (.*?) ([a-z-]+)\((.*)", line)):
            continue
        name, shape, operation, operands = match.groups()
        first = re.match(r"%?([^#,)]+)", operands)
        if operation == "copy-start" and "S(5)" not in shape.partition("}")[0]:
            _, leaf, index = re.match(r"state_0__([mn]u)__(\w)___(\d+)_", first[1]).groups()
            page_of[name] = leaf, index
            now.add(page_of[name])
        elif operation == "fusion":
            given = [page_of[x] for x in re.findall(r"%([^#,) ]+)", operands) if x in page_of]
            if given:
                page_of[name] = given[0]
        elif operation in ("copy-start", "copy-done", "get-tuple-element") and first[1] in page_of:
            page_of[name] = page_of[first[1]]
        if operation == "copy-done" and "S(5)" in shape:
            back[page_of[name]] += 1
            if back[page_of[name]] == 2:
                now.remove(page_of[name])
        found.append(set(now))
    assert not now and set(back.values()) == {2}
    return found
