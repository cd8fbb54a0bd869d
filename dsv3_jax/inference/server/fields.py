"""Fields of a request, each read as the type it must have."""

from collections.abc import Mapping
from typing import Any

from dsv3_jax.inference.server.errors import RequestError

LONGEST_SHOWN = 50


class Fields:
    """The fields of a JSON object. A field that is null counts as absent; those that nobody reads are ignored.

    Every reader raises RequestError, naming the field, for a value of another type or out of its range.
    """

    def __init__(self, values: Any, name: str = ""):
        """`name`: where in the request the object stands, for messages."""
        if not isinstance(values, Mapping):
            raise RequestError(f"{name or 'the body'} must be a JSON object, not {shown(values)}", name or None)
        self._values = {key: value for key, value in values.items() if value is not None}
        self._prefix = f"{name}." if name else ""

    def get(self, name: str) -> Any:
        """The value as it came; None where it is absent."""
        return self._values.get(name)

    def whole(self, name: str, default: int | None, least: int, most: int) -> int | None:
        value = self._values.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(name, f"must be a whole number, not {shown(value)}")
        if not least <= value <= most:
            raise self.error(name, f"must be between {least} and {most}, not {shown(value)}")
        return value

    def number(self, name: str, default: float) -> float:
        value = self._values.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(name, f"must be a number, not {shown(value)}")
        try:
            return float(value)
        except OverflowError:
            raise self.error(name, "is too large") from None

    def flag(self, name: str, default: bool = False) -> bool:
        value = self._values.get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, f"must be true or false, not {shown(value)}")
        return value

    def text(self, name: str) -> str | None:
        value = self._values.get(name)
        return None if value is None else self.as_text(value, name)

    def object(self, name: str) -> "Fields":
        """A nested object; an empty one where it is absent."""
        return Fields(self._values.get(name, {}), self._prefix + name)

    def values(self) -> dict[str, Any]:
        return dict(self._values)

    def as_text(self, value: Any, name: str) -> str:
        if not isinstance(value, str):
            raise self.error(name, f"must be a text, not {shown(value)}")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise self.error(name, f"has half a surrogate pair at character {error.start}: not a text") from error
        return value

    def error(self, name: str, problem: str) -> RequestError:
        return RequestError(f"{self._prefix}{name} {problem}", self._prefix + name)


def shown(value: Any) -> str:
    """A value of JSON as a message can quote it."""
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, int) and abs(value) >= 10**LONGEST_SHOWN:
        return "a number that large"
    names = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return names[value]
    text = repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."
