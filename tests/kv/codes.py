"""Tables of the small floating-point encodings, built from their definitions, and rounding by searching them."""

import numpy as np
from numpy.typing import NDArray

_CODE = np.arange(0x7F)
# Codes 0x00 to 0x7E: 4 exponent bits with bias 7, 3 mantissa bits; 0x7F is NaN.
E4M3 = np.where(_CODE < 8, (_CODE & 7) * 2.0**-9, (8 + (_CODE & 7)) * 2.0 ** ((_CODE >> 3) - 10.0))
# Codes 0 to 7: 2 exponent bits with bias 1, 1 mantissa bit.
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def encode(values: NDArray[np.floating], table: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Nearest code, ties to the even one, saturating; the sign is the bit above the table's."""
    magnitude = np.minimum(np.abs(values.astype(np.float64)), table[-1])
    above = np.searchsorted(table, magnitude)
    below = np.maximum(above - 1, 0)
    to_above, to_below = table[above] - magnitude, magnitude - table[below]
    up = (to_above < to_below) | ((to_above == to_below) & (above % 2 == 0))
    sign = 0x80 if len(table) > 8 else 8
    return (np.where(up, above, below) | (np.signbit(values) * sign)).astype(np.uint8)
