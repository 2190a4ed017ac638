"""Kullback-Leibler divergence of the candidate's next-token distribution from the reference's, in nats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

CHUNK_VALUES: Final = 1 << 22  # logits that are float64 at once


@dataclass(frozen=True, kw_only=True)
class TokenFigures:
    """KL(reference || candidate) over tokens, percentiles interpolated linearly.

    All five are None as soon as one token's is not finite: a distribution with a NaN in it has no mean.
    `top1_agreement`: share of tokens whose likeliest next token is the reference's. `n`: tokens.
    """

    kl_mean_nats: float | None
    kl_p50_nats: float | None
    kl_p90_nats: float | None
    kl_p99_nats: float | None
    kl_max_nats: float | None
    top1_agreement: float
    n: int


def kl_nats(got: Tensor, ref: Tensor) -> Tensor:
    """KL(ref || got) of logits [T, V] -> [T] float64, in nats. Holds a few float64 copies of [T, V]."""
    log_p, log_q = ref.double().log_softmax(-1), got.double().log_softmax(-1)
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)  # 0 log 0 is 0, also for a masked token


class TokenAccumulator:
    """Adds logits chunk by chunk; keeps one number a token, and float64 of `CHUNK_VALUES` logits at once."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []
        self.agreed = self.n = 0

    def add(self, got: Tensor, ref: Tensor) -> None:
        """Add logits [T, V] of the same tokens.

        Raises:
            ValueError: shapes differ, or there is no token.
        """
        if got.shape != ref.shape or ref.dim() != 2 or ref.numel() == 0:
            raise ValueError(
                f"logits [T, V] of the same tokens needed: got {list(got.shape)}, ref {list(ref.shape)}"
            )
        step = max(1, CHUNK_VALUES // ref.shape[1])
        for got_part, ref_part in zip(got.detach().split(step), ref.detach().split(step), strict=True):
            self.values.append(kl_nats(got_part, ref_part).cpu())
            self.agreed += int((got_part.argmax(-1) == ref_part.argmax(-1)).sum())
        self.n += len(ref)

    def result(self) -> TokenFigures:
        """The figures of all tokens added.

        Raises:
            ValueError: nothing was added.
        """
        if not self.values:
            raise ValueError("no logits were compared: no token was added")
        values = torch.cat(self.values)
        figures: list[float | None] = [None] * 5
        if bool(torch.isfinite(values).all()):
            quantiles = values.quantile(torch.tensor([0.5, 0.9, 0.99], dtype=torch.float64)).tolist()
            figures = [float(values.mean()), *quantiles, float(values.max())]
        return TokenFigures(
            kl_mean_nats=figures[0],
            kl_p50_nats=figures[1],
            kl_p90_nats=figures[2],
            kl_p99_nats=figures[3],
            kl_max_nats=figures[4],
            top1_agreement=self.agreed / self.n,
            n=self.n,
        )
