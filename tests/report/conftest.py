"""A made-up run whose numbers are all different, so that a swapped cell shows."""

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from evalkit.records import (
    CandidateRecord,
    EnvironmentRecord,
    LayerRecord,
    RangeRecord,
    Record,
    RunDirectory,
    SampleRecord,
    SelectionRecord,
    TaskRecord,
    TokenRecord,
)
from tests.report.browser import Browser

CANDIDATES = [
    "fp8_e4m3:one@flashinfer",
    "fp8_e4m3:calibrated@flashinfer",
    "fp8_ds_mla@flashmla",
    "bf16@reference",
]
SIZES = {"fp8_e4m3:one@flashinfer": 576, "fp8_e4m3:calibrated@flashinfer": 576, "fp8_ds_mla@flashmla": 656}


def layer_record(
    candidate: str, layer: int | None, relative_l2: float | None, **changes: object
) -> LayerRecord:
    """A LayerRecord of the attention output in isolated decode, with only its relative L2 given."""
    values: dict[str, object] = {
        "phase": "decode",
        "mode": "isolated",
        "probe": "attention",
        "rung": "total",
        "cosine": 0.999,
        "symmetric_distance": 0.001,
        "max_abs_error": 0.25,
        "max_abs_token": 17,
        "max_abs_got": 1.5,
        "max_abs_ref": 1.25,
        "sqnr_db": 31.4,
        "abs_p50": 0.01,
        "abs_p99": 0.1,
        "abs_p999": 0.2,
        "token_relative_l2_mean": 0.02,
        "nonfinite": 0,
        "frozen": "none",
        "n": 32,
    }
    return LayerRecord(candidate=candidate, layer=layer, relative_l2=relative_l2, **(values | changes))  # type: ignore[arg-type]


def _layers(rng: random.Random) -> Iterator[Record]:
    for candidate in CANDIDATES:
        size = 0.0 if candidate == "bf16@reference" else rng.uniform(0.005, 0.05)
        for layer in range(4):
            for phase in ("prefill", "decode"):
                for probe in ("latent", "attention", "output"):
                    for mode in ("isolated", "propagated"):
                        value = size * rng.uniform(0.8, 1.2) * (1 + layer if mode == "propagated" else 1)
                        yield layer_record(candidate, layer, value, phase=phase, mode=mode, probe=probe)
                for rung, part in (("format", 0.95), ("kernel", 0.1)):
                    yield layer_record(candidate, layer, size * part, phase=phase, rung=rung)
                yield SelectionRecord(
                    candidate=candidate, layer=layer, phase=phase, mode="propagated", recall_mean=1 - size / 3,
                    recall_min=1 - size * 2, margin_p50=0.0123, mass_lost_mean=size / 40, n=32,
                )  # fmt: skip
            for part in ("latent", "rope"):
                yield RangeRecord(
                    candidate=candidate, layer=layer, part=part, max_abs=rng.uniform(0.02, 5), saturated_share=0.0,
                    subnormal_share=size, zero_share=size / 9, headroom=rng.uniform(2, 400),
                    scale=None if candidate == "bf16@reference" else 1.0, n=1_048_576,
                )  # fmt: skip
    for layer in range(4):
        for phase in ("prefill", "decode"):
            floor = rng.uniform(1e-3, 3e-3)
            yield layer_record("bf16@reference", layer, floor, phase=phase, rung="floor:other-kernel")


def _tasks(rng: random.Random) -> Iterator[Record]:
    for candidate in CANDIDATES:
        control = candidate == "bf16@reference"
        for task in ("needle", "registers"):
            loss = 0.0 if control else rng.uniform(-0.02, 0.2)
            yield TaskRecord(
                candidate=candidate, baseline="bf16@reference", task=task, metric="exact_match", filter="none", n=24,
                score=0.9 - loss, score_lower=0.7, score_upper=0.97, baseline_score=0.9, loss=loss,
                loss_lower=loss - 0.11, loss_upper=loss + 0.13, interval_method="Tango", lost=None if control else 3,
                gained=None if control else 1, mcnemar_p=None if control else 0.625, wall_s=rng.uniform(10, 30),
                mean_context_tokens=1024.0, share_over_topk=1.0, share_stored_rows=1.0,
            )  # fmt: skip
            for doc_id in range(3):
                yield SampleRecord(
                    candidate=candidate, task=task, doc_id=doc_id, prompt_sha256="a" * 64, target_sha256="b" * 64,
                    filter="none", metric="exact_match", score=1.0, generated_tokens=4, truncated=False, response="<b>blue</b>\u2028",
                )  # fmt: skip


def _opening() -> Iterator[Record]:
    yield EnvironmentRecord(
        commit="0123456789abcdef", python="3.11.7", packages={"torch": "2.13.0"}, device="Linux x86_64, cpu", gpu=None,
        dtype="float32", checkpoint="dsa-nano", checkpoint_sha256="c" * 64, flags={"cuda.matmul.allow_tf32": False},
        command="evalkit run", started_utc="2026-01-31T12:00:00+00:00",
    )  # fmt: skip
    for candidate in CANDIDATES:
        size = SIZES.get(candidate, 1152)
        yield CandidateRecord(
            candidate=candidate, format=candidate.partition("@")[0].partition(":")[0], scales="one",
            backend=candidate.partition("@")[2], kernel="a kernel", index="model", read="native", heads=4, row_bytes_per_token=size,
            bytes_per_token_read_back=size, requested="fp8 <asked>", note="",
        )  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A whole run: four candidates, four layers, two tasks."""
    rng = random.Random(0)
    made = RunDirectory.create(tmp_path, "made-up", {"seed": 0}, "evalkit run --config <made-up>.toml")
    tokens = [
        TokenRecord(
            candidate=candidate, phase="decode", frozen="none", kl_mean_nats=rng.uniform(1e-4, 0.02), kl_p50_nats=1e-4,
            kl_p90_nats=0.01, kl_p99_nats=0.1, kl_p999_nats=None, kl_max_nats=None, kl_mean_lower_nats=None,
            kl_mean_upper_nats=None, interval_method="none (1 documents)", documents=1, top1_agreement=0.99, disagreed=9,
            reference_right=4, candidate_right=3, delta_p_mean=-0.0123, delta_p_rms=0.0456, targets=511, n=512,
        )
        for candidate in CANDIDATES
    ]  # fmt: skip
    for stage, records in (
        ("start", _opening()),
        ("layers", [*_layers(rng), *tokens]),
        ("tasks", _tasks(rng)),
    ):
        with made.stage(stage) as writer:
            for record in records:
                writer.write(record)
    return made


@pytest.fixture
def browse(tmp_path: Path) -> Iterator[Callable[..., Browser]]:
    """Opens a page; when the test ends, it must have printed no error and asked for no address but files."""
    with ExitStack() as stack:
        opened: list[Browser] = []

        def start(page: Path, **options: Any) -> Browser:
            browser = stack.enter_context(Browser(tmp_path / f"profile{len(opened)}", **options))
            opened.append(browser)
            browser.open(page.as_uri())
            return browser

        yield start
        for browser in opened:
            assert browser.errors == []
            assert {address.partition(":")[0] for address in browser.requests} <= {"file", "data"}
