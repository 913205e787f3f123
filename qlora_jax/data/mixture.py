"""Several sets in one run: which, where they are, and how often an epoch shows each.

    oasst1*2, alpaca=/data/alpaca.json*0.5, messages=chats.jsonl

is OASST1 twice an epoch, a random half of Alpaca (the same half in every epoch) from a file, and
conversations of one's own. Every set keeps the mapping and the loss of its authors.
"""

import dataclasses
import re
from collections.abc import Sequence

from qlora_jax.data.line_formats import LINE_FORMATS
from qlora_jax.data.row_order import permutation
from qlora_jax.data.sets import SETS
from qlora_jax.errors import ConfigError

_MIXTURE = 3  # a stream of random numbers of its own, see `row_order`
_PART = re.compile(r"\s*([\w-]+)\s*(?:=\s*(.+?)\s*)?(?:\*\s*([0-9.]+)\s*)?")


@dataclasses.dataclass(frozen=True)
class Source:
    """One set of a run.

    Attributes:
        name: of a set, or a format of `LINE_FORMATS`, or "auto".
        path: where it is.
        weight: how often an epoch shows each of its records.
    """

    name: str
    path: str
    weight: float = 1.0


def parse_mixture(text: str) -> list[Source]:
    """Reads a mixture.

    Raises:
        ConfigError: saying which part is wrong, and how.

    >>> parse_mixture("oasst1*2, messages=chats.jsonl")[1]
    Source(name='messages', path='chats.jsonl', weight=1.0)
    """
    return [_parse_part(part) for part in text.split(",")]


def _parse_part(part: str) -> Source:
    match = _PART.fullmatch(part)
    if match is None:
        raise ConfigError(
            f"{part.strip()!r} is not of the form name, name=path or name=path*weight"
        )
    name, path, weight = match[1], match[2] or "", match[3] or "1"
    names = (*SETS, *LINE_FORMATS, "auto")
    if name not in names:
        raise ConfigError(f"{name!r} is not one of {', '.join(dict.fromkeys(names))}")
    path = path or (SETS[name].hub if name in SETS else "")
    if not path:
        raise ConfigError(f"{name} is on no hub in files that can be read; write {name}=path")
    if weight.count(".") > 1 or not re.search("[1-9]", weight):
        raise ConfigError(f"the weight of {name} is {weight}, needs to be more than 0")
    return Source(name, path, float(weight))


def repeat[Item](items: Sequence[Item], weight: float, seed: int) -> list[Item]:
    """Every item `weight` times; of a fraction, the same random items in every call.

    >>> sorted(repeat(["a", "b"], 2.5, seed=0))
    ['a', 'a', 'a', 'b', 'b']
    """
    whole, fraction = divmod(weight, 1)
    count = round(fraction * len(items))
    chosen = sorted(permutation(len(items), seed, 0, _MIXTURE)[:count].tolist())
    return list(items) * int(whole) + [items[i] for i in chosen]
