"""Batches: a function of (seed, epoch, position), exact to resume, complete in every epoch."""

import collections
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_packing import make_examples

from qlora_jax.data.batches import BatchIterator, eval_batches
from qlora_jax.data.masking import Example
from qlora_jax.data.row_order import permutation, row_lengths, split
from qlora_jax.errors import DataError

LENGTHS = [9, 3, 4, 7, 2, 5, 8, 6, 3, 2, 4]


def make_iterator(lengths=LENGTHS, **options):
    defaults = dict(batch_size=2, seq_len=10, grad_accum=2, seed=0)
    return BatchIterator(make_examples(lengths), **(defaults | options))


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def assert_equal(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.record_ids == b.record_ids
        assert a.arrays.keys() == b.arrays.keys()
        for name in a.arrays:
            np.testing.assert_array_equal(a.arrays[name], b.arrays[name])


def test_arrays_have_the_promised_shape_and_ids_of_each_microbatch():
    batch = next(make_iterator())
    assert set(batch.arrays) == {"tokens", "loss_mask", "segment_ids", "positions"}
    assert {(a.shape, a.dtype.name) for a in batch.arrays.values()} == {((2, 2, 10), "int32")}
    for a in range(2):
        segments = sum(int(row.max()) for row in batch.arrays["segment_ids"][a])
        assert len(batch.record_ids[a]) == segments


@settings(deadline=None)
@given(
    st.lists(st.integers(2, 10), min_size=1, max_size=30),
    st.integers(1, 4),
    st.integers(1, 3),
    st.booleans(),
    st.integers(-5, 2**70),
)
def test_every_epoch_has_each_example_once_whatever_the_batch(lengths, batch, accum, packing, seed):
    iterator = make_iterator(
        lengths, batch_size=batch, grad_accum=accum, packing=packing, seed=seed
    )
    rows = iterator.rows_per_epoch
    assert packing or rows == len(lengths)
    epochs = 3
    seen = [
        [record_id for ids in b.record_ids for record_id in ids]
        for b in take(iterator, iterator.num_batches(epochs))
    ]
    stream = list(itertools.chain(*seen))
    for epoch in range(epochs):
        part = stream[epoch * len(lengths) : (epoch + 1) * len(lengths)]
        assert collections.Counter(part) == {f"a.jsonl:{i + 1}": 1 for i in range(len(lengths))}


@settings(deadline=None)
@given(st.integers(0, 25), st.integers(1, 6), st.booleans())
def test_a_restored_stream_continues_to_the_bit(before, after, packing):
    iterator = make_iterator(packing=packing)
    take(iterator, before)
    state = {name: np.int64(value) for name, value in iterator.state().items()}
    expected = take(iterator, after)
    fresh = make_iterator(packing=packing)
    fresh.restore(state)
    assert_equal(take(fresh, after), expected)
    assert fresh.state() == iterator.state()


def test_resuming_in_the_middle_of_an_epoch_with_another_batch_size_continues_at_the_row():
    ids = [i for b in take(make_iterator(batch_size=1, grad_accum=1), 9) for i in b.record_ids[0]]
    first = make_iterator(batch_size=3, grad_accum=1)
    start = [i for b in take(first, 1) for i in b.record_ids[0]]
    second = make_iterator(batch_size=1, grad_accum=1)
    second.restore(first.state())
    assert start + [i for b in take(second, 6) for i in b.record_ids[0]] == ids


def test_order_changes_with_seed_and_epoch_and_nothing_else():
    assert_equal(take(make_iterator(), 4), take(make_iterator(), 4))
    orders = {
        tuple(order.row(11 * epoch + i)[0] for i in range(11))
        for order in (make_iterator(seed=seed, packing=False)._order for seed in range(3))
        for epoch in range(3)
    }
    assert len(orders) == 9


def test_the_order_is_pinned_across_versions():
    assert permutation(8, seed=0, epoch=0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]


def test_a_set_smaller_than_a_batch_repeats_inside_it():
    batch = next(make_iterator([4, 5], batch_size=3, grad_accum=1, packing=False))
    assert collections.Counter(batch.record_ids[0]).keys() == {"a.jsonl:1", "a.jsonl:2"}
    assert len(batch.record_ids[0]) == 3


def test_packing_and_padding_hold_the_same_tokens():
    totals = []
    for packing in (True, False):
        iterator = make_iterator(packing=packing, batch_size=1, grad_accum=1)
        batches = take(iterator, iterator.rows_per_epoch)
        totals.append(sorted(t for b in batches for t in b.arrays["tokens"].ravel() if t))
    assert totals[0] == totals[1] == list(range(1, sum(LENGTHS) + 1))


@pytest.mark.parametrize("epochs, expected", [(1, 3), (0.5, 2), (2, 6), (0.01, 1)])
def test_num_batches_rounds_up(epochs, expected):
    iterator = make_iterator([10] * 12)
    assert iterator.num_batches(epochs) == expected


def test_restoring_into_other_data_or_another_seed_is_refused():
    state = make_iterator().state()
    with pytest.raises(DataError, match="data is not what the run was started with"):
        make_iterator(LENGTHS[:-1]).restore(state)
    with pytest.raises(DataError, match="data is not what"):
        make_iterator(packing=False).restore(state)
    with pytest.raises(DataError, match="started with seed 0, and now has 1"):
        make_iterator(seed=1).restore(state)
    with pytest.raises(DataError, match="position=99"):
        make_iterator().restore(state | {"position": 99})


def lengths_of(batch):
    """Tokens of each row that are not padding."""
    return (batch.arrays["segment_ids"] > 0).sum(axis=-1).ravel().tolist()


def make_grouped(count=400, seq_len=512, **options):
    lengths = np.random.default_rng(0).integers(2, seq_len + 1, count).tolist()
    defaults = dict(seq_len=seq_len, packing=False, group_by_length=True)
    return make_iterator(lengths, **(defaults | options)), lengths


def test_grouping_puts_similar_lengths_into_a_batch_and_keeps_every_example():
    grouped, lengths = make_grouped()
    batches = take(grouped, 100)
    assert sorted(n for batch in batches for n in lengths_of(batch)) == sorted(lengths)
    spreads = [max(found) - min(found) for found in map(lengths_of, batches)]
    plain = [lengths_of(b) for b in take(make_grouped(group_by_length=False)[0], 100)]
    plain_spreads = [max(found) - min(found) for found in plain]
    assert np.mean(spreads) < 0.1 * np.mean(plain_spreads)
    assert [batch.record_ids for batch in batches[:3]] != [
        batch.record_ids for batch in take(make_grouped(seed=1)[0], 3)
    ]


def test_a_grouped_batch_is_cut_to_the_shortest_row_that_holds_it():
    batches = take(make_grouped()[0], 100)
    shapes = {batch.arrays["tokens"].shape[-1] for batch in batches}
    assert shapes == {64, 128, 256, 512} == set(row_lengths(512))
    for batch in batches:
        longest = max(lengths_of(batch))
        fitting = [length for length in row_lengths(512) if length >= longest]
        assert {a.shape for a in batch.arrays.values()} == {(2, 2, fitting[0])}


def test_chunks_of_a_grouped_epoch_are_sorted_longest_first():
    grouped, lengths = make_grouped(count=1000, batch_size=1, grad_accum=2)
    found = [lengths[grouped._order.row(n)[0]] for n in range(1000)]
    for start in range(0, 1000, 100):  # 50 batches of two rows
        assert found[start : start + 100] == sorted(found[start : start + 100], reverse=True)
    assert found[:100] != sorted(lengths, reverse=True)[:100]


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 130), st.integers(1, 4))
def test_a_restored_grouped_stream_continues_to_the_bit(before, after):
    iterator, _ = make_grouped(count=150)
    take(iterator, before)
    state, expected = iterator.state(), take(iterator, after)
    fresh, _ = make_grouped(count=150)
    fresh.restore(state)
    assert_equal(take(fresh, after), expected)


def test_grouping_is_part_of_what_a_run_was_started_with():
    state = make_grouped()[0].state()
    for options in ({"group_by_length": False}, {"batch_size": 4}):
        with pytest.raises(DataError, match="split, packing or grouping"):
            make_grouped(**options)[0].restore(state)
    with pytest.raises(DataError, match="needs packing=False"):
        make_grouped(packing=True)


def test_evaluation_sees_every_example_once_in_a_fixed_order():
    for packing in (True, False):
        batches = list(
            eval_batches(make_examples(LENGTHS), batch_size=4, seq_len=10, packing=packing)
        )
        ids = [record_id for b in batches for record_id in b.record_ids[0]]
        assert sorted(ids) == sorted(f"a.jsonl:{i + 1}" for i in range(len(LENGTHS)))
        assert {b.arrays["tokens"].shape for b in batches} == {(1, 4, 10)}
        loss = sum(int(b.arrays["loss_mask"].sum()) for b in batches)
        assert loss == sum(LENGTHS) - len(LENGTHS)


@settings(deadline=None)
@given(st.integers(2, 60), st.floats(0, 0.9), st.integers(0, 5))
def test_split_is_a_partition_that_depends_on_the_seed_alone(count, fraction, seed):
    items = list(range(count))
    try:
        train, heldout = split(items, fraction, seed)
    except DataError:
        assert round(fraction * count) >= count
        return
    assert sorted(train + heldout) == items
    assert train == sorted(train) and heldout == sorted(heldout)
    assert len(heldout) == (max(1, round(fraction * count)) if fraction else 0)
    assert split(items, fraction, seed) == (train, heldout)


def test_held_out_examples_differ_between_seeds():
    assert len({tuple(split(range(100), 0.1, seed)[1]) for seed in range(5)}) == 5


@pytest.mark.parametrize("fraction, items", [(1.0, 10), (-0.1, 10), (0.1, 1)])
def test_splits_that_leave_nothing_are_refused(fraction, items):
    with pytest.raises(DataError, match="eval_fraction"):
        split(range(items), fraction, 0)


def test_unusable_examples_and_settings_are_refused():
    with pytest.raises(DataError, match="there are no examples"):
        make_iterator([])
    with pytest.raises(DataError, match="a.jsonl:1: found 11 tokens, need 1 to seq_len=10"):
        make_iterator([11])
    with pytest.raises(DataError, match="batch_size=0"):
        make_iterator(batch_size=0)
    masked = Example(np.array([7, 8], np.int32), np.array([1, 0], np.int32), "a.jsonl:9")
    with pytest.raises(DataError, match=r"no token .* carries loss; the first is a.jsonl:9 .*7, 8"):
        BatchIterator([masked], batch_size=1, seq_len=4)
