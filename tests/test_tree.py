"""Paths over pytrees, and mapping over stacked ones."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_jax.errors import ConfigError
from qlora_jax.tree import flatten_paths, join_path, key_parts, map_leading, matches


def test_paths_of_every_container():
    tree = {"a": [1, (2, {"b": 3})], "c": {"d": 4}}
    assert flatten_paths(tree) == {"a/0": 1, "a/1/0": 2, "a/1/1/b": 3, "c/d": 4}
    assert flatten_paths(5) == {"": 5}


def test_an_nnx_state_and_its_pure_dict_have_the_same_paths():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(2, 3, rngs=rngs) for _ in range(2)])
            self.norm = nnx.LayerNorm(3, rngs=rngs)

    state = nnx.state(Model(nnx.Rngs(0)), nnx.Param)
    expected = {
        "layers/0/bias", "layers/0/kernel", "layers/1/bias", "layers/1/kernel",
        "norm/bias", "norm/scale",
    }  # fmt: skip
    assert set(flatten_paths(state)) == set(flatten_paths(nnx.to_pure_dict(state))) == expected


def test_optimizer_state_paths_name_its_fields():
    state = optax.adam(1e-3).init({"w": jnp.zeros(2)})
    assert {"0/count", "0/mu/w", "0/nu/w"} <= set(flatten_paths(state))


def test_is_leaf_stops_the_descent():
    tree = {"q": {"lora_a": 1, "lora_b": 2}}
    paths = flatten_paths(tree, is_leaf=lambda node: isinstance(node, dict) and "lora_a" in node)
    assert paths == {"q": tree["q"]}


@given(
    st.recursive(
        st.integers(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.text("abc", min_size=1, max_size=3), inner, max_size=3)
        ),
        max_leaves=12,
    )
)
@settings(max_examples=50, deadline=None)
def test_paths_are_as_many_as_leaves_and_lead_to_them(tree):
    keyed, _ = jax.tree_util.tree_flatten_with_path(tree)
    flat = flatten_paths(tree)
    assert len(flat) == len(keyed)
    for key_path, leaf in keyed:
        node = tree
        for part in key_parts(key_path):
            node = node[part]
        assert node == leaf == flat[join_path(key_parts(key_path))]


def test_matches_is_about_the_whole_path():
    assert matches(".*/kernel", "layers/kernel")
    assert not matches("kernel", "layers/kernel")
    assert not matches("layers", "layers/kernel")


def test_a_bad_expression_is_the_users_mistake():
    with pytest.raises(ConfigError, match=r"where='\*_proj' is not a regular expression"):
        matches("*_proj", "q_proj")


@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
def test_map_leading_is_a_loop_over_the_leading_axes(leading):
    x = np.random.default_rng(0).normal(size=(*leading, 4, 5)).astype(np.float32)
    row_sums, total = map_leading(lambda m, s: (m.sum(1) * s, m.sum()), leading, x, x[..., 0, 0])
    np.testing.assert_allclose(row_sums, x.sum(-1) * x[..., :1, 0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(total, x.sum((-1, -2)), rtol=1e-5, atol=1e-5)
