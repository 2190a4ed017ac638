"""The kernel benchmark, at sizes that take a moment: every format and read has its line, with errors and times."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
            assert (row["decode_over_pass"] is None) == (read == "native")
            assert row["decoder"] == (None if read == "native" else "none" if name == "bf16" else "eager")
            assert row["bare_ms"] is None
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    headings = [line for line in lines if "rel. L2" in line]
    assert len(headings) == 1
    assert len([line for line in lines if len(line) == len(headings[0])]) >= len(rows) + 3  # none is wrapped
    assert "a native call over its bare kernel <= 1.10: n/a, not measured here" in printed
    assert f"decoding over one pass <= 1.00: {'over' if any_over(found['rows']) else 'PASS'}: " in printed
    assert all(name in printed for name in (*kv.names(), *backends.names()))
    assert "FlashInfer needs an NVIDIA GPU" in printed


def any_over(rows: list[dict[str, Any]]) -> bool:
    return any((row["decode_over_pass"] or 0.0) > 1.0 for row in rows)


def row(read: str = "native", **figures: float) -> kernels.Row:
    errors = {"relative_l2": 0.0, "worst_query_relative_l2": 0.0, "device_ms": 1.0, "host_ms": 1.0}
    named = {"format": "fp8_e4m3", "backend": "emulated", "kernel": "k", "bytes_per_token": 576}
    return kernels.Row(read=read, **named, **(errors | figures))  # type: ignore[arg-type]


def test_a_target_is_met_only_where_every_ratio_is_within_it() -> None:
    met = kernels.targets([row(over_bare=1.1, over_flashinfer_fp8=5.0), row("decoded", decode_over_pass=1.0)])
    assert [line.split(": ")[1] for line in met] == ["PASS", "PASS", "PASS"]
    missed = kernels.targets(
        [
            row(over_bare=1.0, over_flashinfer_fp8=float("nan")),
            row(over_bare=1.101),
            row("decoded", over_bare=2.0, decode_over_pass=1.001),
        ]
    )
    assert [line.split(": ")[1] for line in missed] == ["over", "over", "over"]
    assert missed[0].endswith("fp8_e4m3@emulated 1.000, fp8_e4m3@emulated 1.101 (over)")


def test_sizes_that_do_not_fit_are_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        kernels.main(["--topk", "9", "--slots", "8"])
    assert "topk at most slots" in capsys.readouterr().err
