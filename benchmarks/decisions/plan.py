"""What is fixed before anything is scored: documents, seeds and doses, in a TOML file that is committed."""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from evalkit.errors import InputError
from evalkit.gate.policy import Policy
from evalkit.gate.policy import load as load_policy
from evalkit.gate.strict import build

FEWEST_DOCUMENTS = 20_000  # of every dose, so that its true loss is known
FEWEST_SEEDS = 20
# Seeds are kept apart, so that no document is met in two stages.
FIRST_SEED = {"scoring": 15_001, "formats": 5_001, "pilot": 10_001, "titration": 20_001}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The experiment's sizes.

    policy: its path from the repository's root.
    documents: of one sample, which one verdict is about; planned from `discordance` for the policy's power.
    seeds: samples, of documents of their own.
    controls: how many of these samples the controls are.
    noise: doses of planted damage, 0 first; `expected_loss` is what the titration found for them.
    """

    policy: str
    discordance: float
    documents: int
    seeds: int
    controls: int
    noise: tuple[float, ...]
    expected_loss: tuple[float, ...]
    batch_size: int

    @property
    def all_seeds(self) -> range:
        return range(FIRST_SEED["scoring"], FIRST_SEED["scoring"] + self.seeds)

    @property
    def control_seeds(self) -> range:
        return self.all_seeds[: self.controls]


def load(path: Path) -> Plan:
    """Read a plan.

    Raises:
        InputError: the file cannot be read, or holds other keys or values than a plan has.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"no plan at {path}: {error.strerror}; the stage `plan` writes one") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path} is not TOML: {error}") from None
    plan = build(Plan, raw, str(path))
    if len(plan.noise) != len(plan.expected_loss) or not plan.noise or plan.noise[0] != 0:
        raise InputError(f"{path}: noise and expected_loss are equally long, and begin with dose 0")
    if len(set(plan.noise)) < len(plan.noise) or min(plan.noise) < 0:
        raise InputError(f"{path}: noise {list(plan.noise)}: doses differ and are not negative")
    if not 1 <= plan.controls <= plan.seeds or plan.documents < 2 or plan.batch_size < 1:
        raise InputError(f"{path}: want 1 <= controls <= seeds, 2 documents and a batch of 1 at least")
    return plan


def write(path: Path, plan: Plan) -> None:
    """Write a plan as `load` reads it."""
    lines = [
        "# Written by `python -m benchmarks.decisions plan` from the pilot and the titration. Commit it, and the policy,",
        "# before the stages controls and doses.",
        *_toml(plan),
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _toml(plan: Plan) -> Iterator[str]:
    for name, value in vars(plan).items():
        if isinstance(value, tuple):
            yield f"{name} = [{', '.join(f'{x:.6g}' for x in map(float, value))}]".replace("[0,", "[0.0,")
        else:
            yield f'{name} = "{value}"' if isinstance(value, str) else f"{name} = {value:.6g}"


def sha256(path: Path) -> str:
    """Of the file as it stands."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def policy_of(plan: Plan, root: Path) -> Policy:
    """The policy a plan is for, which must ask for one candidate on one endpoint.

    Raises:
        InputError: it asks for more, or the plan has no dose of the size that the policy plants.
    """
    return single(load_policy(root / plan.policy), plan.policy)


def single(policy: Policy, where: str) -> Policy:
    """The policy itself.

    Raises:
        InputError: it has several candidates, baselines or endpoints, where an experiment judges one of each.
    """
    if not len(policy.decide) == len(policy.baselines) == len(policy.endpoints) == 1:
        raise InputError(f"{where}: the experiment judges one candidate by one endpoint against one baseline")
    return policy


def plant(path: Path, noise: float) -> None:
    """Put the size of the planted damage into a policy's file, whose other lines stay.

    Raises:
        InputError: the file has no line for it.
    """
    text, count = re.subn(r"(?m)^noise = [0-9.e-]+", f"noise = {noise:.3g}", path.read_text(encoding="utf-8"))
    if count != 1:
        raise InputError(f"{path} has {count} lines `noise = …`: one is right")
    path.write_text(text, encoding="utf-8")
