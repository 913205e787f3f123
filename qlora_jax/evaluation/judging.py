"""Strict parsers for what a judge was asked to write, and nothing else.

The prompts of the QLoRA authors ask for one of two forms:

- three classes: an explanation, then a last line that is `1`, `2` or `3` (equivalent) alone;
- relative: a first line with two scores on a scale of 1 to 10 and a space between them. (Their
  prompt for mathematics asks for a Python tuple at the end instead.)

What has another form is *unparsed* (None), however clear it may read to a person: a parser that
searches the prose for numbers also finds the 10 and the 4 in "the points (10, 4)" of a geometry
question. Better to lose a verdict, and to count it, than to invent one.
"""

import re

# Scores may have decimals ("9 8.5").
_NUMBER = r"(\d{1,2}(?:\.\d+)?)"
_PAIR = re.compile(rf"{_NUMBER} +{_NUMBER}")
_TUPLE = re.compile(rf"\({_NUMBER}, *{_NUMBER}\)")


def parse_threeclass(text: str) -> int | None:
    """Reads a verdict between two answers.

    Args:
        text: all that the judge wrote.

    Returns:
        1 or 2, the better answer; 3, they are equivalent; None, unparsed.

    Example:
        >>> parse_threeclass("Both are helpful, the second is more detailed.\\n\\n2")
        2
        >>> parse_threeclass("Therefore, I choose 3.") is None
        True
    """
    last = text.strip().rpartition("\n")[2].strip()
    return int(last) if last in ("1", "2", "3") else None


def parse_relative(text: str) -> tuple[float, float] | None:
    """Reads two scores on a scale of 1 to 10.

    Args:
        text: all that the judge wrote.

    Returns:
        The scores of the first and the second answer, from the first line, or from a last line that
        is a tuple alone; None, unparsed. A score outside 1 to 10 is unparsed, too.

    Example:
        >>> parse_relative("9 8.5\\nBoth answers are helpful.")
        (9.0, 8.5)
        >>> parse_relative("I solved it first.\\n\\n(10, 9)")
        (10.0, 9.0)
        >>> parse_relative("The points are (10, 4) and (3, -7).") is None
        True
    """
    lines = text.strip().splitlines() or [""]
    match = _PAIR.fullmatch(lines[0].strip()) or _TUPLE.fullmatch(lines[-1].strip())
    if match is None:
        return None
    first, second = float(match[1]), float(match[2])
    return (first, second) if 1 <= first <= 10 and 1 <= second <= 10 else None
