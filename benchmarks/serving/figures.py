"""What answers, logits and layers of the two say, as JSON values and as tables."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from benchmarks.serving.layers import repeated
from benchmarks.serving.native import write_rule
from benchmarks.serving.plan import ARMS, BF16, FLOOR, FP8_ARMS, TASK, TASK_LENGTH, Plan, say
from evalkit.evaluate.engines.vllm import ANSWERS, PROOF

WITHIN, RATIO = 3.0, (0.8, 1.25)
RESAMPLES = 4_000


@dataclass(frozen=True)
class Compared:
    """Two sources of logits over the same documents: per document [T - 1] each, of what predicts its later tokens."""

    change: list[np.ndarray]  # |Δ log-probability| of the text's own token
    kl: list[np.ndarray]  # KL divergence of `got` from `ref`, nats


def compared(plan: Plan, got: Path, ref: Path) -> Compared:
    change, kl = [], []
    device = plan.device or ("cuda" if torch.cuda.is_available() else "cpu")
    for number, ids in enumerate(plan.forced):
        a, b = (
            load_file(folder / "logits" / f"{number:04}.safetensors", device=device)["logits"][:-1]
            .double()
            .log_softmax(-1)
            for folder in (got, ref)
        )
        chosen = torch.tensor(ids[1:], device=device)[:, None]
        change.append((a.gather(1, chosen) - b.gather(1, chosen)).abs().flatten().cpu().numpy())
        kl.append((b.exp() * (b - a)).sum(-1).cpu().numpy())
    return Compared(change, kl)


def report_step(plan: Plan) -> dict[str, Any]:
    vllm, native = plan.out / "vllm", plan.out / "native"
    floor = compared(plan, vllm / FLOOR, vllm / BF16)
    ours = compared(plan, native / BF16, vllm / BF16)
    kl = {"floor": mean(floor.kl), "native_bf16_against_vllm": mean(ours.kl)}
    contexts = {"below top-k": slice(0, plan.topk), "above top-k": slice(plan.topk, None)}
    divergences = []
    for arm in FP8_ARMS:
        there = compared(plan, vllm / arm, vllm / BF16)
        here = compared(plan, native / arm, native / BF16)
        divergences.append(
            {"arm": arm, "vllm_nats": mean(there.kl), "native_nats": mean(here.kl)}
            | ratio_of(here.kl, there.kl)
            | {
                "by_context": {
                    name: ratio_of([one[part] for one in here.kl], [one[part] for one in there.kl])
                    for name, part in contexts.items()
                },
                "by_document": {
                    name: [float(one.mean()) for one in source.kl]
                    for name, source in (("native", here), ("vllm", there))
                },
            }
        )
    found: dict[str, Any] = {
        "plan": {
            "documents": plan.documents,
            "tokens": plan.tokens,
            "topk": plan.topk,
            "write_rule": write_rule(plan),
        },
        "proof": {arm: json.loads((vllm / arm / PROOF).read_text()) for arm in ARMS},
        "tasks": task_table(plan),
        "logprobs": [multiple_row(name, ours, floor, part) for name, part in contexts.items()],
        "kl_nats": kl,
        "kl_ratios": divergences,
        "layers": {arm: json.loads((native / arm / "layers.json").read_text()) for arm in (BF16, *FP8_ARMS)},
        "repeated": {arm: repeated(vllm / arm, plan.layer_documents) for arm in ARMS},
    }
    show(found)
    return found


def mean(values: list[np.ndarray]) -> float:
    return float(np.concatenate(values).mean())


def multiple_row(name: str, got: Compared, floor: Compared, part: slice) -> dict[str, Any]:
    """Mean |Δ log-probability| of got over the floor's, at predictions with at most or more than top-k of context."""
    cut = [[one[part] for one in source.change] for source in (got, floor)]
    return {"context": name, "native_nats": mean(cut[0]), "floor_nats": mean(cut[1])} | ratio_of(*cut)


def ratio_of(got: list[np.ndarray], ref: list[np.ndarray]) -> dict[str, float]:
    """Mean over mean, with a 90 % interval: percentiles of a bootstrap by document."""
    a, b = (np.asarray([one.mean() for one in source]) for source in (got, ref))
    drawn = np.random.default_rng(0).integers(0, len(a), (RESAMPLES, len(a)))
    ratios = a[drawn].sum(1) / b[drawn].sum(1)
    low, high = np.quantile(ratios, [0.05, 0.95])
    return {"ratio": float(a.sum() / b.sum()), "low": float(low), "high": float(high)}


def task_table(plan: Plan) -> list[dict[str, Any]]:
    targets = [target.strip().rstrip(".") for _, target in plan.questions]
    reference = json.loads((plan.out / "vllm" / BF16 / "texts.json").read_text())
    rows = []
    for where, arms in (("vllm", ARMS), ("native", (BF16, *FP8_ARMS))):
        for arm in arms:
            texts = json.loads((plan.out / where / arm / "texts.json").read_text())
            rows.append(
                {
                    "engine": where,
                    "arm": arm,
                    "right": float(np.mean([a == b for a, b in zip(texts, targets, strict=True)])),
                    "as_vllm_bf16": float(np.mean([a == b for a, b in zip(texts, reference, strict=True)])),
                    "n": len(texts),
                }
            )
    return rows


def show(found: dict[str, Any]) -> None:
    for arm, proof in found["proof"].items():
        say(f"{arm}: {proof_line(proof)}")
        for line in proof["log"]:
            say(f"    {line}")
    say(f"\nfp8_ds_mla rows are written by the rule {found['plan']['write_rule']}")
    say(f"\n{TASK}, {TASK_LENGTH} tokens: share right, share answered as vLLM's {BF16}")
    for row in found["tasks"]:
        say(
            f"  {row['engine']:7} {row['arm']:31} {row['right']:.3f}  {row['as_vllm_bf16']:.3f}  n {row['n']}"
        )
    say(f"\n|Δ log-probability| of native bf16+index=fp8 from vLLM's {BF16}; want at most {WITHIN} floors")
    for row in found["logprobs"]:
        fine = "ok" if row["high"] <= WITHIN else "OVER"
        say(
            f"  {row['context']}: {row['native_nats']:.5f} over a floor of {row['floor_nats']:.5f} nats = "
            f"{row['ratio']:.2f} (90 % {row['low']:.2f} to {row['high']:.2f})  {fine}"
        )
    say("\nmean KL divergence, nats: " + ", ".join(f"{k} {v:.3e}" for k, v in found["kl_nats"].items()))
    say(f"mean KL divergence from bf16, native over vLLM's; want {RATIO[0]} to {RATIO[1]}")
    for row in found["kl_ratios"]:
        fine = "ok" if RATIO[0] <= row["low"] <= row["high"] <= RATIO[1] else "OUT"
        say(
            f"  {row['arm']:31} {row['native_nats']:.3e} over {row['vllm_nats']:.3e} nats = {row['ratio']:.3f} "
            f"(90 % {row['low']:.3f} to {row['high']:.3f})  {fine}"
        )
        for context, part in row["by_context"].items():
            say(f"    {context}: {part['ratio']:.3f} (90 % {part['low']:.3f} to {part['high']:.3f})")
    say("\nlayers on vLLM's own input, relative L2 (with vLLM's selection in brackets), selection recall")
    for arm, rows in found["layers"].items():
        for layer in sorted({row["layer"] for row in rows}):
            of = [row for row in rows if row["layer"] == layer]
            at = {
                key: float(np.mean([row[key] for row in of])) if of[0][key] is not None else None
                for key in of[0]
            }
            say(
                f"  {arm:31} layer {layer}: values {at['values']:.2e} ({at['forced_values']:.2e}), output "
                f"{at['output']:.2e} ({at['forced_output']:.2e}), recall {at['recall']:.5f}, row bytes equal "
                f"{at['row_bytes_equal']:.6f}; on vLLM's query and rows: exact attention {at['attended']:.2e} "
                f"(rope at scale 1.0: {at['rope_at_one']:.2e}), "
                f"the kernel {'n/a' if at['kernel_attended'] is None else format(at['kernel_attended'], '.2e')}; "
                f"projections in float32 would change values by {at['projected']:.2e}"
            )

    say("\nthe first text shown again by the same engine: what its second time differs in")
    for arm, rows in found["repeated"].items():
        for row in rows:
            say(
                f"  {arm:31} layer {row['layer']}: latent {row['latent']:.2e}, selection recall {row['recall']:.5f}, in the same "
                f"order {row['in_order']:.3f} of tokens, values {row['values']:.2e}, {row['equal']:.3f} of them bit for bit"
            )


def proof_line(proof: dict[str, Any]) -> str:
    first = proof["layers"][0]
    return (
        f"vLLM {proof['vllm']}, {first['backend']}, {first['row_bytes']} bytes a token ({first['cache_dtype']}), "
        f"k_scale {sorted({layer['k_scale'] for layer in proof['layers']})}, start {proof['start_s']:.1f} s"
    )


def answers(folder: Path) -> dict[str, list[int]]:
    lines = (folder / ANSWERS).read_text().splitlines()[1:]
    return {one["key"]: one["answer"]["ids"] for one in map(json.loads, lines)}
