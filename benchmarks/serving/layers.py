"""Every layer of this project's path on what vLLM's own layer was fed: its input, its selection, its query and rows."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.serving.plan import Plan, say
from evalkit.attention import backends
from evalkit.attention.backends import Backend
from evalkit.attention.paged_layer import BLOCK
from evalkit.compare.figures.metrics import compare
from evalkit.compare.figures.selection import recall
from evalkit.compare.passes.capture import Capture
from evalkit.kv import RowFormat, Scales

PROBES = frozenset({"values", "output", "selection"})
REPEATED = ("latent", "selection", "values")


@torch.inference_mode()
def native_layers(plan: Plan, model: Any, arm: str, folder: Path) -> None:
    """Writes layers.json, a row for each document and layer; every figure but the last is from what vLLM showed there.

    values, output: relative L2 on vLLM's input; `forced_` with its selection too. recall: of vLLM's selection.
    attended: relative L2 of values on vLLM's query, rows and selection, by this candidate's exact attention;
    kernel_attended: by the kernel of this project's backend, where it is installed. row_bytes_equal: share of bytes written
    alike. rope_at_one: as attended, with the rope read at scale 1.0. projected: relative L2 between values with float32 projections and with the model's own, on the same input and
    selection.
    """
    rows = []
    for number in range(plan.layer_documents):
        file = plan.out / "vllm" / arm / "layers" / f"{number:04}.safetensors"
        theirs = load_file(file, device=str(model.device))
        for layer in range(len(model.evalkit.layers)):
            shown = {name.split(".")[1]: v for name, v in theirs.items() if name.startswith(f"{layer}.")}
            rows.append({"document": number, "layer": layer} | layer_row(model, layer, shown))
    (folder / "layers.json").write_text(json.dumps(rows))
    say(f"{model.evalkit.candidate}: {len(rows)} layers compared")


def layer_row(model: Any, layer: int, theirs: dict[str, Tensor]) -> dict[str, float | None]:
    """One layer's figures, from its tensors [T, ...] in vLLM by name."""
    path, state = model.evalkit.layers[layer], model.evalkit.new_cache().state
    scales = state.scales.get(layer, Scales())
    selection = theirs["selection"].long()
    free = run(model, path, layer, theirs["hidden"])
    forced = run(model, path, layer, theirs["hidden"], selection)
    wide = run(model, copy.deepcopy(path).float(), layer, theirs["hidden"].float(), selection)
    kernel = backends.get("flashinfer" if state.format.name == "fp8_e4m3" else "flashmla")
    heads, topk = path.heads, int(selection.shape[1])
    runs = kernel.unavailable_because(state.format, selection.device, heads, topk) is None
    return {
        "values": distance(free["values"], theirs["values"]),
        "output": distance(free["output"], theirs["output"]),
        "forced_values": distance(forced["values"], theirs["values"]),
        "forced_output": distance(forced["output"], theirs["output"]),
        "recall": float(recall(free["selection"], selection).mean()),
        "attended": distance(attended(path, state.backend, state.format, theirs, scales), theirs["values"]),
        "kernel_attended": distance(attended(path, kernel, state.format, theirs, scales), theirs["values"])
        if runs
        else None,
        # As a reader that leaves the rope's scale out; the same where there is none.
        "rope_at_one": distance(
            attended(path, state.backend, state.format, theirs, replace(scales, rope=1.0)), theirs["values"]
        ),
        "row_bytes_equal": same_bytes(theirs, state.format, scales),
        "projected": distance(wide["values"], forced["values"]),
    }


def repeated(folder: Path, last: int) -> list[dict[str, float]]:
    """The first document shown again by the same engine, as its file `last`: one row a layer; none by another start.

    latent, values: relative L2. recall: of the first selection. in_order: share of tokens whose selections are the same
    in the same order. equal: share of values that are the same bit for bit.
    """
    files = [folder / "layers" / f"{number:04}.safetensors" for number in (0, last)]
    if len({json.loads(file.with_suffix(".json").read_text())["process"] for file in files}) > 1:
        return []  # a step that was stopped in between: another start has more to differ in
    first, again = map(load_file, files)
    rows = []
    for layer in sorted(int(name.split(".")[0]) for name in first if name.endswith(".values")):
        got, ref = ({probe: x[f"{layer}.{probe}"] for probe in REPEATED} for x in (again, first))
        chosen, wanted = got["selection"].long(), ref["selection"].long()
        rows.append(
            {
                "layer": layer,
                "latent": distance(got["latent"], ref["latent"]),
                "recall": float(recall(chosen, wanted).mean()),
                "in_order": float((chosen == wanted).all(1).double().mean()),
                "values": distance(got["values"], ref["values"]),
                "equal": float((got["values"] == ref["values"]).double().mean()),
            }
        )
    return rows


def run(
    model: Any, path: Any, layer: int, hidden: Tensor, selection: Tensor | None = None
) -> dict[str, Tensor]:
    """What the layer makes of hidden [T, D], rounded to bf16 where vLLM rounds, with its own selection or this one."""
    cache = model.evalkit.new_cache()
    cache.state.observer = capture = Capture(PROBES, keep_calls=False)
    if path.kv_b_proj.weight.dtype != torch.bfloat16:
        cache.state.rounding = torch.bfloat16
    if selection is not None:
        cache.state.forced_selection = {layer: selection[None]}
    hidden = hidden[None].to(path.kv_b_proj.weight.dtype)
    positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
    rotary = model.model.rotary_emb(hidden, position_ids=positions)
    path(hidden, position_embeddings=rotary, **cache.argument)
    return capture.joined()


def attended(
    path: Any, backend: Backend, format: RowFormat, theirs: dict[str, Tensor], scales: Scales
) -> Tensor:
    """Values [T, H, V] from vLLM's query, rows and selection."""
    rows, (_, down) = theirs["rows"], path._up_projections()
    query = theirs["query"].view(len(rows), path.heads, -1).to(down.dtype)
    q_latent, q_rope = query.split([format.latent_dim, format.rope_dim], -1)
    cache = rows.new_zeros(-(-len(rows) // BLOCK), BLOCK * format.row_bytes)
    cache.view(-1, format.row_bytes)[: len(rows)] = rows.flatten(1)
    out, _ = backend.attend(
        q_latent.contiguous(),
        q_rope.contiguous(),
        cache,
        format,
        theirs["selection"].int(),
        path.sm_scale,
        scales,
    )
    return torch.einsum("thc,hvc->thv", out.to(down.dtype), down)


def distance(got: Tensor, ref: Tensor) -> float:
    """Relative L2 of got [T, ...] from ref."""
    found = compare(got.flatten(1).float(), ref.flatten(1).float()).relative_l2
    assert found is not None
    return found


def same_bytes(theirs: dict[str, Tensor], format: RowFormat, scales: Scales) -> float:
    """Share of vLLM's row bytes that this project's writer makes of the latent and rope that vLLM's writer rounds."""
    ours = format.encode(theirs["latent"], theirs["rope"], scales)
    return float((ours.view(torch.uint8) == theirs["rows"].view(torch.uint8)).double().mean())
