"""An HF-format checkpoint from the training model, and back: sharded bf16 safetensors as DeepSeek names them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from evalkit.train import tokenizer
from evalkit.train.config import ModelConfig
from evalkit.train.model import Nano

SHARD_BYTES = 12_000_000
INDEX = "model.safetensors.index.json"


def to_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """One matrix per expert, in bf16; the routers' correction biases stay float32."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith("e_score_correction_bias"):
            tensors[name] = tensor.float()
            continue
        tensor = tensor.bfloat16()
        if ".experts." not in name:
            tensors[name] = tensor
            continue
        prefix, part = name.rsplit(".", 1)
        for expert, matrix in enumerate(tensor):
            if part == "gate_up_proj":
                gate, up = matrix.chunk(2)
                tensors[f"{prefix}.{expert}.gate_proj.weight"] = gate
                tensors[f"{prefix}.{expert}.up_proj.weight"] = up
            else:
                tensors[f"{prefix}.{expert}.down_proj.weight"] = matrix
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in sorted(tensors.items())}


def from_hf(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The training model's names again, in float32."""
    state: dict[str, Tensor] = {}
    experts: dict[str, dict[int, dict[str, Tensor]]] = {}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", name)
        if found is None:
            state[name] = tensor.float()
        else:
            experts.setdefault(found[1], {}).setdefault(int(found[2]), {})[found[3]] = tensor.float()
    for prefix, parts in experts.items():
        ordered = [parts[index] for index in range(len(parts))]
        state[f"{prefix}.gate_up_proj"] = torch.stack([torch.cat([p["gate"], p["up"]]) for p in ordered])
        state[f"{prefix}.down_proj"] = torch.stack([p["down"] for p in ordered])
    return state


def export(model: Nano, directory: Path) -> int:
    """Writes the checkpoint and its tokenizer; returns its size in bytes."""
    directory.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    used = 0
    tensors = to_hf(model.state_dict())
    for name, tensor in tensors.items():
        if shards[-1] and used + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            used = 0
        shards[-1][name] = tensor
        used += tensor.nbytes
    for stale in directory.glob("model-*.safetensors"):
        stale.unlink()
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        (directory / file).chmod(0o644)
        places |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    _write_json(directory / INDEX, index)
    config = model.config.to_hf()
    _write_json(directory / "config.json", config)
    ids = {name: config[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    _write_json(directory / "generation_config.json", {"do_sample": False, **ids})
    tokenizer.save(tokenizer.train(), directory)
    return sum(file.stat().st_size for file in directory.iterdir() if file.is_file())


def load(directory: Path) -> Nano:
    """The training model with an exported checkpoint's weights, which are bf16 values in float32."""
    model = Nano(ModelConfig.from_hf(json.loads((directory / "config.json").read_text())))
    places = json.loads((directory / INDEX).read_text())["weight_map"]
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(places.values())):
        tensors |= load_file(directory / file)
    model.load_state_dict(from_hf(tensors))
    return model


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
