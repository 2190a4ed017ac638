"""What vLLM's `kv_cache_dtype` names mean, which depends on the backend that reads the rows.

The capitalised backends are vLLM's own; the others are this project's names for the kernels behind them
(`emulated` stands in for FLASHINFER_MLA_SPARSE on SM100).
"""

from evalkit.errors import InputError
from evalkit.kv.base import formats

BF16_NAMES = ("auto", "bfloat16")

FP8_MEANS = {
    "flashmla": "fp8_ds_mla",
    "flashinfer": "fp8_e4m3",
    "emulated": "fp8_e4m3",
    "FLASHMLA_SPARSE": "fp8_ds_mla",
    "FLASHINFER_MLA_SPARSE": "fp8_e4m3",
    "FLASHINFER_MLA_SPARSE_SM90": "fp8_e4m3",
    "FLASHINFER_MLA_SPARSE_SM120": "fp8_ds_mla",
}

# This backend has no other format, and takes it even where bf16 was asked for.
FP8_DS_MLA_ONLY = ("FLASHINFER_MLA_SPARSE_SM120",)


def resolve(name: str, backend: str) -> str:
    """The format that vLLM stores when `name` is asked for on `backend`.

    Raises:
        InputError: no such format, or an alias that means nothing definite on this backend.
    """
    if name in BF16_NAMES:
        return "fp8_ds_mla" if backend in FP8_DS_MLA_ONLY else "bf16"
    if name == "fp8":
        if backend not in FP8_MEANS:
            raise InputError(
                f"format 'fp8' has no meaning of its own on backend {backend!r}: vLLM takes it as fp8_ds_mla on "
                "flashmla and as fp8_e4m3 on flashinfer; name one of these"
            )
        return FP8_MEANS[backend]
    return formats.get(name).name
