"""`evalkit calibrate`: from prompts to a file or a checkpoint that carries scales."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import evalkit
from evalkit import cli, kv
from evalkit.calibrate import calibrate, read_prompts
from evalkit.errors import InputError
from evalkit.kv import Scales
from evalkit.kv.scale_files import SCALES_FILE
from evalkit.records import RangeRecord, only, read


def exit_code(*arguments: str) -> object:
    with pytest.raises(SystemExit) as caught:
        cli.main(["calibrate", *arguments])
    return caught.value.code


def test_the_checkpoints_scales_give_the_numbers_of_the_calibrated_ones(tmp_path: Path) -> None:
    made = tmp_path / "scaled"
    scales = calibrate("dsa-nano", out=None, into=made, tokens=96, device="cpu")
    stored = kv.from_checkpoint(made)
    for layer, scale in scales.items():
        rounded = float(torch.tensor(scale.latent))
        assert stored[layer] == Scales(latent=rounded, rope=rounded)
    model = evalkit.load(made, device="cpu")
    ids = torch.arange(3, 67)[None]
    with torch.no_grad():
        got, want, one = (
            model(ids, **model.evalkit.new_cache(f"fp8_e4m3:{source}@reference", given).argument).logits
            for source, given in (("checkpoint", stored), ("calibrated", scales), ("one", {}))
        )
    assert torch.equal(got, want)
    assert not torch.equal(got, one)
    with safe_open(made / SCALES_FILE, framework="pt") as file:
        facts = file.metadata()
    assert (facts["method"], facts["documents"], facts["tokens"]) == ("max", "2", "192")
    assert (facts["prompts"], facts["checkpoint"]) == ("generated, seed 0", "dsa-nano")
    assert len(facts["checkpoint_sha256"]) == 64


def test_prompts_and_percentile_decide_the_scale(tmp_path: Path) -> None:
    lines, objects = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    texts = ["The code of river is 47. " * 4, "A walk of 32 steps begins here. " * 4]
    lines.write_text("\n\n".join(texts) + "\n")
    objects.write_text("\n".join(json.dumps(x) for x in ({"text": texts[0]}, {"prompt": texts[1]})))
    options = {"into": None, "device": "cpu"}
    whole = calibrate("dsa-nano", out=tmp_path / "a", prompts=lines, **options)  # type: ignore[arg-type]
    same = calibrate("dsa-nano", out=tmp_path / "b", prompts=objects, percentile=100, **options)  # type: ignore[arg-type]
    less = calibrate("dsa-nano", out=tmp_path / "c", prompts=lines, percentile=99, **options)  # type: ignore[arg-type]
    assert whole == same
    assert all(less[layer].latent < scale.latent for layer, scale in whole.items())
    with safe_open(tmp_path / "c", framework="pt") as file:
        assert file.metadata()["method"] == "percentile 99"
        assert file.metadata()["prompts"] == "prompts.txt"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.txt", " \n\n", "holds no prompt"),
        ("x.txt", b"\xff\xfe", "is not UTF-8"),
        ("x.jsonl", '"fine"\n{', "line 2: not JSON"),
        ("x.jsonl", '{"question": "?"}', "line 1: a string or an object with the text"),
        ("x.jsonl", '{"text": 3}', "line 1: a string or an object with the text"),
        ("x.txt", None, "cannot be read"),
    ],
)
def test_prompts_that_are_none_are_named(
    tmp_path: Path, name: str, content: str | bytes | None, says: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=says):
        read_prompts(tmp_path / name)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--out", "a", "--into", "b"], "give one"),
        (["--percentile", "99"], "needs --method percentile"),
        (["--method", "percentile", "--percentile", "0"], "above 0 and at most 100"),
        (["--method", "percentile", "--percentile", "nan"], "above 0 and at most 100"),
        (["--method", "median"], "median"),
        (["--prompts", "nowhere.txt"], "nowhere.txt cannot be read"),
        (["--checkpoint", "nowhere"], "no checkpoint at nowhere"),
        (["--out", "there"], "there exists"),
        (["--out", "no/where"], "no is no directory"),
        (["--into", "full"], "full holds something else"),
        (["--device", "tpu"], "device is 'tpu'"),
    ],
)
def test_bad_input_exits_64_before_a_model_is_loaded(
    arguments: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "evalkit.calibrate.load_reference", lambda *_, **__: pytest.fail("the model was loaded")
    )
    (tmp_path / "there").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    assert exit_code(*arguments) == 64
    assert says in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "there"]


def test_the_command_says_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "scales.safetensors"
    assert exit_code("--out", str(file), "--tokens", "40", "--device", "cpu") == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("scales ")
    assert out[0].endswith(" over 4 layers")
    assert out[1] == str(file)
    assert exit_code("--out", str(file), "--tokens", "40", "--device", "cpu") == 64


def test_under_a_profile_a_scale_of_the_latent_alone_is_named_with_the_layers_whose_rope_it_saturates(
    tmp_path: Path,
) -> None:
    """vLLM #42956, from the command line."""
    made = tmp_path / "latent-only"
    ranges = ["--profile", "deepseek-v3.2", "--device", "cpu", "--tokens", "256"]
    assert exit_code("--into", str(made), "--part", "latent", *ranges) == 0
    with safe_open(made / SCALES_FILE, framework="pt") as file:
        assert (file.metadata()["fitted"], file.metadata()["profile"]) == ("latent", "deepseek-v3.2")
    with pytest.raises(SystemExit) as caught:
        cli.main(
            [
                "layers",
                *("--set", f"checkpoint={made}", "--set", "candidates=bf16,fp8_e4m3:checkpoint@reference"),
                *("--set", f"out={tmp_path}", "--set", "profile=deepseek-v3.2", "--set", "device=cpu"),
                *("--set", "layers_prompt_tokens=256", "--set", "layers_decode_tokens=0"),
                *("--set", "phase_tokens=0"),
            ]
        )
    assert caught.value.code == 0
    (run,) = (path for path in tmp_path.iterdir() if (path / "summary.md").exists())
    found = {
        record.layer: record.saturated_share
        for record in only(read(run), RangeRecord)
        if record.candidate.startswith("fp8_e4m3") and record.part == "rope"
    }
    assert sum(share > 0.01 for share in found.values()) == len(found) > 1
    summary = (run / "summary.md").read_text()
    assert "- fp8_e4m3:checkpoint@reference: rope saturates in layers 0-3; most in layer " in summary
