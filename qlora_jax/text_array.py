"""Many short texts in the memory that they have in a file."""

import array
from collections.abc import Sequence


class TextArray(Sequence[str]):
    """Texts in the memory that they have in the file; each is decoded when it is asked for.

    Example:
      >>> texts = TextArray(b"abc", array.array("Q", [1, 3]))
      >>> list(texts), texts[-1], len(texts)
      (['a', 'bc'], 'bc', 2)
    """

    def __init__(self, data: bytes | bytearray, ends: array.array):
        """Joins texts that are UTF-8.

        Args:
          data: their bytes, one after the other.
          ends: where each ends, of type "Q".
        """
        self._data, self._ends = data, ends

    def __len__(self) -> int:
        """Number of texts."""
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        """One text."""
        index = range(len(self._ends))[index]
        start = self._ends[index - 1] if index else 0
        return self._data[start : self._ends[index]].decode("utf-8")
