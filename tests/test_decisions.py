"""The experiments on the verdict, in a form that takes seconds: every stage on a tiny model, then known outcomes."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.decisions import __main__ as decisions
from benchmarks.decisions import cells, plan, runs, summary, tables
from benchmarks.decisions.cells import Cell, Wanted
from benchmarks.decisions.choosing import DoseCurve, Loss, dose_curve, loss_between
from evalkit import environment
from evalkit.errors import InputError
from evalkit.gate import policy as policies
from evalkit.gate.planning import plan as plan_documents
from evalkit.model.checkpoint import EMBEDDED
from tests.conftest import random_model

ROOT = Path(decisions.__file__).parents[2]
BASELINE, CANDIDATE = "bf16@reference", "fp32@reference"
MARGIN, NOISE, SAMPLE = 0.08, 0.07, 150
# What each dose costs, in shares of documents: (lost, gained).
PLANTED = {0.0: (0.02, 0.02), 0.1: (0.15, 0.02), 0.3: (0.40, 0.02)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    random_model(
        vocab_size=1024, num_hidden_layers=1, first_k_dense_replace=1, max_position_embeddings=2048,
        index_topk=64,
    ).save_pretrained(directory)  # fmt: skip
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED / "dsa-nano" / name, directory)
    return directory


@pytest.fixture(scope="module")
def policy(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The committed policy, with what runs on a CPU in place of its kernels."""
    path = tmp_path_factory.mktemp("policy") / "policy.toml"
    committed = ROOT / decisions.POLICY
    text = committed.read_text()
    (listed,) = policies.load(committed).scope.checkpoints.values()
    changes = {
        listed: environment.sha256(checkpoint),
        '"bf16@flashmla"': f'"{CANDIDATE}"',
        '"bf16@flashinfer"': f'"{BASELINE}"',
        '"NVIDIA H200"': '"cpu"',
        '"flashinfer", "FlashMLA"': '"torch float32"',
        "margin = 0.02": f"margin = {MARGIN}",
        "loss_at_most = 0.08": "loss_at_most = 0.3",
    }
    for before, after in changes.items():
        assert text.count(before) == 1
        text = text.replace(before, after)
    path.write_text(text)
    plan.plant(path, NOISE)
    return path


@pytest.fixture(scope="module")
def a_plan(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "plan.toml"
    made = plan.Plan(
        policy=str(policy), discordance=0.04, documents=3, seeds=2, controls=1, noise=(0.0, 0.4),
        expected_loss=(0.0, 0.1), batch_size=3,
    )  # fmt: skip
    plan.write(path, made)
    assert plan.load(path) == made
    return path


@pytest.fixture(scope="module")
def scored(checkpoint: Path, a_plan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder after the stages controls and doses on the tiny model."""
    out = tmp_path_factory.mktemp("out")
    for stage in ("controls", "doses"):
        stage_on(checkpoint, stage, "--out", str(out), "--plan", str(a_plan))
    return out


def stage_on(checkpoint: Path, *arguments: str) -> None:
    assert decisions.main([*arguments, "--checkpoint", str(checkpoint), "--device", "cpu"]) == 0


def test_every_arm_of_every_sample_is_scored_on_the_same_documents(scored: Path, a_plan: Path, policy: Path):
    made, judged = plan.load(a_plan), policies.load(policy)
    arms = [(BASELINE, 0.0), (CANDIDATE, 0.0), (BASELINE, NOISE), (CANDIDATE, 0.4)]
    asked = set()
    for seed in made.all_seeds:
        found = [summary.arm(made, judged, who, x, [seed], scored)[0] for who, x in arms]
        assert len({cell.questions_sha256 for cell in found}) == 1
        assert (
            [cell.share_over_topk for cell in found]
            == [cell.share_stored_rows for cell in found]
            == [1.0] * 4
        )
        asked.add(found[0].questions_sha256)
    assert len(asked) == 2
    assert len(list(scored.rglob("*.npz"))) == 8


def test_a_stage_goes_on_where_it_was_stopped(
    scored: Path, a_plan: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    shutil.copytree(scored, out)
    gone = sorted(out.rglob("*.npz"))[3]
    was, others = (
        gone.read_bytes(),
        {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and p != gone},
    )
    gone.unlink()
    stage_on(checkpoint, "doses", "--out", str(out), "--plan", str(a_plan))
    assert "1 cells of 1 samples to score" in capsys.readouterr().out
    again, before = (np.load(p) for p in (gone, _copy(was, tmp_path)))
    assert (again["outcomes"] == before["outcomes"]).all()
    assert {p: p.stat().st_mtime_ns for p in others} == others


def _copy(content: bytes, folder: Path) -> Path:
    path = folder / "before.npz"
    path.write_bytes(content)
    return path


@pytest.fixture(scope="module")
def known(scored: Path, policy: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder of cells whose losses are chosen, and its plan: the frame is that of a real scoring."""
    out = tmp_path_factory.mktemp("known")
    shutil.copytree(scored / "frame", out / "frame")
    path = tmp_path_factory.mktemp("plan") / "plan.toml"
    made = plan.Plan(
        policy=str(policy), discordance=0.04, documents=SAMPLE, seeds=3, controls=3, noise=tuple(PLANTED),
        expected_loss=(0.0, 0.1, 0.3), batch_size=64,
    )  # fmt: skip
    plan.write(path, made)
    (endpoint,) = policies.load(policy).endpoints
    rng = np.random.default_rng(0)
    facts = {
        "gpu": None, "plan_sha256": plan.sha256(path), "policy_sha256": policies.load(policy).sha256,
    }  # fmt: skip
    for seed in made.all_seeds:
        right = rng.random(SAMPLE) < 0.9
        draw = rng.random(SAMPLE)
        arms: dict[tuple[str, float], np.ndarray] = {(BASELINE, 0.0): right}
        for (who, noise), (lost, gained) in (
            {(BASELINE, NOISE): (0.18, 0.02)} | {(CANDIDATE, x): shares for x, shares in PLANTED.items()}
        ).items():
            arms[who, noise] = np.where(right, draw >= lost / 0.9, draw < gained / 0.1)
        for (who, noise), outcome in arms.items():
            wanted = cells.of(endpoint, who, noise, made.batch_size, seed, SAMPLE)
            a_cell(wanted, outcome.astype(np.uint8), {**facts, "resolved": who}).save(out)
    return out, path


def a_cell(wanted: Wanted, outcomes: np.ndarray, facts: dict[str, Any], asked: str | None = None) -> Cell:
    return Cell(
        wanted=wanted, outcomes=outcomes, wall_s=1.0, mean_context_tokens=575.0, mean_scored_tokens=400.0,
        questions_sha256=asked
        or cells.questions_sha256(cells.questions(wanted.task, wanted.n, wanted.seed)),
        share_over_topk=1.0, share_stored_rows=1.0, facts=facts,
    )  # fmt: skip


def test_the_gate_decides_as_the_outcomes_and_theory_say(
    known: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out, path = known
    page, figures = tmp_path / "page.md", tmp_path / "figures.json"
    shutil.copy(ROOT / "docs" / "validation.md", page)
    assert (
        decisions.main(
            ["summarise", "--out", str(out), "--plan", str(path), "--json", str(figures), "--page", str(page)]
        )
        == 0
    )
    found = json.loads(figures.read_text())
    none, some, more = found["doses"]
    assert [one["verdicts"] for one in found["doses"]] == [
        {"NON-INFERIOR": 3},
        {"INCONCLUSIVE": 3},
        {"WORSE": 3},
    ]
    assert found["controls"]["passed"]
    assert found["damage"]["passed"]
    assert found["damage"]["doses_at_twice_the_margin"] == 1
    assert none["predicted"]["NON-INFERIOR"] > 0.9
    assert more["predicted"]["WORSE"] > 0.99
    assert some["predicted"]["INCONCLUSIVE"] > 0.9
    assert all("margin lies within" in one["reason"] for one in some["samples"])
    text = page.read_text()
    formats = "<!-- table:formats -->"
    assert not found["formats"]
    assert text.partition(formats)[2] == (ROOT / "docs" / "validation.md").read_text().partition(formats)[2]
    assert f"{found['doses'][1]['documents']:,}" in text
    assert "3 of 3" in text
    assert "\n".join(tables.doses(found)) in text
    assert "\n".join(tables.doses(found)) in capsys.readouterr().out


def test_without_controls_that_hold_or_with_damage_unseen_it_says_so(
    known: tuple[Path, Path], tmp_path: Path
):
    """The second dose's answers as dose zero's, and the first's as the last's."""
    out = tmp_path / "out"
    shutil.copytree(known[0], out)
    made = plan.load(known[1])
    judged = policies.load(Path(made.policy))
    swapped = {0.0: 0.3, 0.3: 0.0}
    found = {x: summary.arm(made, judged, CANDIDATE, x, list(made.all_seeds), known[0]) for x in (0.0, 0.3)}
    for noise, other in swapped.items():
        for cell, instead in zip(found[noise], found[other], strict=True):
            a_cell(cell.wanted, instead.outcomes, cell.facts, cell.questions_sha256).save(out)
    wrong = summary.summarise(made, judged, out)
    assert wrong["controls"]["verdicts"] == {"WORSE": 3}
    assert not wrong["controls"]["passed"]
    assert not wrong["damage"]["passed"]
    assert "NOT held" in "\n".join(tables.controls(wrong))


def test_a_policy_changed_after_scoring_is_refused_and_post_hoc(known: tuple[Path, Path], tmp_path: Path):
    out, path = known
    made = plan.load(path)
    other = tmp_path / "policy.toml"
    other.write_text(Path(made.policy).read_text().replace("power = 0.9", "power = 0.8"))
    changed = tmp_path / "plan.toml"
    changed.write_text(path.read_text().replace(made.policy, str(other)))
    assert decisions.main(["summarise", "--out", str(out), "--plan", str(changed)]) == 64
    (later,) = summary.verdicts(
        made, policies.load(other), runs.find_frame(out), 0.0, [made.all_seeds[0]], out
    )
    assert later["verdict"] == "INCONCLUSIVE"


def test_cells_of_two_plans_make_no_summary(known: tuple[Path, Path], tmp_path: Path):
    """Also where the first of them is of the right one."""
    out = tmp_path / "out"
    shutil.copytree(known[0], out)
    made = plan.load(known[1])
    judged = policies.load(Path(made.policy))
    last = summary.arm(made, judged, CANDIDATE, made.noise[-1], list(made.all_seeds), out)[-1]
    a_cell(last.wanted, last.outcomes, last.facts | {"plan_sha256": "0" * 64}, last.questions_sha256).save(
        out
    )
    with pytest.raises(InputError, match="under 2 versions of the plan"):
        summary.summarise(made, judged, out)


def test_answers_to_other_documents_are_refused(known: tuple[Path, Path], policy: Path):
    out, path = known
    made = plan.load(path)
    (cell,) = summary.arm(made, policies.load(policy), BASELINE, 0.0, made.all_seeds[:1], out)
    other = a_cell(cell.wanted, cell.outcomes, cell.facts, "0" * 64)
    with pytest.raises(InputError, match="not those that bf16@reference answered"):
        cells.samples(other)
    with pytest.raises(InputError, match="other questions"):
        loss_between([cell], [other])


def test_damage_that_is_not_found_makes_no_sample_count(known: tuple[Path, Path], policy: Path):
    """Assay sensitivity is the gate's own: without it the controls are INCONCLUSIVE."""
    out, path = known
    made, judged = plan.load(path), policies.load(policy)
    before, planted = (
        summary.arm(made, judged, BASELINE, x, made.all_seeds[:1], out)[0] for x in (0.0, NOISE)
    )
    (after,) = summary.arm(made, judged, CANDIDATE, 0.0, made.all_seeds[:1], out)
    shared = runs.find_frame(out)
    assert runs.verdict(shared, judged, before, after, planted)[0].verdict == "NON-INFERIOR"
    unseen = a_cell(planted.wanted, before.outcomes, planted.facts)
    assert runs.verdict(shared, judged, before, after, unseen)[0].verdict == "INCONCLUSIVE"


def test_a_dose_curve_gives_back_the_noise_that_costs_a_loss():
    true = DoseCurve(score=0.95, scale=0.2, shape=2.5)
    rng, noise, n = np.random.default_rng(1), (0.03, 0.05, 0.08, 0.12, 0.2), 4000
    found = []
    for x in noise:
        lost = int(rng.binomial(n, float(true.loss(x)) + 0.01))
        found.append(Loss(n=n, before=0.95, after=0.0, lost=lost, gained=int(rng.binomial(n, 0.01))))
    fitted = dose_curve(noise, found)
    for loss in (0.02, 0.04, 0.06):
        assert float(true.loss(true.noise(loss))) == pytest.approx(loss)
        assert float(true.loss(fitted.noise(loss))) == pytest.approx(loss, rel=0.25)
    with pytest.raises(InputError, match="try larger ones"):
        dose_curve(noise, [Loss(n=n, before=0.95, after=0.95, lost=5, gained=5)] * 5)
    with pytest.raises(InputError, match="no noise costs that"):
        true.noise(0.96)


def test_the_plan_takes_documents_from_the_pilot_and_doses_from_the_titration(policy: Path, tmp_path: Path):
    own, other = tmp_path / "policy.toml", tmp_path / "other.toml"
    for path in (own, other):
        shutil.copy(policy, path)
    curve = DoseCurve(score=0.95, scale=0.2, shape=2.0)
    (tmp_path / "pilot.json").write_text(
        json.dumps(
            {
                "batch_size": 32,
                "other kernel": {"discordance": 0.04, "documents": 4096},
                "speed": {"process_s_per_document": 0.01, "workers": 4},
            }
        )
    )
    (tmp_path / "titration-validation-bf16.json").write_text(
        json.dumps(
            {
                "curve": vars(curve),
                "margin": MARGIN,
                "rows": [
                    {"loss": MARGIN, "discordance": 0.9},
                    {"loss": 2.1 * MARGIN, "discordance": 3.15 * MARGIN},
                ],
            }
        )
    )
    path = tmp_path / "plan.toml"
    asked = ["plan", "--out", str(tmp_path), "--policy", str(own), "--also", str(other), "--plan", str(path)]
    assert decisions.main(asked) == 0
    made = plan.load(path)
    (endpoint,) = policies.load(own).endpoints
    (planned,) = plan_documents(policies.load(own), discordance=0.04, damaged=3 * MARGIN)
    assert made.documents == planned.documents
    assert made.documents * made.seeds >= 20_000
    assert made.seeds >= made.controls == 20
    assert made.batch_size == 32
    losses = [float(curve.loss(x)) / endpoint.margin for x in made.noise]
    assert losses == pytest.approx([0, 0.5, 1, 1.5, 2.1, 3], rel=1e-2)
    for written in (own, other):
        noise = policies.load(written).damage.noise
        assert float(curve.loss(noise)) == pytest.approx(2 * MARGIN, rel=0.02)


def test_stages_share_no_documents():
    firsts = sorted(plan.FIRST_SEED.values())
    assert min(b - a for a, b in pairwise(firsts)) >= 5_000
