"""Reading the fields of a JSON body, one at a time, with errors that name the field.

A `Fields` remembers which fields were asked for, so that what is left in the end is what the server
does not know: a misspelled `temperatur` would otherwise be ignored without a word.
"""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from qlora_jax.errors import nearest
from qlora_jax.serving.errors import ApiError


def bad_field(name: str, message: str, *, code: str = "invalid_value") -> ApiError:
    """The error that a field has a value it cannot have."""
    return ApiError(400, f"{name}: {message}", code=code, param=name)


def parse_object(body: bytes) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        ApiError: it is none.

    >>> parse_object(b'{"n": 1}')
    {'n': 1}
    """
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


class Fields:
    """The fields of one object; `null` counts as not given."""

    def __init__(self, values: Mapping[str, Any], inside: str = ""):
        """Reads from `values`; `inside` is put before the names in messages."""
        self._values = values
        self._inside = inside
        self._known: set[str] = set()

    def get(self, name: str) -> Any:
        """The value as it is, or None."""
        self._known.add(name)
        return self._values.get(name)

    def number(self, name: str, low: float, high: float, default: float | None = None) -> Any:
        """A finite number in [low, high].

        >>> Fields({"top_p": 0.9}).number("top_p", 0, 1)
        0.9
        """
        value = self.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._bad(name, f"must be a number, got {_show(value)}")
        if not math.isfinite(value) or not low <= value <= high:
            raise self._bad(name, f"must be from {low:g} to {high:g}, got {value}")
        return value

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> Any:
        """A whole number in [low, high]."""
        value = self.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._bad(name, f"must be a whole number, got {_show(value)}")
        if not low <= value <= high:
            raise self._bad(name, f"must be from {low} to {high}, got {value}")
        return value

    def boolean(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._bad(name, f"must be true or false, got {_show(value)}")
        return value

    def text(self, name: str) -> str | None:
        """A text."""
        value = self.get(name)
        if value is not None and not isinstance(value, str):
            raise self._bad(name, f"must be a text, got {_show(value)}")
        return value

    def needed(self, name: str) -> Any:
        """A value that must be given."""
        value = self.get(name)
        if value is None:
            raise self._bad(name, "is needed", code="missing_field")
        return value

    def refuse(self, name: str, harmless: Iterable[Any], message: str) -> None:
        """Refuses what the server cannot do, unless the value asks for nothing."""
        value = self.get(name)
        if value is not None and not any(value == one for one in harmless):
            raise self._bad(name, message, code="unsupported_value")

    def ignore(self, *names: str) -> None:
        """Takes note of fields that change nothing here."""
        self._known.update(names)

    def finish(self) -> None:
        """Refuses fields that nobody asked for."""
        for name in self._values:
            if name not in self._known:
                match = nearest(name, self._known)
                hint = f"; did you mean {match}?" if match else ""
                raise self._bad(
                    name[:80], f"there is no such field{hint}", code="unknown_parameter"
                )

    def _bad(self, name: str, message: str, *, code: str = "invalid_value") -> ApiError:
        return bad_field(f"{self._inside}{name}", message, code=code)


def _show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
