"""A range profile: how large latent and rope are in each layer of a model, as a TOML file says it.

    layers = 61              # optional: how many layers the lists below were measured on
    seed = 0                 # optional: which channels are the large ones

    [latent]                 # of the 512 channels after RMSNorm; left out, the part stays as it is
    rms = [0.001, 0.2]       # root mean square over all channels and tokens
    max = [0.02, 5.2]        # max|x|
    tail = 1.0               # standard deviation, over channels, of the natural logarithm of a channel's rms

    [rope]                   # the same of the 32 rotated pairs, a pair counting as one channel

A number holds for every layer. A list stands for points evenly spaced from the first layer to the last, of whatever
depth the checkpoint is: between two points rms and max are interpolated geometrically, the tail linearly.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

from evalkit.errors import InputError

SHIPPED: Final = Path(__file__).parent / "profiles"
PARTS: Final = ("latent", "rope")


@dataclass(frozen=True, kw_only=True)
class Range:
    """How large the values of one part of a layer's rows are; see the module's docstring."""

    rms: float
    max: float
    tail: float


@dataclass(frozen=True, kw_only=True)
class Curves:
    """A part's figures over depth, each at one point or at evenly spaced ones."""

    rms: tuple[float, ...]
    max: tuple[float, ...]
    tail: tuple[float, ...]

    def at(self, layer: int, layers: int) -> Range:
        """The figures of one of `layers` layers; a model of one layer takes the first point."""
        rms, largest = (_between(curve, layer, layers, geometric=True) for curve in (self.rms, self.max))
        return Range(rms=rms, max=largest, tail=_between(self.tail, layer, layers, geometric=False))


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The ranges that a checkpoint is to have. A part that is None keeps its own.

    sha256: of the file, so that a run names what it used.
    """

    name: str
    sha256: str
    seed: int = 0
    latent: Curves | None = None
    rope: Curves | None = None

    @property
    def is_native(self) -> bool:
        """Whether nothing is to change."""
        return self.latent is None and self.rope is None

    def targets(self, layers: int) -> list[dict[str, Range]]:
        """For each of `layers` layers, the range of each part that is to change.

        Raises:
            InputError: a layer's rms would exceed its max.
        """
        curves: dict[str, Curves] = {
            part: given for part in PARTS if (given := getattr(self, part)) is not None
        }
        found = [{part: given.at(layer, layers) for part, given in curves.items()} for layer in range(layers)]
        for layer, targets in enumerate(found):
            for part, target in targets.items():
                if not target.rms <= target.max:
                    raise InputError(
                        f"profile {self.name}: {part} of layer {layer} would have rms {target.rms:.3g} above its max "
                        f"{target.max:.3g}"
                    )
        return found


def names() -> list[str]:
    """The profiles that evalkit carries."""
    return sorted(path.stem for path in SHIPPED.glob("*.toml"))


def load_profile(name: str) -> Profile:
    """A profile by the name of one that evalkit carries, or by the path of a TOML file.

    Raises:
        InputError: there is neither, or the file says something that a profile cannot.
    """
    path = SHIPPED / f"{name}.toml" if name in names() else Path(name)
    try:
        text = path.read_bytes()
        values = tomllib.loads(text.decode("utf-8"))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        close = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise InputError(f"no profile {name!r}: {hint}Give {', '.join(names())}, or a TOML file") from None
    except OSError as error:
        raise InputError(f"profile {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"profile {path} is not TOML: {error}") from None
    where = f"profile {path}"
    _refuse_unknown(values, ("description", "layers", "seed", *PARTS), where)
    layers, seed = values.get("layers"), values.get("seed", 0)
    if layers is not None and (type(layers) is not int or layers < 1):
        raise InputError(f"{where}: layers is {layers!r}: a positive integer is right")
    if type(seed) is not int or not 0 <= seed < 2**32:
        raise InputError(f"{where}: seed is {seed!r}: an integer from 0 to 2^32 - 1 is right")
    parts = {part: _curves(values[part], layers, f"{where}: {part}") for part in PARTS if part in values}
    return Profile(name=name, sha256=hashlib.sha256(text).hexdigest(), seed=seed, **parts)


def to_toml(layers: Sequence[dict[str, Range]], description: str) -> str:
    """A profile file of these figures, one point a layer."""
    lines = [f"description = {json.dumps(description, ensure_ascii=False)}", f"layers = {len(layers)}"]
    for part in PARTS:
        lines += ["", f"[{part}]"]
        for field in fields(Range):
            values = (f"{getattr(layer[part], field.name)!r}" for layer in layers)
            lines.append(f"{field.name} = [{', '.join(values)}]")
    return "\n".join(lines) + "\n"


def _between(curve: tuple[float, ...], layer: int, layers: int, *, geometric: bool) -> float:
    if len(curve) == 1 or layers == 1:
        return curve[0]
    # In integers, so that a layer which lies on a point takes that point's very number.
    point, rest = divmod(layer * (len(curve) - 1), layers - 1)
    if rest == 0:
        return curve[point]
    share, low, high = rest / (layers - 1), curve[point], curve[point + 1]
    if geometric:
        return math.exp((1 - share) * math.log(low) + share * math.log(high))
    return (1 - share) * low + share * high


def _curves(values: Any, layers: int | None, where: str) -> Curves:
    if not isinstance(values, dict):
        raise InputError(f"{where} is {values!r}: a table with rms, max and tail is right")
    keys = [field.name for field in fields(Curves)]
    _refuse_unknown(values, keys, where)
    for key in keys:
        if key not in values:
            raise InputError(f"{where} lacks {key}: give a number, or a list of one for each point")
    return Curves(**{key: _curve(values[key], layers, f"{where}.{key}") for key in keys})


def _curve(value: Any, layers: int | None, where: str) -> tuple[float, ...]:
    curve = tuple(value) if isinstance(value, list) else (value,)
    smallest = "zero or more" if where.endswith("tail") else "above zero"
    for number in curve:
        if type(number) not in (int, float) or not math.isfinite(number) or number < 0:
            raise InputError(f"{where} holds {number!r}: finite numbers, {smallest}, are right")
        if number == 0 and smallest == "above zero":
            raise InputError(f"{where} holds 0: numbers {smallest} are right")
    if not curve:
        raise InputError(f"{where} is an empty list: give a number, or one for each point")
    if isinstance(value, list) and layers is not None and len(curve) != layers:
        raise InputError(f"{where} has {len(curve)} values and layers is {layers}: give one for each layer")
    return tuple(float(number) for number in curve)


def _refuse_unknown(values: dict[str, Any], known: Sequence[str], where: str) -> None:
    for key in values:
        if key not in known:
            raise InputError(f"{where}: unknown key {key!r} (keys: {', '.join(known)})")
