"""What is said of layers whose values do not fit their format."""

import pytest

from evalkit.records import RangeRecord
from evalkit.report import ranges


def layer(
    number: int, part: str = "latent", candidate: str = "fp8_e4m3:one@flashinfer", **shares: float
) -> RangeRecord:
    none = {"saturated_share": 0.0, "subnormal_share": 0.0, "zero_share": 0.0}
    return RangeRecord(
        candidate=candidate, layer=number, part=part, max_abs=1.0, headroom=448.0, scale=1.0, n=10_000, **(none | shares)
    )  # fmt: skip


@pytest.mark.parametrize(
    ("field", "below", "share", "words"),
    [
        ("saturated_share", 9e-5, 2e-4, "saturates in layer 1; most in layer 1, 2.00e-04 of its values beyond 448 times the scale."),
        ("zero_share", 0.009, 0.011, "is flushed to zero in layer 1; most in layer 1, 1.1% of its values not zero and stored as zero."),
        ("subnormal_share", 0.09, 0.11, "is subnormal in layer 1; most in layer 1, 11.0% of its values below e4m3's smallest normal number."),
    ],
)  # fmt: skip
def test_a_layer_is_named_from_its_share_on(field, below, share, words):
    assert ranges.sentences([layer(0, **{field: below})]) == []
    assert ranges.sentences([layer(0, **{field: below}), layer(1, **{field: share})]) == [
        f"fp8_e4m3:one@flashinfer: latent {words}"
    ]


def test_layers_are_spans_and_the_worst_is_named_with_its_own_share():
    shares = {0: 0.2, 1: 0.388, 2: 0.0, 3: 0.01}
    found = [layer(number, "rope", saturated_share=share) for number, share in shares.items()]
    (said,) = ranges.sentences([*found, layer(0), layer(1, candidate="bf16@flashmla")])
    assert said == (
        "fp8_e4m3:one@flashinfer: rope saturates in layers 0-1, 3; most in layer 1, 38.8% of its values beyond 448 times the scale."
    )
