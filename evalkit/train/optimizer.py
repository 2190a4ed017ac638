"""Muon for matrices, batched over layers and experts, and AdamW for everything else.

Muon agrees with `torch.optim.Muon(adjust_lr_fn="match_rms_adamw", weight_decay=0)`, which takes two-dimensional
parameters one by one only. A three-dimensional parameter is a stack of matrices, one per expert.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from evalkit.train.model import Nano

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(update: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz towards the nearest semi-orthogonal matrix, [N, rows, columns]."""
    a, b, c = _COEFFICIENTS
    # Products in bf16 suffice, but a CPU is slower at them.
    x = update.bfloat16() if update.is_cuda else update.float()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(list(parameters), {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape[-2], parameter.shape[-1]].append(parameter)
            for shape, parameters in by_shape.items():
                self._step_shape(shape, parameters, group["lr"], group["momentum"])

    def _step_shape(
        self, shape: tuple[int, int], parameters: list[nn.Parameter], lr: float, momentum: float
    ) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        buffers = []
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            buffers.append(state["momentum"])
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        updates = torch._foreach_lerp(gradients, buffers, momentum)
        stacked = orthogonalise(torch.cat([update.reshape(-1, *shape) for update in updates]))
        scaled = stacked.float() * (-lr * 0.2 * max(shape) ** 0.5)
        parts = scaled.split([parameter.numel() // (shape[0] * shape[1]) for parameter in parameters])
        torch._foreach_add_(
            list(parameters), [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]
        )


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    apart = ("embed_tokens", "lm_head", ".gate.weight")
    return parameter.dim() >= 2 and not any(part in name for part in apart)


class Optimizers:
    """The optimizers of one phase: `dense` (all but indexers), `indexer` (them alone) or `joint` (both)."""

    def __init__(self, model: Nano, phase: str, *, muon_lr: float, adam_lr: float, indexer_lr: float) -> None:
        matrices, others, indexer = [], [], []
        for name, parameter in model.named_parameters():
            if ".indexer." in name:
                indexer.append(parameter)
            elif _is_matrix(name, parameter):
                matrices.append(parameter)
            else:
                others.append(parameter)
        fused = matrices[0].is_cuda
        self.all: list[torch.optim.Optimizer] = []
        if phase != "indexer":
            self.all.append(Muon(matrices, muon_lr))
            self.all.append(
                torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=fused)
            )
        if phase != "dense":
            self.all.append(
                torch.optim.AdamW(indexer, lr=indexer_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=fused)
            )
        trained = {
            id(p) for optimizer in self.all for group in optimizer.param_groups for p in group["params"]
        }
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        self.base = [optimizer.param_groups[0]["lr"] for optimizer in self.all]
        self.parameters = [p for p in model.parameters() if p.requires_grad]

    def step(self, scale: float) -> None:
        """One clipped step at `scale` times each optimizer's learning rate."""
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer, lr in zip(self.all, self.base, strict=True):
            optimizer.param_groups[0]["lr"] = lr * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, object]]:
        return [optimizer.state_dict() for optimizer in self.all]

    def load_state_dict(self, states: list[dict[str, object]]) -> None:
        for optimizer, state in zip(self.all, states, strict=True):
            optimizer.load_state_dict(state)
