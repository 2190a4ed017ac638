"""Tables of a TOML file as frozen dataclasses: every key known, every value of its field's type and in its range."""

from dataclasses import MISSING, dataclass, fields, is_dataclass
from datetime import date, datetime
from difflib import get_close_matches
from math import inf, isfinite
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from evalkit.errors import InputError

T = TypeVar("T")
LONGEST = 60  # characters of a value that a message repeats
WORDS = {str: "text", int: "a whole number", float: "a number", date: "a date such as 2030-01-31"}


@dataclass(frozen=True)
class Range:
    """What a number may be, both ends included; stands in a field's type: `Annotated[float, Range(0, 1)]`."""

    least: float
    most: float

    def __contains__(self, number: float) -> bool:
        return self.least <= number <= self.most

    def __str__(self) -> str:
        return f"from {self.least:,.10g} to {self.most:,.10g}"


def build(cls: type[T], raw: object, where: str) -> T:
    """`raw` as a `cls`.

    Args:
        cls: a dataclass of text, numbers, dates, dictionaries, tuples and dataclasses of the same; a number's type may
            be annotated with its `Range`.
        raw: what TOML made of a table.
        where: begins every message, such as `policy.toml`.

    Raises:
        InputError: a key is unknown or missing, a value of the wrong type or out of its range, a number not finite, or a
            text blank; the place is named.
    """
    if not isinstance(raw, dict):
        raise InputError(f"{where} is {_shown(raw)}: a table is right")
    assert is_dataclass(cls)
    known = {field.name: field for field in fields(cls)}
    for key in raw:
        if key not in known:
            close = get_close_matches(str(key), known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"keys: {', '.join(known)}"
            raise InputError(f"{where}: unknown key {key!r}; {hint}")
    needed = [name for name, f in known.items() if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in needed if name not in raw]:
        raise InputError(f"{where}: {', '.join(missing)} missing")
    hints = get_type_hints(cls, include_extras=True)
    return cls(**{key: _value(hints[key], value, f"{where}: {key}") for key, value in raw.items()})


def _value(hint: Any, raw: object, where: str) -> Any:
    if get_origin(hint) in (Union, UnionType):
        hint = next(option for option in get_args(hint) if option is not type(None))
    if get_origin(hint) is Annotated:
        of, within = get_args(hint)
        number = _value(of, raw, where)
        if number not in within:
            raise InputError(f"{where} is {_shown(raw)}: {WORDS[of]} {within} is right")
        return number
    if isinstance(hint, type) and is_dataclass(hint):
        return build(hint, raw, where)
    if get_origin(hint) is tuple:
        if not isinstance(raw, list):
            raise InputError(f"{where} is {_shown(raw)}: a list is right")
        return tuple(_value(get_args(hint)[0], item, f"{where}[{number}]") for number, item in enumerate(raw))
    if get_origin(hint) is dict:
        if not isinstance(raw, dict):
            raise InputError(f"{where} is {_shown(raw)}: a table is right")
        return {key: _value(get_args(hint)[1], item, f"{where}.{key}") for key, item in raw.items()}
    return _scalar(hint, raw, where)


def _scalar(hint: Any, raw: object, where: str) -> Any:
    takes = (int, float) if hint is float else (hint,)
    # A bool is an int to Python, and a time is a date.
    if not isinstance(raw, takes) or isinstance(raw, bool | datetime):
        raise InputError(f"{where} is {_shown(raw)}: {WORDS[hint]} is right")
    if isinstance(raw, str) and not raw.strip():
        raise InputError(f"{where} is {raw!r}: text that is not blank is right")
    if hint is not float:
        return raw
    try:
        number = float(raw)
    except OverflowError:
        number = inf
    if not isfinite(number):
        raise InputError(f"{where} is {_shown(raw)}: a finite number is right")
    return number


def _shown(raw: object) -> str:
    """A value in a message of one line, however long it is."""
    try:
        text = repr(raw)
    except ValueError:  # Python writes out no integer of thousands of digits
        return "an integer of thousands of digits"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
