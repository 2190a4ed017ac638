"""Muon agrees with torch's, and a stack of matrices is stepped as its members are."""

import torch
from torch import nn

from evalkit.train.optimizer import Muon


def steps(optimizer, parameters, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def matrices():
    generator = torch.Generator().manual_seed(5)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((32, 48), (64, 16), (32, 48))]


def test_muon_agrees_with_torch():
    mine, theirs, start = matrices(), matrices(), matrices()
    steps(Muon(mine, lr=0.1), mine)
    steps(torch.optim.Muon(theirs, lr=0.1, adjust_lr_fn="match_rms_adamw", weight_decay=0), theirs)
    for got, ref, before in zip(mine, theirs, start, strict=True):
        assert (got - ref).norm() <= 0.03 * (ref - before).norm()


def test_a_stack_is_stepped_as_its_matrices_are():
    apart = [parameter for parameter in matrices() if parameter.shape == (32, 48)]
    stack = nn.Parameter(torch.stack([parameter.detach() for parameter in apart]))
    gradients = torch.randn(2, 32, 48, generator=torch.Generator().manual_seed(1))
    stack.grad = gradients
    for parameter, gradient in zip(apart, gradients, strict=True):
        parameter.grad = gradient
    Muon(apart, lr=0.1).step()
    Muon([stack], lr=0.1).step()
    torch.testing.assert_close(stack.detach(), torch.stack([parameter.detach() for parameter in apart]))
