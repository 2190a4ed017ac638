"""The candidate's grammar: what is read, how it is written back, and what is refused."""

from __future__ import annotations

import pytest

from evalkit.candidate import Candidate
from evalkit.errors import InputError


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("bf16@reference", "bf16@reference"),
        ("bf16:one@reference", "bf16@reference"),
        ("fp8_e4m3@flashinfer", "fp8_e4m3:one@flashinfer"),
        ("fp8_e4m3:calibrated@flashinfer+index=fp8", "fp8_e4m3:calibrated@flashinfer+index=fp8"),
        ("fp8_ds_mla@flashmla+index=model+read=native", "fp8_ds_mla@flashmla"),
        ("nvfp4_ds_mla@flashmla+read=decoded", "nvfp4_ds_mla:one@flashmla+read=decoded"),
        ("bf16@best+read=decoded+index=fp8", "bf16@best+index=fp8+read=decoded"),
        ("fp8_ds_mla@reference+index=fp8_fp32", "fp8_ds_mla@reference+index=fp8_fp32"),
        ("bf16+index=bf16", "bf16@best+index=bf16"),
        ("fp8_ds_mla@reference+reader=sm100_e8m0", "fp8_ds_mla@reference+reader=sm100_e8m0"),
        ("fp8_ds_mla@reference+reader=exact", "fp8_ds_mla@reference"),
        ("fp8_ds_mla@reference+write=fused", "fp8_ds_mla@reference+write=fused"),
        ("fp8_ds_mla@reference+write=rounded", "fp8_ds_mla@reference"),
        ("fp8_ds_mla", "fp8_ds_mla@best"),
    ],
)
def test_a_candidate_is_written_in_its_canonical_form(text: str, written: str) -> None:
    assert str(Candidate.parse(text)) == written
    assert Candidate.parse(written) == Candidate.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not format"),
        ("bf16@", "is not format"),
        ("bf16@reference+index", "is not format"),
        ("bf16:two@reference", "scales 'two' is not one of one, checkpoint, calibrated"),
        ("bf16@reference+colour=red", "unknown key 'colour'; known: index, read, reader, write"),
        ("bf16@reference+index=fp4", "index=fp4 is not one of model, fp8"),
        ("bf16@reference+read=bf16", "read=bf16 is not one of native, decoded"),
        ("bf16@reference+reader=e8m0", "reader=e8m0 is not one of exact, sm90_bf16, sm100_e8m0"),
        ("bf16@reference+index=fp8+index=fp8", "key 'index' appears twice"),
    ],
)
def test_another_form_is_refused_with_what_would_be_right(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Candidate.parse(text)
