"""The numerics of vLLM's sparse MLA on SM100 (FLASHINFER_MLA_SPARSE) on any GPU and on a CPU; on SM100 that kernel.

Known, from vLLM and from the kernel's interface: fp8_e4m3 rows are multiplied as codes with a query of e4m3 codes,
quantised per tensor with `Scales.query`; the scores' scale is sm_scale · q_scale · k_scale, the output's k_scale, one
for latent and rope. On bf16 rows query and P are bf16. `Scales.prob` is no argument of the kernel and is not used.

Modelled, since the kernel is a binary: P is rounded in tiles of 128 keys, relative to the largest score so far, after
a multiplication by 448, and its row sum is taken before that, in float32. So do it the Blackwell MLA kernels that
FlashInfer 0.7.2 has in source (prims_ts; the one in CuTe DSL leaves out the 448). Not modelled: keys split over
several blocks, the fast exponential's last bits, and the order and width of the sums within a matrix product.
None of it has been compared with an SM100 GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from evalkit.attention.backends.base import Backend, backends
from evalkit.attention.backends.sm100 import arithmetic, trtllm
from evalkit.attention.backends.sm100.arithmetic import ProbModel
from evalkit.environment import has_triton
from evalkit.kv import RowFormat, Scales

READS = ("bf16", "fp8_e4m3")


@backends.register
class Emulated(Backend):
    name = "emulated"
    takes_float32 = True

    def __init__(self, prob: ProbModel | None = None) -> None:
        self.prob = prob or ProbModel()
        self.kernel = (
            f"modelled: SM100 sparse MLA, query and P in the rows' dtype, fp8 P x {self.prob.scale:g} "
            f"in tiles of {self.prob.tile} keys"
        )

    def kernel_on(self, device: torch.device) -> str:
        """The real kernel's name on SM100, else what is modelled and by what."""
        if trtllm.runs_on(device):
            return trtllm.KERNEL
        return f"{self.kernel}, in {'Triton' if device.type == 'cuda' else 'torch'}"

    def unavailable_because(
        self, format: RowFormat, device: torch.device, heads: int, topk: int
    ) -> str | None:
        if format.name not in READS:
            return f"the SM100 kernel reads {', '.join(READS)}, not {format.name}"
        if trtllm.runs_on(device):
            return trtllm.unavailable_because(heads)
        if device.type == "cuda" and not has_triton():
            return "the package triton is not installed (pip install triton)"
        return None

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
        given = arithmetic.operands(q_latent, q_rope, cache, format, sm_scale, scales)
        if trtllm.runs_on(q_latent.device):
            out, lse = trtllm.attend(given, indices)
        elif q_latent.device.type == "cuda":
            from evalkit.attention.backends.sm100 import kernel

            out, lse = kernel.attend(given, indices, self.prob, q_latent.dtype)
        else:
            out, lse = arithmetic.attend(given, indices, self.prob)
        return out.to(q_latent.dtype), lse
