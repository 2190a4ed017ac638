"""A policy: the limits that reviewers sign, from TOML, with one hash whatever its layout.

Losses, margins and shares are fractions: 0.02 is 2 points.
"""

import hashlib
import json
import tomllib
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Annotated

from evalkit import shipped
from evalkit.errors import InputError
from evalkit.gate.contradictions import refuse_contradictions
from evalkit.gate.strict import Range, build
from evalkit.stats.power import each_power

INCONCLUSIVE = "INCONCLUSIVE"
Share = Annotated[float, Range(0, 1)]
Documents = Annotated[int, Range(2, 1_000_000)]


@dataclass(frozen=True, kw_only=True)
class Scope:
    """Where the policy's verdicts hold. Elsewhere a candidate is at best INCONCLUSIVE.

    checkpoints: SHA-256 as runs record it, by a name for readers.
    gpus: beginnings of the GPU's name; `cpu` stands for none.
    kernels: beginnings of the kernel's name.
    heads: attention heads on one GPU.
    profiles: ranges that the model may have been given; `native` are its own.
    """

    checkpoints: dict[str, str]
    gpus: tuple[str, ...]
    kernels: tuple[str, ...]
    heads: tuple[Annotated[int, Range(1, 4096)], ...]
    profiles: tuple[str, ...] = ("native",)


@dataclass(frozen=True, kw_only=True)
class PrimaryEndpoint:
    """One score that must not fall by `margin` or more.

    chance: the score of guessing.
    documents_per_cluster: how many successive documents share what they ask about.
    """

    task: str
    metric: str
    filter: str
    margin: Annotated[float, Range(0.0001, 0.25)]
    chance: Annotated[float, Range(0, 0.98)] = 0.0
    documents_per_cluster: Annotated[int, Range(1, 1_000_000)] = 1

    def __str__(self) -> str:
        return f"{self.task}, {self.metric} ({self.filter})"


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """Least shares of scored tokens, and the largest share of answers cut off at their length limit.

    over_topk: tokens with more context than top-k, for which the indexer had to choose.
    stored_rows: tokens whose attention read rows of the cache.
    """

    over_topk: Share
    stored_rows: Share
    truncated: Share = 0.0


@dataclass(frozen=True, kw_only=True)
class Damage:
    """Planted damage: the baseline with its rows multiplied by 1 + noise * N(0, 1) when they are stored.

    An endpoint counts only if this is found lower while costing no more than `loss_at_most`: what finds only a
    large damage has not shown that it would find a small one.
    """

    noise: Annotated[float, Range(0.0001, 10)]
    loss_at_most: Annotated[float, Range(0.0002, 0.5)]


@dataclass(frozen=True, kw_only=True)
class Limit:
    """A bound on a figure of the records, at its worst over the records that match.

    figure: `kind.field`, as in `layer.relative_l2` or `multiple.multiple` (of a floor).
    where: values of the record's other fields.
    breach: the verdict where it is not held.
    """

    name: str
    figure: str
    where: dict[str, str] = field(default_factory=dict)
    at_most: float | None = None
    at_least: float | None = None
    breach: str = INCONCLUSIVE

    @property
    def kind(self) -> str:
        return self.figure.partition(".")[0]

    @property
    def value(self) -> str:
        return self.figure.partition(".")[2]


@dataclass(frozen=True, kw_only=True)
class Exemption:
    """A limit that does not bind one candidate until a day, with the reason."""

    candidate: str
    limit: str
    expires: date
    reason: str


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What makes a candidate acceptable as a default, and where.

    decide: candidates that the overall verdict is about, as they are asked for or as they resolve.
    baselines: what each must not be worse than: bf16 and, where a default changes, the incumbent.
    true_loss: what planning assumes.
    looks: how often the verdict may be asked for as documents are added; each is at alpha / looks.
    documents: of each task, how many a look adds; None leaves open how many a run scores.
    """

    name: str
    decide: tuple[str, ...]
    baselines: tuple[str, ...]
    scope: Scope
    endpoints: tuple[PrimaryEndpoint, ...]
    coverage: Coverage
    damage: Damage
    alpha: Annotated[float, Range(1e-6, 0.2)] = 0.05
    power: Annotated[float, Range(0.1, 0.9999)] = 0.8
    true_loss: Annotated[float, Range(-1, 1)] = 0.0
    looks: Annotated[int, Range(1, 100)] = 1
    documents: Documents | None = None
    limits: tuple[Limit, ...] = ()
    exceptions: tuple[Exemption, ...] = ()

    @property
    def look_alpha(self) -> float:
        """One-sided level of one look."""
        return self.alpha / self.looks

    @property
    def each_power(self) -> float:
        """Power of each thing to be shown, with which all are: of every endpoint its loss, and its planted damage."""
        return each_power(self.power, 2 * len(self.endpoints))

    @property
    def planned(self) -> tuple[int, ...]:
        """Documents of each task at every look; empty where the policy names no number."""
        return () if self.documents is None else tuple(self.documents * (k + 1) for k in range(self.looks))

    def to_json(self) -> str:
        """All of it in one form, defaults included."""
        said = asdict(self)
        if self.documents is None:
            del said["documents"]  # a policy that is silent on it keeps the hash that runs have stored
        return json.dumps(said, sort_keys=True, default=str)

    @property
    def sha256(self) -> str:
        """Of what it says, not of its comments, order or layout."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def load(given: str | Path) -> Policy:
    """Read a policy: one that evalkit ships, by its name, or a file.

    Raises:
        InputError: there is none, the file cannot be read, says something unknown or out of range, contradicts itself,
            or limits a figure that no record has.
    """
    path = shipped.find("policy", given)
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"policy {path} cannot be read: {error.strerror}") from None
    except ValueError as error:  # not UTF-8, not TOML, or an integer of thousands of digits
        raise InputError(f"{path} is not TOML: {error}") from None
    except RecursionError:
        raise InputError(f"{path} is not TOML: it is nested too deeply") from None
    policy = build(Policy, raw, str(path))
    refuse_contradictions(policy, str(path))
    return policy
