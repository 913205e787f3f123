"""What grain must not change: hosts, workers and versions see one and the same stream."""

import itertools
import pickle
import zlib

import numpy as np
import pytest
from test_data_batches import LENGTHS, assert_equal, make_grouped, make_iterator, take
from test_data_packing import make_examples

from qlora_jax.data.batches import Batch, BatchIterator, eval_batches, make_batch
from qlora_jax.data.example_arrays import Examples
from qlora_jax.errors import DataError

# Of seven batches and the state after them, as made before grain was under the hood: a checkpoint
# of then must go on. The position counts rows; a state may also stand at the end of an epoch.
BEFORE_GRAIN = [
    ({}, 195966087, {"seed": 0, "epoch": 4, "position": 4, "data": 456910423}),
    ({"packing": False}, 2931343764, {"seed": 0, "epoch": 2, "position": 6, "data": 3340039901}),
    (
        {"packing": False, "group_by_length": True},
        804442887,
        {"seed": 0, "epoch": 2, "position": 6, "data": 2358455204},
    ),
]


def rows_of(batches):
    """The ids of every row, in order; only for one record a row."""
    return [i for b in batches for ids in b.record_ids for i in ids]


@pytest.mark.parametrize("options, digest, state", BEFORE_GRAIN)
def test_the_order_is_the_one_that_older_checkpoints_stand_in(options, digest, state):
    iterator, value = make_iterator(**options), 0
    for batch in take(iterator, 7):
        value = zlib.crc32(repr(batch.record_ids).encode(), value)
        for name in sorted(batch.arrays):
            value = zlib.crc32(batch.arrays[name].astype("<i4").tobytes(), value)
    assert value == digest and iterator.state() == state
    resumed = make_iterator(**options)
    resumed.restore(state)
    assert_equal(take(resumed, 2), take(iterator, 2))


def test_a_state_at_the_end_of_an_epoch_is_one_at_the_beginning_of_the_next():
    iterator = make_iterator()
    rows, state = iterator.rows_per_epoch, iterator.state()
    iterator.restore(state | {"epoch": 2, "position": rows})
    assert iterator.state() == state | {"epoch": 3, "position": 0}


def test_the_number_of_workers_changes_nothing_and_neither_does_resuming_with_another():
    iterator = make_iterator(packing=True)
    take(iterator, 3)
    state, expected = iterator.state(), take(iterator, 9)
    for workers in (0, 1, 2):
        with_workers = make_iterator(packing=True, workers=workers)
        with_workers.restore(state)
        assert_equal(take(with_workers, 9), expected)
        assert with_workers.state() == iterator.state()
        with_workers.close()


@pytest.mark.parametrize("shards", [2, 3])
def test_hosts_have_disjoint_parts_of_the_step_that_one_host_would_take(shards):
    whole = make_iterator(packing=False, batch_size=2 * shards, grad_accum=1)
    parts = [
        make_iterator(packing=False, grad_accum=1, shard_index=i, shard_count=shards)
        for i in range(shards)
    ]
    for _ in range(8):
        rows = [rows_of([next(part)]) for part in parts]
        assert list(itertools.chain(*rows)) == rows_of([next(whole)])
        assert {tuple(part.state().items()) for part in parts} == {tuple(whole.state().items())}
    alone = make_iterator(packing=False, grad_accum=1)
    alone.restore(parts[1].state())  # another number of hosts goes on at the same row
    whole.restore(parts[0].state())
    assert rows_of(take(alone, shards)) == rows_of([next(whole)])


def test_each_epoch_is_whole_over_all_hosts():
    parts = [make_iterator(packing=False, shard_index=i, shard_count=2) for i in range(2)]
    steps = [rows_of([next(part)]) for _ in range(11) for part in parts]  # 11 * 8 rows: 8 epochs
    stream = list(itertools.chain(*steps))
    for epoch in range(8):
        assert sorted(stream[epoch * 11 : (epoch + 1) * 11]) == sorted(
            example.record_id for example in make_examples(LENGTHS)
        )


def test_grouped_hosts_cut_a_step_to_the_same_length():
    parts = [make_grouped(shard_index=i, shard_count=2)[0] for i in range(2)]
    whole = make_grouped(batch_size=4)[0]  # the same 8 rows a step
    for _ in range(40):
        first, second, both = (next(iterator) for iterator in (*parts, whole))
        shapes = {batch.arrays["tokens"].shape[-1] for batch in (first, second, both)}
        assert len(shapes) == 1
        assert rows_of([first, second]) == rows_of([both])


@pytest.mark.parametrize(
    "options", [{"shard_index": 2, "shard_count": 2}, {"shard_index": -1}, {"workers": -1}]
)
def test_shards_and_workers_that_cannot_be_are_refused(options):
    with pytest.raises(DataError, match="need an index from 0"):
        make_iterator(**options)


def first_tokens_alone(rows, grad_accum, batch_size, seq_len):
    """A batch of another kind: of each row its first example's source and target."""
    batch = make_batch([row[:1] for row in rows], grad_accum, batch_size, seq_len)
    return Batch({"source": batch.arrays["tokens"]}, batch.record_ids)


def test_another_kind_of_batch_can_be_built_of_the_same_rows():
    batch = next(make_iterator(build=first_tokens_alone))
    assert batch.arrays.keys() == {"source"}
    np.testing.assert_array_equal(
        batch.arrays["source"][..., 0], next(make_iterator()).arrays["tokens"][..., 0]
    )
    examples = make_examples(LENGTHS)
    (batch, *_) = eval_batches(examples, batch_size=4, seq_len=10, build=first_tokens_alone)
    assert batch.arrays["source"].shape == (1, 4, 10)


def test_examples_in_arrays_are_those_that_were_put_in():
    examples = make_examples([3, 2, 4])
    arrays = Examples.of(examples)
    for found, expected in zip(arrays, examples, strict=True):
        assert found.record_id == expected.record_id and found.truncated is False
        np.testing.assert_array_equal(found.tokens, expected.tokens)
        np.testing.assert_array_equal(found.loss_mask, expected.loss_mask)
        assert found.loss_mask.dtype == np.int32
    assert arrays[-1].record_id == "a.jsonl:3" and len(arrays[:2]) == 2
    assert arrays.take([2, 0, 2]).lengths.tolist() == [4, 3, 4]
    assert arrays.loss_tokens.tolist() == [2, 1, 3]
    assert arrays.largest_tokens.tolist() == [3, 5, 9]
    assert Examples.of(arrays) is arrays
    copy = pickle.loads(pickle.dumps(arrays.take([1])))
    assert copy[0].tokens.tolist() == [4, 5] and copy[0].record_id == "a.jsonl:2"


def test_lists_and_arrays_of_the_same_examples_are_the_same_data():
    examples = make_examples(LENGTHS)
    options = dict(batch_size=2, seq_len=10)
    states = [
        BatchIterator(data, **options).state()
        for data in (examples, Examples.of(examples * 2)[:11])
    ]
    assert states[0] == states[1]
