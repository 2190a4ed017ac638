"""What a candidate attends to, against what the reference attends to.

A selection is [T, K] int64 columns of the key axis, -1 where a token has fewer keys than K.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

# Float32 values of gathered rows that may live at once.
GATHER_VALUES: Final = {"cpu": 1 << 24, "cuda": 1 << 27}


@dataclass(frozen=True, kw_only=True)
class SelectionFigures:
    """Over tokens. `recall`: share of the reference's keys that the candidate selected as well.

    `margin_p50`: median distance between the last score selected and the first one not, in standard
    deviations of the token's scores; None where every token selects all it can see. `mass_lost_mean`: the
    reference's attention on keys that the candidate dropped, mean over heads and tokens; None where it was
    not measured. `n`: tokens.
    """

    recall_mean: float
    recall_min: float
    margin_p50: float | None
    mass_lost_mean: float | None
    n: int


def recall(got: Tensor, ref: Tensor) -> Tensor:
    """Share of the reference's keys among the candidate's, per token: got [T, K'], ref [T, K] -> [T] float64.

    Raises:
        ValueError: the token counts differ, or the reference selects nothing for some token.
    """
    shared = kept(got, ref)
    wanted = (ref >= 0).sum(1)
    if not bool((wanted > 0).all()):
        token = int((wanted == 0).nonzero()[0])
        raise ValueError(f"the reference selects no key for token {token}: recall is undefined")
    return shared.sum(1).double() / wanted


def kept(got: Tensor, ref: Tensor) -> Tensor:
    """Which of the reference's keys the candidate selected too: got [T, K'], ref [T, K] -> bool [T, K]."""
    if got.dim() != 2 or ref.dim() != 2 or len(got) != len(ref) or ref.numel() == 0:
        raise ValueError(
            f"selections [T, K] of the same tokens needed: got {list(got.shape)}, ref {list(ref.shape)}"
        )
    columns = int(max(got.max() if got.numel() else -1, ref.max())) + 1
    member = torch.zeros(len(ref), columns + 1, dtype=torch.bool, device=ref.device)
    member.scatter_(1, torch.where(got >= 0, got, columns).long(), True)  # pads land in a column nobody reads
    return member.gather(1, ref.clamp(min=0).long()) & (ref >= 0)


def margin(scores: Tensor, topk: int) -> Tensor:
    """Distance from the k-th to the next score, in standard deviations of the token's scores.

    Args:
        scores: [T, S], -inf where a key is not visible.
        topk: keys selected.

    Returns:
        [M] float32, one for each token that sees more than `topk` keys with unequal scores.
    """
    visible = torch.isfinite(scores)
    scores, visible = (t[visible.sum(1) > topk] for t in (scores, visible))
    if len(scores) == 0:
        return scores.new_zeros(0, dtype=torch.float32)
    top = scores.topk(topk + 1, dim=1).values
    count = visible.sum(1, keepdim=True)
    centred = torch.where(visible, scores, 0.0)
    centred = torch.where(visible, scores - centred.sum(1, keepdim=True) / count, 0.0)
    spread = (centred.square().sum(1) / count[:, 0]).sqrt()
    gap = (top[:, -2] - top[:, -1]).float()
    return gap[spread > 0] / spread[spread > 0].float()


def mass_lost(
    q_latent: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    rope: Tensor,
    selection: Tensor,
    lost: Tensor,
    lse: Tensor,
    sm_scale: float,
) -> Tensor:
    """The reference's attention on keys that a candidate dropped: [T] float32, mean over heads, in [0, 1].

    Args:
        q_latent, q_rope: [T, H, C], [T, H, R], the reference's queries.
        latent, rope: [S, C], [S, R], the reference's rows, by column.
        selection: [T, K] the reference's columns. lost: bool [T, K], the dropped ones among them.
        lse: [T, H] the reference's log-sum-exp, natural log. sm_scale: the softmax scale.
    """
    mass = torch.zeros(len(selection), device=lse.device)
    touched = lost.any(1).nonzero()[:, 0]
    if len(touched) == 0:
        return mass
    width = int(lost.sum(1).max())  # pack the lost keys to the left, so that few are gathered
    order = lost.int().argsort(dim=1, descending=True, stable=True)[:, :width]
    columns, lost = selection.gather(1, order).clamp(min=0), lost.gather(1, order)
    rows = torch.cat([latent, rope], 1).float()  # [S, C + R]
    step = max(1, GATHER_VALUES[rows.device.type] // (width * rows.shape[1]))
    for part in touched.split(step):
        queries = torch.cat([q_latent[part], q_rope[part]], -1).float()  # [t, H, C + R]
        scores = torch.einsum("thc,tkc->thk", queries, rows[columns[part]]) * sm_scale
        weights = (scores - lse[part][:, :, None].float()).exp()
        mass[part] = (weights * lost[part][:, None]).sum(-1).mean(-1)
    return mass


@dataclass
class SelectionAccumulator:
    """Adds tokens of one layer; keeps one number a token until `result`."""

    recalls: list[Tensor] = field(default_factory=list)
    margins: list[Tensor] = field(default_factory=list)
    masses: list[Tensor] = field(default_factory=list)

    def add(self, recalls: Tensor, margins: Tensor | None = None, masses: Tensor | None = None) -> None:
        """Add [T] recalls, and, where measured, margins and lost masses of the same chunk (of any length)."""
        for store, values in ((self.recalls, recalls), (self.margins, margins), (self.masses, masses)):
            if values is not None and len(values):
                store.append(values.double().cpu())

    def result(self) -> SelectionFigures:
        """The figures of all tokens added.

        Raises:
            ValueError: nothing was added.
        """
        if not self.recalls:
            raise ValueError("no selection was compared: no token was added")
        recalls = torch.cat(self.recalls)
        return SelectionFigures(
            recall_mean=float(recalls.mean()),
            recall_min=float(recalls.min()),
            margin_p50=float(torch.cat(self.margins).median()) if self.margins else None,
            mass_lost_mean=float(torch.cat(self.masses).mean()) if self.masses else None,
            n=len(recalls),
        )
