"""Rows that the format tests share."""

import pytest
import torch
from torch import Tensor

Row = tuple[Tensor, Tensor]


@pytest.fixture
def rows() -> Row:
    """37 tokens, bf16-valued, of magnitudes from 1e-4 to 1e3, the rope's to 1e2: latent [37, 512], rope [37, 64].

    No rope exceeds e4m3's 448, since nvfp4_ds_mla stores it without a scale.
    """
    generator = torch.Generator().manual_seed(11)
    magnitude = torch.logspace(-4, 3, 37)[:, None]
    latent = torch.randn(37, 512, generator=generator) * magnitude
    rope = torch.randn(37, 64, generator=generator) * magnitude.clamp(max=100)
    return latent.bfloat16().float(), rope.bfloat16().float()
