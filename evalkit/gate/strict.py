"""Tables of a TOML file as frozen dataclasses: every key known, every value of its field's type."""

from dataclasses import MISSING, fields, is_dataclass
from datetime import date, datetime
from difflib import get_close_matches
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from evalkit.errors import InputError

T = TypeVar("T")


def build(cls: type[T], raw: object, where: str) -> T:
    """`raw` as a `cls`.

    Args:
        cls: a dataclass of text, numbers, dates, dictionaries, tuples and dataclasses of the same.
        raw: what TOML made of a table.
        where: begins every message, such as `policy.toml`.

    Raises:
        InputError: a key is unknown or missing, or a value of the wrong type; the place is named.
    """
    if not isinstance(raw, dict):
        raise InputError(f"{where} is {raw!r}: a table is right")
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
    hints = get_type_hints(cls)
    return cls(**{key: _value(hints[key], value, f"{where}: {key}") for key, value in raw.items()})


def _value(hint: Any, raw: object, where: str) -> Any:
    if isinstance(hint, UnionType):
        hint = next(option for option in get_args(hint) if option is not type(None))
    if isinstance(hint, type) and is_dataclass(hint):
        return build(hint, raw, where)
    if get_origin(hint) is tuple:
        if not isinstance(raw, list):
            raise InputError(f"{where} is {raw!r}: a list is right")
        return tuple(_value(get_args(hint)[0], item, f"{where}[{number}]") for number, item in enumerate(raw))
    if get_origin(hint) is dict:
        if not isinstance(raw, dict):
            raise InputError(f"{where} is {raw!r}: a table is right")
        return {key: _value(get_args(hint)[1], item, f"{where}.{key}") for key, item in raw.items()}
    takes = (int, float) if hint is float else (hint,)
    # A bool is an int to Python, and a time is a date.
    if not isinstance(raw, takes) or isinstance(raw, bool | datetime):
        words = {str: "text", int: "a whole number", float: "a number", date: "a date such as 2030-01-31"}
        raise InputError(f"{where} is {raw!r}: {words[hint]} is right")
    return float(raw) if hint is float else raw
