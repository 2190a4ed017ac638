"""Where the parts of a row lie and what numbers they hold, for kernels that decode any format that says so."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["fp32", "bf16", "e4m3", "e2m1"]


@dataclass(frozen=True, kw_only=True)
class Part:
    """Numbers of one kind, in order, from byte `offset` of a row on, its planes side by side.

    `scaled` is True where the number is multiplied by the part's scale of `Scales`, last of all. Of e2m1, the even
    element is the low nibble.
    """

    kind: Kind
    offset: int
    scaled: bool = False


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What `RowFormat.decode` does, as data: value = code x its group's stored scale x the part's given scale.

    Where scales are stored, `group` latent values share one, in `scale`: fp32, which passes through the reader's
    rounding, or e4m3, which every reader takes as it is. The scale of group s is number
    (s % scale_lanes) x (groups / scale_lanes) + s / scale_lanes; one lane stands for their own order.
    """

    latent: Part
    rope: Part
    scale: Part | None = None
    group: int = 512
    scale_lanes: int = 1
