"""What cannot run ends in one line on stderr and exit code 64, before anything is written."""

import json
import os
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import torch

from evalkit import cli, pipeline, prepare
from evalkit.config import RunConfig
from evalkit.model.checkpoint import EMBEDDED
from evalkit.records import RunDirectory
from tests.conftest import random_model

POSITIONS = 2048
SMALL = {
    "candidates": "bf16@reference",
    "layers_prompt_tokens": "200",
    "layers_decode_tokens": "2",
    "task_documents": "2",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint that runs."""
    directory = tmp_path_factory.mktemp("whole")
    random_model(
        vocab_size=1024, num_hidden_layers=2, max_position_embeddings=POSITIONS, index_topk=64
    ).save_pretrained(directory, max_shard_size="4MB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED / "dsa-nano" / name, directory)
    return directory


@pytest.fixture
def checkpoint(whole: Path, tmp_path: Path) -> Path:
    """The small checkpoint, to be broken: files are links, so replace them whole."""
    return Path(shutil.copytree(whole, tmp_path / "checkpoint", copy_function=os.link))


@pytest.fixture
def refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs a command that must be refused and gives back the one line it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, command: str = "run", **settings: str) -> str:
        capfd.readouterr()
        before = tree(tmp_path)
        given = [
            f"--set={key}={value}"
            for key, value in ({"checkpoint": str(checkpoint)} | SMALL | settings).items()
        ]
        with pytest.raises(SystemExit) as caught:
            cli.main([command, *(arguments or given)])
        out, err = capfd.readouterr()
        assert caught.value.code == cli.BAD_INPUT, err
        assert err.startswith("evalkit: ")
        assert err.count("\n") == 1, err
        assert out == ""
        assert tree(tmp_path) == before
        return err

    return run


@pytest.fixture
def begun(checkpoint: Path, tmp_path: Path) -> Path:
    """A run that was stopped after it had recorded where it runs."""
    config = RunConfig.load(None, [f"{key}={value}" for key, value in SMALL.items()]).with_values(
        checkpoint=str(checkpoint)
    )
    directory = RunDirectory.create(tmp_path / "runs", "begun", config.to_json(), "evalkit run")
    pipeline.describe(directory, prepare.prepare(config))
    return directory.path


def tree(directory: Path) -> list[str]:
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*"))


def rewrite(path: Path, content: str | bytes) -> None:
    path.unlink()
    path.write_bytes(content.encode() if isinstance(content, str) else content)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"checkpoint": "nowhere"}, ["no checkpoint at nowhere", "config.json", "dsa-nano"]),
        ({"candidates": "fp8_e4m4@reference"}, ["unknown KV format 'fp8_e4m4'", "did you mean 'fp8_e4m3'"]),
        ({"candidates": "fp8_e4m3@flashinfr"}, ["unknown backend 'flashinfr'", "did you mean 'flashinfer'"]),
        ({"candidates": "fp8_e4m4"}, ["unknown KV format 'fp8_e4m4'", "did you mean 'fp8_e4m3'"]),
        ({"candidates": "fp8@reference"}, ["'fp8' has no meaning", "fp8_ds_mla", "fp8_e4m3"]),
        ({"candidates": "fp8"}, ["'fp8' has no meaning", "fp8_ds_mla", "fp8_e4m3"]),
        ({"candidates": "fp8_e4m3@flashmla"}, ["fp8_e4m3@flashmla cannot run here"]),
        ({"candidates": "fp8_ds_mla:one@reference,fp8_ds_mla@reference"}, ["fp8_ds_mla@reference twice"]),
        ({"candidates": "fp8_e4m3:one@reference,fp8_e4m3"}, ["fp8_e4m3:one@reference twice", "'fp8_e4m3'"]),
        ({"candidates": "bf16:calibrated@reference"}, ["bf16", "takes no scale"]),
        ({"candidates": "fp8_ds_mla:calibrated@reference"}, ["fp8_ds_mla", "takes no scale"]),
        ({"candidates": "fp8_ds_mla:checkpoint@reference"}, ["fp8_ds_mla", "takes no scale"]),
        ({"candidates": "fp8_e4m3:checkpoint@reference"}, ["no attn.k_scale", "'one' or 'calibrated'"]),
        ({"candidates": "fp8_e4m3:checkpoint,nonsense@reference"}, ["unknown KV format 'nonsense'"]),
        ({"candidates": "fp8_e4m3:half@reference"}, ["scales 'half'", "calibrated"]),
        ({"candidates": "bf16 @ reference"}, ["format[:scales][@backend]"]),
        ({"candidates": "fp8_ds_mla@reference+index=fp4"}, ["index=fp4", "model, fp8"]),
        ({"layers_prompt_tokens": "9000"}, ["is 9002", f"holds {POSITIONS}"]),
        ({"tasks": "evalkit_needle_2048"}, ["evalkit_needle_2048 document 0", f"max_length {POSITIONS}"]),
        ({"tasks": "evalkit_needle_102"}, ["unknown task evalkit_needle_102", "evalkit_needle_1024"]),
        ({"tasks": "evalkit_needle_1024,evalkit_needle_1024"}, ["task evalkit_needle_1024", "2 times"]),
        ({"stages": "tasks"}, ["tasks is empty", "evalkit_needle_1024"]),
        ({"stages": "layer"}, ["stages is layer", "give some of layers, kld, tasks"]),
        ({"out": "checkpoint/config.json"}, ["out is checkpoint/config.json", "is a file"]),
        ({"out": "checkpoint/config.json/runs"}, ["out is checkpoint/config.json/runs", "is a file"]),
        ({"out": "/proc/runs"}, ["no run directory can be made in /proc/runs"]),
        ({"sead": "1"}, ["unknown key 'sead'", "did you mean 'seed'"]),
        ({"layers_prompts": "nowhere.txt"}, ["no text file at nowhere.txt"]),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_a_request_that_cannot_be_met(settings: dict[str, str], said: list[str], refused: Callable[..., str]):
    line = refused(**settings)
    for part in said:
        assert part in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU answers")
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"device": "cuda:1"}, ["device cuda:1", "no GPU"]),
        ({"device": "cuda"}, ["device cuda", "no GPU", "device=cpu"]),
        ({"candidates": "fp8_e4m3@flashinfer"}, ["fp8_e4m3@flashinfer cannot run here", "GPU"]),
    ],
    ids=["second device", "device", "backend"],
)
def test_a_request_that_needs_a_gpu(settings: dict[str, str], said: list[str], refused: Callable[..., str]):
    line = refused(**settings)
    for part in said:
        assert part in line


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "is empty"), (b"too short\n", "holds"), ("naïve".encode("latin-1"), "not UTF-8")],
    ids=["empty", "short", "latin-1"],
)
def test_prompts_that_are_no_text_of_that_length(
    content: bytes, said: str, tmp_path: Path, refused: Callable[..., str]
):
    (tmp_path / "prompts.txt").write_bytes(content)
    line = refused(layers_prompts="prompts.txt")
    assert said in line
    assert "prompts.txt" in line


def truncate(checkpoint: Path) -> None:
    file = max(checkpoint.glob("*.safetensors"))
    rewrite(file, file.read_bytes()[:-64])


def lose_a_shard(checkpoint: Path) -> None:
    max(checkpoint.glob("*.safetensors")).unlink()


def lose_the_index(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors.index.json").unlink()


def break_the_index(checkpoint: Path) -> None:
    rewrite(checkpoint / "model.safetensors.index.json", "{}")


def break_the_config(checkpoint: Path) -> None:
    rewrite(checkpoint / "config.json", (checkpoint / "config.json").read_text()[:-20])


def blank_the_config(checkpoint: Path) -> None:
    rewrite(checkpoint / "config.json", '""')


def configure(**changes: object) -> Callable[[Path], None]:
    def change(checkpoint: Path) -> None:
        file = checkpoint / "config.json"
        rewrite(file, json.dumps(json.loads(file.read_text()) | changes))

    return change


def more_layers(checkpoint: Path) -> None:
    # Each version of transformers has its own name for a layer of sparse attention.
    (name,) = set(json.loads((checkpoint / "config.json").read_text())["layer_types"])
    configure(
        num_hidden_layers=3,
        layer_types=[name] * 3,
        mlp_layer_types=["dense", "sparse", "sparse"],
    )(checkpoint)


def lose_the_tokenizer(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").unlink()
    (checkpoint / "tokenizer_config.json").unlink()


def break_the_tokenizer(checkpoint: Path) -> None:
    rewrite(checkpoint / "tokenizer.json", "{")


def lose_the_config(checkpoint: Path) -> None:
    (checkpoint / "config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncate, ["model-00002-of-00002.safetensors is truncated"]),
        (lose_a_shard, ["lacks the weights file model-00002-of-00002.safetensors"]),
        (lose_the_index, ["lacks the weights file model.safetensors"]),
        (break_the_index, ["model.safetensors.index.json", "weight_map"]),
        (lose_the_config, ["has no config.json"]),
        (break_the_config, ["config.json is not valid JSON"]),
        (blank_the_config, ["config.json holds a str, not an object"]),
        (configure(model_type="llama"), ["model_type 'llama'", "deepseek_v32"]),
        (configure(kv_lora_rank=256), ["kv_lora_rank 256", "512"]),
        (configure(hidden_size=128), ["config.json", "lm_head.weight", "[1024, 64]", "[1024, 128]"]),
        (configure(num_hidden_layers=3), ["config.json", "num_hidden_layers"]),
        (more_layers, ["lacks the tensor model.layers.2.input_layernorm.weight and", "more"]),
        (configure(vocab_size=1000), ["lm_head.weight as [1024, 64]", "[1000, 64]"]),
        (configure(num_attention_heads="four"), ["config.json", "num_attention_heads"]),
        (lose_the_tokenizer, ["no tokenizer that loads", "tokenizer.json"]),
        (break_the_tokenizer, ["no tokenizer that loads", "tokenizer.json"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_checkpoint_that_is_damaged(
    damage: Callable[[Path], None], said: list[str], checkpoint: Path, refused: Callable[..., str]
):
    damage(checkpoint)
    line = refused()
    for part in [*said, str(checkpoint)]:
        assert part in line


@pytest.mark.parametrize("name", ["nowhere", "checkpoint", "checkpoint/config.json"])
def test_what_is_no_run_cannot_go_on(name: str, refused: Callable[..., str]):
    assert f"no run at {name}: a run directory holds run.json" in refused("--resume", name)


@pytest.mark.parametrize(
    ("content", "said"),
    [("{", "not JSON"), ('{"schema": 999}', "not of schema"), ('{"schema": 1}', "lacks command, config")],
)
def test_a_run_that_cannot_be_read_cannot_go_on(
    content: str, said: str, tmp_path: Path, refused: Callable[..., str]
):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text(content)
    assert said in refused("--resume", "broken")


def test_a_run_cannot_go_on_with_other_weights(begun: Path, checkpoint: Path, refused: Callable[..., str]):
    file = max(checkpoint.glob("*.safetensors"))
    content = file.read_bytes()
    rewrite(file, content[:-4] + bytes(byte ^ 1 for byte in content[-4:]))
    line = refused("--resume", str(begun))
    assert "begun with checkpoint_sha256" in line
    assert "start a new run" in line


def test_a_run_cannot_go_on_with_another_commit(begun: Path, refused: Callable[..., str]):
    """Its stages would come from two versions, and its record would name the first."""
    records = begun / "records.jsonl"
    first, *rest = records.read_text().splitlines(keepends=True)
    environment = json.loads(first)
    here, environment["commit"] = environment["commit"], "0" * 40
    records.write_text(json.dumps(environment) + "\n" + "".join(rest))
    line = refused("--resume", str(begun))
    assert f"begun with commit {'0' * 40}, here it is {here}" in line
    assert "start a new run" in line


def test_a_run_cannot_go_on_with_another_torch(begun: Path, refused: Callable[..., str]):
    records = begun / "records.jsonl"
    version = metadata.version("torch")  # without +cu130, which torch's own attribute has
    assert f'"torch": "{version}"' in records.read_text()
    records.write_text(records.read_text().replace(f'"torch": "{version}"', '"torch": "2.0.0"'))
    assert f"begun with torch 2.0.0, here it is {version}" in refused("--resume", str(begun))
