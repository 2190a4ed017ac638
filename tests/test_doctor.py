"""`evalkit doctor`: what can be read here, and that a self-check fails where it must."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from evalkit import cli, doctor, environment, kv
from evalkit.attention import backends
from evalkit.attention.backends.base import Backend
from evalkit.attention.backends.base import backends as table
from evalkit.attention.indexer import SCORERS
from evalkit.doctor import Finding
from evalkit.kv import RowFormat
from evalkit.versions import TESTED

CPU = torch.device("cpu")


def examine(check: bool = True, heads: int = 4) -> list[Finding]:
    return list(doctor.examine(CPU, heads, 512, 8, check=check))


def test_every_backend_and_format_has_a_finding_and_every_key_format_one() -> None:
    found = examine()
    rows = [(finding.subject, finding.format) for finding in found if not finding.of_keys]
    assert rows == [(name, format) for name in backends.names() for format in kv.names()]
    assert [finding.format for finding in found if finding.of_keys] == kv.index.names()
    assert len(found) == doctor.count()


def test_what_can_run_is_measured_and_within_its_bound_and_what_cannot_has_a_reason() -> None:
    for finding in examine():
        assert not finding.failed, finding
        if finding.how == "no":
            assert finding.error is None
            assert "needs an NVIDIA GPU" in finding.why or f"not {finding.format}" in finding.why
        else:
            assert finding.error is not None
            assert finding.bound is not None
            assert 0 < finding.error <= finding.bound
    ways = {(finding.subject, finding.format): finding.how for finding in examine()}
    assert {ways["reference", format] for format in kv.names()} == {"native"}
    assert {ways["flashinfer", format] for format in kv.names()} == {"no"}


def test_without_checks_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_attend", lambda *_: pytest.fail("a backend was run"))
    monkeypatch.setattr(doctor, "_score", lambda *_: pytest.fail("a scorer was run"))
    assert all(finding.error is None and not finding.failed for finding in examine(check=False))


class Planted(Backend):
    """Reads bf16 only, and spoils the reference's result as told."""

    name, kernel = "planted", "the reference, spoilt"
    spoil: Any = staticmethod(lambda out, lse: (out, lse))

    def unavailable_because(self, format: RowFormat, *_: Any) -> str | None:
        return None if format.name == "bf16" else f"planted reads bf16, not {format.name}"

    def attend(self, *given: Any) -> tuple[Tensor, Tensor]:
        out, lse = backends.get("reference").attend(*given)
        spoilt: tuple[Tensor, Tensor] = self.spoil(out, lse)
        return spoilt


@pytest.fixture
def planted() -> Iterator[type[Planted]]:
    backends.names()
    table.register(Planted)
    yield Planted
    table.remove("planted")


def crash(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    raise RuntimeError("no kernel image\nis available")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda out, lse: (out * 1.001, lse), "FAILED: relative L2 1.0e-03, at most 1e-05"),
        (lambda out, lse: (out * torch.nan, lse), "FAILED: ValueError: a query without a row"),
        (lambda out, lse: (torch.where(out == 0, out, torch.nan), lse), "FAILED: relative L2 nan"),
        (lambda out, lse: (out + 1e-9, lse), "FAILED: ValueError: a query without a row"),
        (
            lambda out, lse: (out, lse.nan_to_num(neginf=torch.inf)),
            "FAILED: ValueError: a query without a row",
        ),
        (lambda out, lse: (out, lse / 0.6931), "FAILED: ValueError: the log-sum-exp is off by"),
        (crash, "FAILED: RuntimeError: no kernel image is available"),
    ],
)
def test_a_backend_that_is_wrong_fails_and_the_command_exits_70(
    spoil: Any,
    says: str,
    planted: type[Planted],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(planted, "spoil", staticmethod(spoil))
    (finding,) = [f for f in examine() if (f.subject, f.format) == ("planted", "bf16")]
    assert finding.failed
    assert finding.words.startswith(says)
    with pytest.raises(SystemExit) as caught:
        cli.main(["doctor", "--heads", "4"])
    assert caught.value.code == 70
    out, err = capsys.readouterr()
    assert "FAILED" in out
    assert "self-checks FAILED" in err


def test_a_format_that_a_kernel_lacks_is_read_decoded(planted: type[Planted]) -> None:
    ways = {f.format: f for f in examine() if f.subject == "planted"}
    assert ways.pop("bf16").how == "native"
    for finding in ways.values():
        assert finding.how == "decoded"
        assert finding.why == "with +read=decoded"
        assert finding.error is not None


def test_index_scores_that_are_wrong_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = SCORERS[-1]
    real = exact.scores
    monkeypatch.setattr(exact, "scores", lambda *given: real(*given).nan_to_num(neginf=0.0))
    assert [f.broken for f in examine() if f.of_keys] == [
        "ValueError: keys up to the query's own must be scored, and no others"
    ] * len(kv.index.names())
    monkeypatch.setattr(exact, "scores", lambda *given: real(*given) * 1.0001)
    assert all(f.failed and not f.broken for f in examine() if f.of_keys)


def installed(monkeypatch: pytest.MonkeyPatch, modules: set[str], versions: dict[str, str]) -> None:
    """This machine, as if it had those packages and no others."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in modules else None)
    monkeypatch.setattr(environment, "version_of", versions.get)
    monkeypatch.setattr(doctor, "LIBRARIES", {"FlashMLA": lambda: Path("a.so"), "DeepGEMM": lambda: None})


def test_packages_are_found_with_their_versions_and_kernel_libraries_with_that_of_what_ships_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    installed(
        monkeypatch,
        {"torch", "lm_eval", "vllm"},
        {"torch": "2.13.0+cpu", "lm-eval": "0.4.13", "vLLM": "0.33.0"},
    )
    found = {package.tested.name: package.words for package in doctor.packages()}
    assert found == {
        "torch": "2.13.0+cpu", "triton": "not installed", "transformers": "not installed", "lm-eval": "0.4.13",
        "flashinfer-python": "not installed", "vLLM": "0.33.0", "FlashMLA": "in vLLM 0.33.0",
        "DeepGEMM": "not installed",
    }  # fmt: skip
    assert not any(package.warning for package in doctor.packages())


def test_a_kernel_library_whose_version_nothing_says_is_found_and_not_warned_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    installed(monkeypatch, {"vllm"}, {})
    found = {package.tested.name: package for package in doctor.packages()}
    assert found["vLLM"].words == found["FlashMLA"].words == "found, version unknown"
    assert found["FlashMLA"].warning is None


def test_doctor_lists_packages_within_80_columns_and_warns_of_each_that_was_not_tested(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    installed(monkeypatch, {"torch", "vllm"}, {"torch": "2.99.0.dev20261130+cu130", "vLLM": "0.25.1"})
    monkeypatch.setattr(doctor, "examine", lambda *_, check: [])
    with pytest.raises(SystemExit) as caught:
        cli.main(["doctor", "--no-check"])
    assert caught.value.code == 0
    out, err = capsys.readouterr()
    assert err.splitlines() == [
        f"warning: torch 2.99.0.dev20261130+cu130 is newer than {TESTED[0].newest}, the newest tested",
        "warning: vLLM 0.25.1 is older than 0.33.0, the oldest tested",
        "warning: FlashMLA of vLLM 0.25.1 is older than 0.33.0, the oldest tested",
    ]
    lines = [*out.splitlines(), *err.splitlines()]
    assert max(map(len, lines)) <= 80
    assert ["package", "found", "tested", "from", "to"] in [line.split() for line in lines]
    assert ["FlashMLA", "in", "vLLM", "0.25.1", "0.33.0", "0.33.0"] in [line.split() for line in lines]


@pytest.mark.gpu
@pytest.mark.timeout(900)  # every kernel compiles
def test_on_a_gpu_no_self_check_fails(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["doctor"])
    out, _ = capsys.readouterr()
    assert caught.value.code == 0, out
