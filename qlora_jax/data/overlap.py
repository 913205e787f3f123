"""What records have in common: duplicates, and held-out records that the training data gives away.

A duplicate says the same as another record, whatever the case and the white space. Overlap is
counted in 8-grams, runs of eight words, as the GPT-3 paper counts contamination (there with 13; 8
is what later work uses for short answers). A shared 8-gram alone proves nothing, because a set's
prompts may share whole sentences; a record that shares half of its 8-grams is probably known.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Bool, UInt64

from qlora_jax.data.formats import Record

NGRAM = 8


@dataclasses.dataclass(frozen=True)
class Overlap:
    """How much of the held-out records occurs in the training records.

    Attributes:
        records: held-out records with at least one 8-gram.
        any: of these, how many share at least one 8-gram with a training record.
        half: how many share at least half of them.
        examples: ids of the first few of the latter.
    """

    records: int
    any: int
    half: int
    examples: tuple[str, ...] = ()

    def line(self) -> str:
        """The counts as one sentence."""
        head = (
            f"of {self.records:,} held-out records of at least {NGRAM} words, {self.any:,} share "
            f"{NGRAM} words in a row with a training record, {self.half:,} at least half of all"
        )
        return head + (f" ({', '.join(self.examples)})" if self.examples else "")


def words(record: Record) -> list[str]:
    """The words of all messages, or of the plain text, in lower case."""
    contents = [message["content"] for message in record.messages] or [record.text]
    return " ".join(contents).casefold().split()


def digest(record: Record) -> int:
    """64 bits that are the same for records that say the same.

    Of a million records, two that differ have the same with a probability of 3e-8.
    """
    text = " ".join(words(record)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest())


def drop_duplicates(records: Sequence[Record]) -> list[Record]:
    """The records that say something new; the first of equal ones stays.

    >>> texts = ["A b", "a  B", "c"]
    >>> records = [Record(f"a:{i}", "text", text=text) for i, text in enumerate(texts)]
    >>> [record.record_id for record in drop_duplicates(records)]
    ['a:0', 'a:2']
    """
    new = first_of_equal(np.array([digest(record) for record in records], np.uint64))
    return [record for record, is_new in zip(records, new, strict=True) if is_new]


def first_of_equal(digests: UInt64[np.ndarray, " N"]) -> Bool[np.ndarray, " N"]:
    """Of records in order, which say something new.

    >>> first_of_equal(np.array([7, 8, 7], np.uint64)).tolist()
    [True, True, False]
    """
    new = np.zeros(len(digests), bool)
    new[np.unique(digests, return_index=True)[1]] = True
    return new


def measure_overlap(train: Iterable[Record], heldout: Sequence[Record]) -> Overlap:
    """Looks for the 8-grams of the held-out records in the training records.

    >>> known, new = "a b c d e f g h i", "1 2 3 4 5 6 7 8 9"
    >>> heldout = [Record("b:1", "text", text=known), Record("b:2", "text", text=new)]
    >>> measure_overlap([Record("a:1", "text", text=known + " and more")], heldout)
    Overlap(records=2, any=1, half=1, examples=('b:1',))
    """
    wanted = [(record.record_id, set(_ngrams(record))) for record in heldout]
    looked_for = set().union(*(ngrams for _, ngrams in wanted))
    found = {ngram for record in train for ngram in _ngrams(record) if ngram in looked_for}
    shares = [(name, len(ngrams & found) / len(ngrams)) for name, ngrams in wanted if ngrams]
    half = [name for name, share in shares if share >= 0.5]
    shared = sum(share > 0 for _, share in shares)
    return Overlap(len(shares), shared, len(half), tuple(half[:3]))


def _ngrams(record: Record) -> Iterator[tuple[str, ...]]:
    found = words(record)
    return (tuple(found[i : i + NGRAM]) for i in range(len(found) - NGRAM + 1))
