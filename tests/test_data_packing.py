"""Packing: nothing lost, nothing mixed, positions restart."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_jax.data.masking import Example
from qlora_jax.data.packing import best_fit_decreasing, fill_rows
from qlora_jax.errors import DataError

LENGTHS = st.integers(1, 40).flatmap(
    lambda seq_len: st.tuples(st.just(seq_len), st.lists(st.integers(1, seq_len), max_size=60))
)


def make_examples(lengths):
    """Examples whose tokens are all different, so that each can be found again."""
    numbers = iter(range(1, 1_000_000))
    return [
        Example(
            np.array([next(numbers) for _ in range(length)], np.int32),
            np.array([0] + [1] * (length - 1), np.int32),
            f"a.jsonl:{i}",
        )
        for i, length in enumerate(lengths, start=1)
    ]


@settings(deadline=None)
@given(LENGTHS)
def test_every_example_gets_one_row_and_no_row_overflows(case):
    seq_len, lengths = case
    rows = best_fit_decreasing(lengths, seq_len)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    used = [sum(lengths[i] for i in row) for row in rows]
    assert all(0 < tokens <= seq_len for tokens in used)
    # No two rows could have been one: that is what makes it at most twice the optimum.
    assert all(a + b > seq_len for a, b in zip(sorted(used), sorted(used)[1:], strict=False))


@settings(deadline=None)
@given(LENGTHS, st.randoms())
def test_the_number_of_rows_does_not_depend_on_the_order(case, random):
    seq_len, lengths = case
    shuffled = random.sample(lengths, len(lengths))
    first, second = (
        sorted(sorted(order[i] for i in row) for row in best_fit_decreasing(order, seq_len))
        for order in (lengths, shuffled)
    )
    assert first == second


@settings(deadline=None)
@given(LENGTHS)
def test_filled_rows_hold_every_token_once_and_keep_examples_apart(case):
    seq_len, lengths = case
    examples = make_examples(lengths)
    rows = best_fit_decreasing(lengths, seq_len)
    arrays = fill_rows([[examples[i] for i in row] for row in rows], seq_len)
    assert {(a.shape, a.dtype.name) for a in arrays.values()} == {((len(rows), seq_len), "int32")}
    real = arrays["segment_ids"] > 0
    assert sorted(arrays["tokens"][real]) == list(range(1, sum(lengths) + 1))
    assert all(not arrays[name][~real].any() for name in arrays)
    for r, row in enumerate(rows):
        segments = arrays["segment_ids"][r]
        assert (np.diff(segments[segments > 0]) >= 0).all()
        for segment, i in enumerate(row, start=1):
            where = segments == segment
            np.testing.assert_array_equal(arrays["tokens"][r, where], examples[i].tokens)
            np.testing.assert_array_equal(arrays["loss_mask"][r, where], examples[i].loss_mask)
            np.testing.assert_array_equal(arrays["positions"][r, where], np.arange(lengths[i]))


def test_a_first_token_never_carries_loss():
    bad = Example(np.array([5, 6], np.int32), np.array([1, 1], np.int32), "a:1")
    assert fill_rows([[bad, bad]], 4)["loss_mask"].tolist() == [[0, 1, 0, 1]]


def test_packing_real_lengths_leaves_little_padding():
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 300, 2000).tolist()
    rows = best_fit_decreasing(lengths, 512)
    assert sum(lengths) / (len(rows) * 512) > 0.98


@pytest.mark.parametrize("lengths", [[3, 11], [0]])
def test_an_example_that_fits_no_row_is_refused(lengths):
    with pytest.raises(DataError, match="need 1 to seq_len=10"):
        best_fit_decreasing(lengths, 10)


def test_rows_that_overflow_are_refused():
    example = make_examples([3])[0]
    with pytest.raises(DataError, match="a.jsonl:1: row of 6 tokens"):
        fill_rows([[example, example]], 5)
