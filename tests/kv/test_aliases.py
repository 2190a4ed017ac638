"""vLLM's names for formats, which depend on the backend."""

import pytest

from evalkit import kv
from evalkit.errors import InputError


@pytest.mark.parametrize(
    ("name", "backend", "expected"),
    [
        ("fp8", "flashmla", "fp8_ds_mla"),
        ("fp8", "flashinfer", "fp8_e4m3"),
        ("fp8", "emulated", "fp8_e4m3"),
        ("fp8", "FLASHMLA_SPARSE", "fp8_ds_mla"),
        ("fp8", "FLASHINFER_MLA_SPARSE", "fp8_e4m3"),
        ("fp8", "FLASHINFER_MLA_SPARSE_SM90", "fp8_e4m3"),
        ("fp8", "FLASHINFER_MLA_SPARSE_SM120", "fp8_ds_mla"),
        ("auto", "reference", "bf16"),
        ("auto", "FLASHMLA_SPARSE", "bf16"),
        ("auto", "FLASHINFER_MLA_SPARSE_SM120", "fp8_ds_mla"),
        ("fp8_group128", "reference", "fp8_group128"),
    ],
)
def test_a_name_resolves_as_vllm_resolves_it(name: str, backend: str, expected: str):
    assert kv.resolve(name, backend) == expected


def test_fp8_is_refused_where_it_means_nothing_definite():
    with pytest.raises(
        InputError, match=r"'fp8' has no meaning of its own on backend 'reference'.*name one of these"
    ):
        kv.resolve("fp8", "reference")


def test_a_misspelt_format_is_answered_with_the_closest():
    with pytest.raises(InputError, match="unknown KV format 'fp8_dsmla': did you mean 'fp8_ds_mla'"):
        kv.resolve("fp8_dsmla", "flashmla")
