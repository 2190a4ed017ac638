"""How one token's latent and rope are stored: formats, their scales, and vLLM's names for them."""

from evalkit.kv import index
from evalkit.kv.aliases import resolve
from evalkit.kv.base import RowFormat, formats
from evalkit.kv.scale_files import from_checkpoint
from evalkit.kv.scales import (
    ReadScale,
    Scales,
    calibrate,
    identity,
    round_to_bf16,
    truncate_to_e8m0,
)

formats.discover(f"{__name__}.rows")
get = formats.get
names = formats.names

__all__ = [
    "ReadScale",
    "RowFormat",
    "Scales",
    "calibrate",
    "formats",
    "from_checkpoint",
    "get",
    "identity",
    "index",
    "names",
    "resolve",
    "round_to_bf16",
    "truncate_to_e8m0",
]
