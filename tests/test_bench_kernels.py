"""The kernel benchmark, at sizes that take a moment: every format and read has its line, with errors and times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import kernels
from evalkit import kv
from evalkit.attention import backends

TINY = ["--heads", "2", "--queries", "2", "--topk", "8", "--repeats", "1"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run there, and take their time to compile")
@pytest.mark.parametrize("slots", ["12", "64"], ids=["all-decoded", "selected-decoded"])
def test_every_format_has_a_line_for_each_way_to_read_it(
    slots: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kernels.main([*TINY, "--slots", slots, "--json", str(tmp_path / "figures.json")])
    found = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    rows = {(row["format"], row["backend"], row["read"]): row for row in found["rows"]}
    for name in kv.names():
        for read in ("native", "decoded"):
            row = rows[name, "reference", read]
            assert row["bytes_per_token"] == kv.get(name).row_bytes
            # bf16 queries give a bf16 output: its rounding is all there is, and it is not nothing.
            assert 1e-4 < row["relative_l2"] <= row["worst_query_relative_l2"] * 1.001 < 5e-3
            assert row["device_ms"] > 0
            assert row["host_ms"] > 0
            assert (row["decode_ms"] is None) == (read == "native")
            assert (row["decode_over_gather"] is None) == (read == "native")
            assert row["bare_ms"] is None
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*kv.names(), *backends.names()))
    assert "FlashInfer needs an NVIDIA GPU" in printed


def test_sizes_that_do_not_fit_are_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        kernels.main(["--topk", "9", "--slots", "8"])
    assert "topk at most slots" in capsys.readouterr().err
