"""Kullback-Leibler divergence of the candidate's next-token distribution from the reference's, in nats.

Beside it what it does not tell: how often the likeliest token changes (volume), whom the text then bears out
(direction), and what became of the probability of the token that does follow. Memory is O(vocabulary) and a few
numbers a token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

import numpy as np
import torch
from torch import Tensor

from evalkit.stats.means import bootstrap_mean

CHUNK_VALUES: Final = {"cpu": 1 << 22, "cuda": 1 << 26}  # logits that are float64 at once
WORST: Final = 5  # tokens kept with their distributions
TOP: Final = 5
P999_DOCUMENTS, P999_TOKENS = 100, 25_000  # below, the 99.9 percentile is a few tokens of a few documents
CONFIDENCE: Final = (0.0, 0.5, 0.9, 0.99, 1.0)  # edges over the reference's top-1 probability


@dataclass(frozen=True, kw_only=True)
class TokenFigures:
    """KL(reference || candidate) over tokens, percentiles interpolated linearly.

    Mean, percentiles and maximum are None as soon as one token's is not finite: a distribution with a NaN in it has
    no mean. `kl_p999_nats` needs 100 documents and 25,000 tokens; the mean's 95 % interval, a studentised bootstrap
    over `documents`, 40 of them: else `interval_method` says why there is none.
    `top1_agreement`: share of tokens whose likeliest next token is the reference's. Of the `disagreed` others, those
    with a known successor that the reference, or the candidate, names. `delta_p`: candidate's probability of the
    successor minus the reference's, over `targets` tokens. `n`: tokens.
    """

    kl_mean_nats: float | None
    kl_p50_nats: float | None
    kl_p90_nats: float | None
    kl_p99_nats: float | None
    kl_p999_nats: float | None
    kl_max_nats: float | None
    kl_mean_lower_nats: float | None
    kl_mean_upper_nats: float | None
    interval_method: str
    documents: int
    top1_agreement: float
    disagreed: int
    reference_right: int
    candidate_right: int
    delta_p_mean: float | None
    delta_p_rms: float | None
    targets: int
    n: int


@dataclass(frozen=True, kw_only=True)
class ConfidenceFigures:
    """The tokens whose reference top-1 probability lies in [from_p, to_p), the last bin including 1."""

    from_p: float
    to_p: float
    kl_mean_nats: float | None
    disagreed_share: float | None
    n: int


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where logits [T, V] come from: their document, the position of the first, and each one's successor.

    targets: [T] int64 token ids, -1 where the document ends.
    """

    document: int
    start: int
    targets: Tensor


@dataclass(frozen=True, kw_only=True)
class WorstToken:
    """One token with its KL divergence and the `TOP` likeliest successors by either distribution."""

    kl_nats: float
    document: int
    position: int
    target: int
    reference: list[tuple[int, float]]
    candidate: list[tuple[int, float]]


def kl_nats(got: Tensor, ref: Tensor) -> Tensor:
    """KL(ref || got) of logits [T, V] -> [T] float64, in nats. Holds a few float64 copies of [T, V]."""
    return _kl(got.double().log_softmax(-1), ref.double().log_softmax(-1))


def _kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    p = log_p.exp()
    kl = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)  # 0 log 0 is 0, also for a masked token
    return kl.clamp(min=0)  # rounding alone takes it below


@dataclass
class TokenAccumulator:
    """Adds logits chunk by chunk; keeps a few numbers a token, and float64 of `CHUNK_VALUES` logits at once."""

    kept: dict[str, list[Tensor]] = field(default_factory=dict)  # by figure, [t] of each chunk
    worst: list[WorstToken] = field(default_factory=list)
    n: int = 0

    def add(self, got: Tensor, ref: Tensor, place: Place | None = None) -> None:
        """Add logits [T, V] of the same tokens; without a `place`, of a document of their own without successors.

        Raises:
            ValueError: shapes differ, or there is no token.
        """
        if got.shape != ref.shape or ref.dim() != 2 or ref.numel() == 0:
            raise ValueError(
                f"logits [T, V] of the same tokens needed: got {list(got.shape)}, ref {list(ref.shape)}"
            )
        if place is None:
            document = 1 + max((int(part.max()) for part in self.kept.get("document", [])), default=-1)
            place = Place(document=document, start=0, targets=torch.full((len(ref),), -1))
        targets = place.targets.to(ref.device)
        step = max(1, CHUNK_VALUES[ref.device.type] // ref.shape[1])
        for start in range(0, len(ref), step):
            part = slice(start, start + step)
            self._add(
                got[part].detach(), ref[part].detach(), place.document, place.start + start, targets[part]
            )
        self.n += len(ref)

    def _add(self, got: Tensor, ref: Tensor, document: int, start: int, targets: Tensor) -> None:
        log_q, log_p = got.double().log_softmax(-1), ref.double().log_softmax(-1)
        kl = _kl(log_q, log_p)
        # A NaN would win every argmax: such a token agrees with nothing.
        first_q, first_p = got.argmax(-1), ref.argmax(-1)
        agreed = (first_q == first_p) & torch.isfinite(kl)
        known = targets >= 0
        at = targets.clamp(min=0)[:, None]
        change = (log_q.gather(1, at).exp() - log_p.gather(1, at).exp())[:, 0]
        figures = {
            "kl": kl,
            "document": torch.full_like(targets, document),
            "position": start + torch.arange(len(ref), device=ref.device),
            "confidence": log_p.max(-1).values.exp(),
            "agreed": agreed,
            "reference_right": known & ~agreed & (first_p == targets),
            "candidate_right": known & ~agreed & (first_q == targets),
            "delta_p": torch.where(known, change, torch.nan),
            "known": known,
        }
        for name, values in figures.items():
            self.kept.setdefault(name, []).append(values.cpu())
        ranked = torch.where(torch.isfinite(kl), kl, -1.0)
        for number in ranked.topk(min(WORST, len(ranked))).indices.tolist():
            size = float(ranked[number])
            if size > 0 and (len(self.worst) < WORST or size > self.worst[-1].kl_nats):
                found = WorstToken(
                    kl_nats=size,
                    document=document,
                    position=start + number,
                    target=int(targets[number]),
                    reference=_top(log_p[number]),
                    candidate=_top(log_q[number]),
                )
                self.worst = sorted([*self.worst, found], key=lambda one: -one.kl_nats)[:WORST]

    def all(self, name: str) -> Tensor:
        """One figure of every token added, [N], in their order."""
        return torch.cat(self.kept[name])

    def by_document(self, name: str) -> list[Tensor]:
        """The same, document by document."""
        values, documents = self.all(name), self.all("document")
        return [values[documents == one] for one in documents.unique()]

    def result(self) -> TokenFigures:
        """The figures of all tokens added.

        Raises:
            ValueError: nothing was added.
        """
        if not self.kept:
            raise ValueError("no logits were compared: no token was added")
        values, known = self.all("kl"), self.all("known")
        documents = len(self.all("document").unique())
        figures: list[float | None] = [None] * 6
        lower, upper, method = None, None, "none (a token's divergence is not finite)"
        if bool(torch.isfinite(values).all()):
            quantiles: list[float | None] = np.quantile(values.numpy(), [0.5, 0.9, 0.99, 0.999]).tolist()
            if documents < P999_DOCUMENTS or self.n < P999_TOKENS:
                quantiles[-1] = None
            figures = [float(values.mean()), *quantiles, float(values.max())]
            lower, upper, method = self._interval(documents)
        change = self.all("delta_p")[known]
        if not len(change) or not bool(torch.isfinite(change).all()):
            change = change[:0]
        disagreed = self.n - int(self.all("agreed").sum())
        return TokenFigures(
            kl_mean_nats=figures[0],
            kl_p50_nats=figures[1],
            kl_p90_nats=figures[2],
            kl_p99_nats=figures[3],
            kl_p999_nats=figures[4],
            kl_max_nats=figures[5],
            kl_mean_lower_nats=lower,
            kl_mean_upper_nats=upper,
            interval_method=method,
            documents=documents,
            top1_agreement=1 - disagreed / self.n,
            disagreed=disagreed,
            reference_right=int(self.all("reference_right").sum()),
            candidate_right=int(self.all("candidate_right").sum()),
            delta_p_mean=float(change.mean()) if len(change) else None,
            delta_p_rms=float(change.square().mean().sqrt()) if len(change) else None,
            targets=int(known.sum()),
            n=self.n,
        )

    def _interval(self, documents: int) -> tuple[float | None, float | None, str]:
        """Of the mean over tokens: documents are drawn, each with the weight of its tokens.

        That lengths differ widens it: it covers more than it says, where the ratio's own would cover less.
        """
        sums = torch.stack([part.sum() for part in self.by_document("kl")]) * (documents / self.n)
        found = bootstrap_mean(sums.numpy())
        if found is None:
            return None, None, f"none ({documents} documents, 40 are needed, 10 of them apart)"
        interval = found.interval()
        return max(0.0, interval.lower), interval.upper, f"studentised bootstrap, {documents} documents"

    def by_confidence(self) -> list[ConfidenceFigures]:
        """Divergence and disagreement by how sure the reference is."""
        confidence, values, agreed = (self.all(name) for name in ("confidence", "kl", "agreed"))
        found = []
        for low, high in pairwise(CONFIDENCE):
            here = (confidence >= low) & ((confidence < high) | (high == 1.0))
            n, mine = int(here.sum()), values[here]
            whole = n > 0 and bool(torch.isfinite(mine).all())
            found.append(
                ConfidenceFigures(
                    from_p=low,
                    to_p=high,
                    kl_mean_nats=float(mine.mean()) if whole else None,
                    disagreed_share=float((~agreed[here]).double().mean()) if n else None,
                    n=n,
                )
            )
        return found


def _top(log_p: Tensor) -> list[tuple[int, float]]:
    """The likeliest tokens with their probabilities."""
    best = log_p.topk(min(TOP, len(log_p)))
    return list(zip(best.indices.tolist(), best.values.exp().tolist(), strict=True))
