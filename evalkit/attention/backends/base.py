"""What a backend is: it reads rows of one format and attends to the selected ones."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from evalkit.attention.backends.readers import BF16Reader, Reader
from evalkit.errors import InputError
from evalkit.kv import RowFormat, Scales
from evalkit.registry import Registry


class Backend(Reader, ABC):
    """Reads a paged cache and computes softmax attention over each query's selected rows.

    A backend never falls back to another: where it cannot run, `unavailable_because` says why.
    """

    name: str
    kernel: str
    takes_float32: bool = False  # whether queries may be wider than bf16, as a model on a CPU computes them

    def kernel_on(self, device: torch.device) -> str:
        """What runs there, for records; where that only models another GPU's kernel, this begins with "modelled"."""
        return self.kernel

    @abstractmethod
    def attend(
        self,
        q_latent: Tensor,
        q_rope: Tensor,
        cache: Tensor,
        format: RowFormat,
        indices: Tensor,
        sm_scale: float,
        scales: Scales,
    ) -> tuple[Tensor, Tensor]:
        """Attend over the selected rows.

        Args:
            q_latent: [T, H, C] queries in latent space, in the model's dtype.
            q_rope: [T, H, R], interleaved like the stored rope.
            cache: uint8 pages made by `format.allocate`.
            indices: [T, K] int32 slots, -1 where a query has fewer than K.
            sm_scale: softmax scale, (nope + rope)^-0.5 times YaRN's mscale².
            scales: this layer's per-tensor scales.

        Returns:
            out [T, H, C] in the queries' dtype and lse [T, H] float32, natural log. A row without a valid slot
            gives exactly 0 and -inf.
        """

    @abstractmethod
    def unavailable_because(
        self, format: RowFormat, device: torch.device, heads: int, topk: int
    ) -> str | None:
        """Why this backend cannot read `format` here, in one line, or None where it can."""

    def reading_as(self, reader: str) -> Backend:
        """This backend on rows read as `reader`, a name in `READERS`.

        Raises:
            InputError: it reads rows in its own way only.
        """
        if reader != "exact":
            raise InputError(
                f"reader={reader} is for the backend reference: {self.name} reads as its kernel does"
            )
        return self

    def steady(self, full: bool) -> Backend | None:
        """This backend for calls that can be recorded in a CUDA graph: none waits for the device. None where it does.

        full: whether every query of these calls has a valid slot in every column of `indices`.
        """
        return None

    def splitting(self) -> Backend | None:
        """This backend with the keys of a bf16 query split over processors, as its kernel would in a server.

        None where its bf16 kernel never splits them. A split changes the order of the sums, and with it the result,
        by which queries share a call: that is why backends avoid it.
        """
        return None


class BF16Operands(BF16Reader, Backend):
    """A kernel that dequantises to bf16: it multiplies by the scale rounded to bf16, then rounds the product."""


backends: Registry[Backend] = Registry("backend")
