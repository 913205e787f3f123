"""The account of records that were skipped, cut or dropped: nothing disappears without a line
here."""

import dataclasses
import logging

_LOGGER = logging.getLogger(__name__)
_SAMPLES = 5


@dataclasses.dataclass
class DataReport:
    """Counts, and the first few reasons, of what did not make it into the training data whole.

    Attributes:
        records: records read and found good.
        skipped: bad records left out (only with `on_bad_record="skip"`).
        truncated: examples cut to the maximum length.
        dropped: examples left out because no token of an answer fits.
        duplicates: records that say the same as an earlier one.
        duplicates_dropped: whether these were left out.
        samples: the messages of the first few skipped or dropped ones.

    >>> report = DataReport()
    >>> report.skip("a.jsonl:3: prompt: found nothing, need non-empty text")
    >>> report.lines()
    ['0 records read, 1 skipped, 0 truncated, 0 dropped',
     '  a.jsonl:3: prompt: found nothing, need non-empty text']
    """

    records: int = 0
    skipped: int = 0
    truncated: int = 0
    dropped: int = 0
    duplicates: int = 0
    duplicates_dropped: bool = False
    samples: list[str] = dataclasses.field(default_factory=list)

    def skip(self, message: str) -> None:
        """Counts a bad record that is left out."""
        self.skipped += 1
        self._sample(message)

    def drop(self, message: str) -> None:
        """Counts an example without a single loss token."""
        self.dropped += 1
        self._sample(message)

    def merge(self, other: "DataReport") -> None:
        """Adds the account of other records."""
        for name in ("records", "skipped", "truncated", "dropped"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for message in other.samples:
            self._sample(message)

    def _sample(self, message: str) -> None:
        if len(self.samples) < _SAMPLES:
            self.samples.append(message)

    def lines(self) -> list[str]:
        """The account as text: the counts, then the first reasons, then how many more there
        were."""
        head = (
            f"{self.records:,} records read, {self.skipped:,} skipped, "
            f"{self.truncated:,} truncated, {self.dropped:,} dropped"
        )
        if self.duplicates:
            what = (
                "left out" if self.duplicates_dropped else "kept (data.deduplicate=True drops them)"
            )
            head += f"; {self.duplicates:,} duplicate{'s' * (self.duplicates > 1)} {what}"
        more = self.skipped + self.dropped - len(self.samples)
        tail = [f"  ... and {more:,} more"] if more > 0 else []
        return [head, *(f"  {message}" for message in self.samples), *tail]

    def log(self) -> None:
        """Writes the account to the log if anything was left out."""
        if self.skipped or self.dropped:
            _LOGGER.warning("%s", "\n".join(self.lines()))
