"""A policy: the limits that reviewers sign, from TOML, with one hash whatever its layout.

Losses, margins and shares are fractions: 0.02 is 2 points.
"""

import hashlib
import json
import tomllib
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import get_args

from evalkit.errors import InputError
from evalkit.gate.strict import build
from evalkit.schema import HINTS
from evalkit.stats.exact import check
from evalkit.stats.power import each_power

ANOMALOUS, INCONCLUSIVE = "ANOMALOUS", "INCONCLUSIVE"


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
    heads: tuple[int, ...]
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
    margin: float
    chance: float = 0.0
    documents_per_cluster: int = 1

    def __str__(self) -> str:
        return f"{self.task}, {self.metric} ({self.filter})"


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """Least shares of scored tokens, and the largest share of answers cut off at their length limit.

    over_topk: tokens with more context than top-k, for which the indexer had to choose.
    stored_rows: tokens whose attention read rows of the cache.
    """

    over_topk: float
    stored_rows: float
    truncated: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Damage:
    """Planted damage: the baseline with its rows multiplied by 1 + noise * N(0, 1) when they are stored.

    An endpoint counts only if this is found lower while costing no more than `loss_at_most`: what finds only a
    large damage has not shown that it would find a small one.
    """

    noise: float
    loss_at_most: float


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
    """

    name: str
    decide: tuple[str, ...]
    baselines: tuple[str, ...]
    scope: Scope
    endpoints: tuple[PrimaryEndpoint, ...]
    coverage: Coverage
    damage: Damage
    alpha: float = 0.05
    power: float = 0.8
    true_loss: float = 0.0
    looks: int = 1
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

    def to_json(self) -> str:
        """All of it in one form, defaults included."""
        return json.dumps(asdict(self), sort_keys=True, default=str)

    @property
    def sha256(self) -> str:
        """Of what it says, not of its comments, order or layout."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def load(path: Path) -> Policy:
    """Read a policy.

    Raises:
        InputError: the file cannot be read, says something unknown, or limits a figure that no record has.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"no policy at {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not TOML: {error}") from None
    policy = build(Policy, raw, str(path))
    _check_policy(policy, str(path))
    for number, limit in enumerate(policy.limits):
        _check_limit(limit, f"{path}: limits[{number}] ({limit.name})")
    return policy


def _check_policy(policy: Policy, where: str) -> None:
    names = [limit.name for limit in policy.limits]
    refused = {
        "decide, baselines and endpoints: name at least one of each": not (
            policy.decide and policy.baselines and policy.endpoints
        ),
        "limits: two have one name": len(set(names)) < len(names),
        "endpoints: one is named twice": len({str(e) for e in policy.endpoints}) < len(policy.endpoints),
        f"looks is {policy.looks}: at least 1 is right": policy.looks < 1,
        f"power is {policy.power}: a number between 0 and 1 is right": not 0 < policy.power < 1,
        f"damage: noise is {policy.damage.noise}: more than 0 is right": not policy.damage.noise > 0,
    }
    for what, wrong in refused.items():
        if wrong:
            raise InputError(f"{where}: {what}")
    for key in ("over_topk", "stored_rows", "truncated"):
        if not 0 <= getattr(policy.coverage, key) <= 1:
            raise InputError(f"{where}: coverage: {key} is {getattr(policy.coverage, key)}: a share is right")
    for endpoint in policy.endpoints:
        try:
            check(2, endpoint.margin, policy.look_alpha)
        except InputError as error:
            raise InputError(f"{where}: {endpoint}: {error}") from None
        if endpoint.documents_per_cluster < 1:
            raise InputError(f"{where}: {endpoint}: documents_per_cluster is at least 1")
        # Sensitivity is to be shown for damage of twice the margin.
        if policy.damage.loss_at_most < 2 * endpoint.margin:
            raise InputError(
                f"{where}: damage: loss_at_most {policy.damage.loss_at_most:g} leaves no room for the twofold margin "
                f"of {endpoint}: at least {2 * endpoint.margin:g} is right"
            )
    for exempt in policy.exceptions:
        if exempt.limit not in names or not exempt.reason.strip():
            raise InputError(
                f"{where}: exceptions: {exempt.limit!r} for {exempt.candidate}: name one of the limits "
                f"({', '.join(names)}) and give a reason"
            )


def _check_limit(limit: Limit, where: str) -> None:
    hints = HINTS.get(limit.kind)
    if hints is None or "candidate" not in hints:
        kinds = ", ".join(kind for kind, names in HINTS.items() if "candidate" in names)
        raise InputError(f"{where}: figure {limit.figure!r}: no such kind of record; known are {kinds}")
    numbers = [name for name, hint in hints.items() if {int, float} & {hint, *get_args(hint)}]
    if limit.value not in numbers:
        raise InputError(f"{where}: figure {limit.figure!r}: a {limit.kind} record has {', '.join(numbers)}")
    for key in limit.where:
        if hints.get(key) is not str:
            texts = ", ".join(name for name, hint in hints.items() if hint is str)
            raise InputError(f"{where}: {key!r} selects nothing: a {limit.kind} record has {texts}")
    if (limit.at_most is None) == (limit.at_least is None):
        raise InputError(f"{where}: give at_most or at_least, one of them")
    if limit.breach not in (ANOMALOUS, INCONCLUSIVE):
        raise InputError(f"{where}: breach is {limit.breach!r}: {INCONCLUSIVE} or {ANOMALOUS} is right")
