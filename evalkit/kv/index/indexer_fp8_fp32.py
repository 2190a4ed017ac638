"""indexer_fp8_fp32: indexer_fp8_ue8m0's layout with the scale max(amax, 1e-4) / 448, any float32."""

from torch import Tensor

from evalkit.kv.index.base import index_formats
from evalkit.kv.index.indexer_fp8_ue8m0 import SMALLEST_AMAX, IndexerFp8Ue8m0
from evalkit.kv.numerics.e4m3 import E4M3_MAX, divide


@index_formats.register
class IndexerFp8Fp32(IndexerFp8Ue8m0):
    name = "indexer_fp8_fp32"
    what = "e4m3 under any float32 scale per token"

    def scale(self, amax: Tensor) -> Tensor:
        return divide(amax.clamp(min=SMALLEST_AMAX), E4M3_MAX)
