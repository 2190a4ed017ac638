"""What a policy's keys allow one by one and all of them together do not."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING

from evalkit.candidate import Candidate
from evalkit.errors import InputError
from evalkit.gate.words import Verdict
from evalkit.schema import HINTS

if TYPE_CHECKING:
    from evalkit.gate.policy import Limit, Policy

BREACHES = (Verdict.INCONCLUSIVE.value, Verdict.ANOMALOUS.value)
# What a limit can be on: numbers of records that are about a candidate, but of samples, which lie elsewhere.
NUMBERS = {
    kind: numbers
    for kind, hints in HINTS.items()
    if hints.get("candidate") is str
    and kind != "sample"
    and (numbers := [name for name, hint in hints.items() if hint in (int, float, int | None, float | None)])
}

FLOORS = ("floor:kernel", "floor:split", "floor:batch", "floor:noise", "floor:start")
# Every word that records may hold in these fields.
WORDS = {
    "mode": ("isolated", "propagated"),
    "phase": (
        "prefill", "decode", "cached_prefix", "second_turn", "chunked_prefill", "text", "prompt", "response",
    ),
    "probe": (
        "latent", "rope", "index_scores", "selection", "attention", "values", "output", "routing", "hidden", "logits", "kl",
    ),
    "rung": ("format", "kernel", "total", *FLOORS),
    "floor": FLOORS,
    "frozen": ("none", "selection+routing"),
}  # fmt: skip


def refuse_contradictions(policy: Policy, where: str) -> None:
    """Refuse a policy that nothing could be shown by; `where` begins the message.

    Raises:
        InputError: it judges nothing, a candidate by itself or one that is none, assumes a loss that cannot be shown to
            be below a margin, leaves damage no room, or limits a figure that no record has.
    """
    names = [limit.name for limit in policy.limits]
    refused = {
        "decide, baselines and endpoints: name at least one of each": not (
            policy.decide and policy.baselines and policy.endpoints
        ),
        "limits: two have one name": len(set(names)) < len(names),
        "endpoints: one is named twice": len({str(e) for e in policy.endpoints}) < len(policy.endpoints),
    }
    for what, wrong in refused.items():
        if wrong:
            raise InputError(f"{where}: {what}")
    _check_candidates(policy, where)
    for endpoint in policy.endpoints:
        if not policy.true_loss < endpoint.margin:
            raise InputError(
                f"{where}: true_loss is {policy.true_loss:g}: less than the margin of {endpoint}, {endpoint.margin:g}, is "
                "right: no number of documents shows that such a loss is below it"
            )
        # Sensitivity is to be shown for damage of twice the margin.
        if not policy.damage.loss_at_most > 2 * endpoint.margin:
            raise InputError(
                f"{where}: damage: loss_at_most is {policy.damage.loss_at_most:g}, which leaves no room for twice the "
                f"margin of {endpoint}: more than {2 * endpoint.margin:g} is right"
            )
    for number, exempt in enumerate(policy.exceptions):
        if exempt.limit not in names:
            raise InputError(
                f"{where}: exceptions[{number}]: limit is {exempt.limit!r}: one of the limits is right: "
                f"{', '.join(names) or 'there is none'}"
            )
    for number, limit in enumerate(policy.limits):
        _check_limit(limit, f"{where}: limits[{number}] ({limit.name})")


def _check_candidates(policy: Policy, where: str) -> None:
    """Each is one, and none is judged twice or against itself, as far as words tell: a run knows what they resolve to."""
    named = {
        "decide": policy.decide,
        "baselines": policy.baselines,
        "exceptions": tuple(exempt.candidate for exempt in policy.exceptions),
    }
    parsed: dict[str, list[Candidate]] = {}
    for key, texts in named.items():
        parsed[key] = []
        for number, text in enumerate(texts):
            try:
                candidate = Candidate.parse(text)
            except InputError as error:
                raise InputError(f"{where}: {key}[{number}]: {error}") from None
            if key != "exceptions" and candidate in parsed[key]:
                raise InputError(
                    f"{where}: {key}[{number}] is {text!r}, which is named before: once is right"
                )
            parsed[key].append(candidate)
    for number, candidate in enumerate(parsed["baselines"]):
        if candidate in parsed["decide"]:
            raise InputError(
                f"{where}: baselines[{number}] is {policy.baselines[number]!r}, which is in decide too: nothing is lost "
                "against itself, so another candidate is right"
            )


def _check_limit(limit: Limit, where: str) -> None:
    numbers = NUMBERS.get(limit.kind)
    if numbers is None:
        raise InputError(
            f"{where}: figure is {limit.figure!r}: no such kind of record; known are {', '.join(NUMBERS)}"
        )
    if limit.value not in numbers:
        raise InputError(
            f"{where}: figure is {limit.figure!r}: a {limit.kind} record has {', '.join(numbers)}"
        )
    hints = HINTS[limit.kind]
    for key, word in limit.where.items():
        if key == "candidate":
            raise InputError(f"{where}: where: candidate is always the one that is judged: leave it out")
        if hints.get(key) is not str:
            texts = ", ".join(name for name, hint in hints.items() if hint is str and name != "candidate")
            raise InputError(f"{where}: where: {key!r} selects nothing: a {limit.kind} record has {texts}")
        if key in WORDS and word not in WORDS[key]:
            close = get_close_matches(word, WORDS[key], 1)
            meant = f", did you mean {close[0]}?" if close else ""
            raise InputError(f"{where}: where: {key} is {word!r}{meant}; there are {', '.join(WORDS[key])}")
    if (limit.at_most is None) == (limit.at_least is None):
        raise InputError(f"{where}: give at_most or at_least, one of them")
    if limit.breach not in BREACHES:
        raise InputError(f"{where}: breach is {limit.breach!r}: {' or '.join(BREACHES)} is right")
