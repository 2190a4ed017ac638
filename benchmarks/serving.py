"""This project's own path against vLLM's: the same checkpoint, tokens and formats, in the serving engine and here.

    PYTHONPATH=SITE python -m benchmarks.serving OUT --json serving.json

with vLLM in SITE (or installed) runs on one GPU, in steps that are skipped once their files are in OUT:

    vllm       every arm in a vLLM of its own: answers to task documents, logits of forced text, layers
    native     the same documents on this project's path
    report     tables: task answers; |Δ log-probability| below and above top-k in multiples of vLLM's own floor;
               KL divergence of fp8 from bf16 here over there, with an interval; layers
    two-gpus   two arms at once on two GPUs against one after the other; engine starts count (not in the default)

`--step NAME` runs one of them. The floor is vLLM's bf16 on FlashMLA against its bf16 on FlashAttention.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from evalkit.evaluate.engines.base import Label, Prompt
from evalkit.evaluate.engines.launch import launch
from evalkit.evaluate.engines.vllm import ANSWERS, PROOF, VllmEngine
from evalkit.kv import Scales
from evalkit.model.load import resolve_checkpoint

BF16, FLOOR, FP8 = "bf16@flashmla", "bf16@flash_attn", "fp8_ds_mla@flashmla"
ARMS = (BF16, FLOOR, FP8)
STEPS = ("vllm", "native", "report")
TASK, TASK_LENGTH, MAX_NEW, KEYS = "multi_key", 1024, 8, 120
FORCED = ("multi_key", "registers")  # texts whose every token is scored, in turn
SEED = 4_000
WITHIN, RATIO, SIDE_BY_SIDE = 3.0, (0.8, 1.25), 0.6
RESAMPLES = 4_000
MAX_LENGTH_STEP, MEMORY_SHARE = 4096, 0.4


@dataclass(frozen=True)
class Plan:
    """What is run: the checkpoint, how many documents of what length, and where files go."""

    out: Path
    checkpoint: Path
    documents: int
    tokens: int
    task_documents: int
    layer_documents: int
    device: str | None

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.checkpoint)

    @cached_property
    def topk(self) -> int:
        return int(json.loads((self.checkpoint / "config.json").read_text())["index_topk"])

    @cached_property
    def forced(self) -> list[list[int]]:
        """Token ids [tokens] of the documents whose every token is scored."""
        found = []
        for number in range(self.documents):
            made = written(FORCED[number % len(FORCED)], self.tokens, number)
            ids = self.tokenizer(f"{made.prompt}{made.target}")["input_ids"]
            found.append(ids[-self.tokens :])
        return found

    @cached_property
    def questions(self) -> list[tuple[list[int], str]]:
        """Prompts of the task, and their targets."""
        length = min(TASK_LENGTH, self.tokens)
        made = [written(TASK, length, number) for number in range(self.task_documents)]
        return [(self.tokenizer(one.prompt)["input_ids"], one.target) for one in made]

    @property
    def prompts(self) -> list[Prompt]:
        return [
            Prompt(label=Label(TASK, number), ids=ids, max_new=MAX_NEW, until=["."])
            for number, (ids, _) in enumerate(self.questions)
        ]

    def engine(self, arm: str, folder: Path, gpus: tuple[int, ...] = ()) -> VllmEngine:
        length = max(self.tokens, TASK_LENGTH) + MAX_NEW
        size = -(-length // MAX_LENGTH_STEP) * MAX_LENGTH_STEP
        return VllmEngine(
            launch(self.checkpoint, arm, max_length=size, memory_share=MEMORY_SHARE, gpus=gpus), folder
        )

    def texts(self, ids: dict[int, list[int]]) -> list[str]:
        return [self.tokenizer.decode(ids[number]).split(".")[0].strip() for number in sorted(ids)]


def written(task: str, length: int, number: int) -> Any:
    """Document `number` of a task, with as many keys as there is room for, up to KEYS."""
    from tasks.documents import document

    options = {"keys": min(KEYS, length * KEYS // TASK_LENGTH)} if task == "multi_key" else {}
    return document(task, length, SEED, number, **options)


def vllm_step(plan: Plan) -> None:
    for arm in ARMS:
        folder = plan.out / "vllm" / arm
        began = time.perf_counter()
        with plan.engine(arm, folder) as engine:
            answers = dict(engine.generate(plan.prompts))
            say(f"{arm}: {len(answers)} answers after {time.perf_counter() - began:.1f} s")
            engine.keep(plan.forced)
            say(f"{arm}: {len(plan.forced)} documents' logits after {time.perf_counter() - began:.1f} s")
            engine.keep(plan.forced[: plan.layer_documents], layers=True)
            if engine.proof:
                say(f"{arm}: " + proof_line(engine.proof))
        ids = {number: list(answer.ids) for number, answer in answers.items()}
        (folder / "texts.json").write_text(json.dumps(plan.texts(ids)))


def proof_line(proof: dict[str, Any]) -> str:
    first = proof["layers"][0]
    return (
        f"vLLM {proof['vllm']}, {first['backend']}, {first['row_bytes']} bytes a token ({first['cache_dtype']}), "
        f"k_scale {sorted({layer['k_scale'] for layer in proof['layers']})}, start {proof['start_s']:.1f} s"
        + "".join(f"; repaired: {one}" for one in proof["repairs"])
    )


def write_rule(plan: Plan) -> str:
    """Which rule wrote vLLM's fp8_ds_mla rows, told by their scales: powers of two, or any float32."""
    found = load_file(plan.out / "vllm" / FP8 / "layers" / "0000.safetensors")
    rows = torch.cat([value for name, value in found.items() if name.endswith(".rows")])
    scales = rows[:, 512:528].contiguous().view(torch.float32)
    return "fp8_ds_mla" if bool((scales.log2() == scales.log2().round()).all()) else "fp8_ds_mla_fp32scale"


def native_arms(plan: Plan) -> dict[str, str]:
    """This project's candidate for each of vLLM's formats: exact attention that reads as an SM90 kernel does."""
    return {
        BF16: "bf16@reference+index=fp8",
        FP8: f"{write_rule(plan)}@reference+index=fp8+reader=sm90_bf16",
    }


def native_step(plan: Plan) -> None:
    """In a process without vLLM's folder, so that no kernel of its version stands in for this project's own."""
    if not os.environ.get("SERVING_NATIVE"):
        paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
        kept = [path for path in paths if not Path(path, "vllm").is_dir()]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(kept), "SERVING_NATIVE": "1"}
        command = [sys.executable, "-m", "benchmarks.serving", *sys.argv[1:], "--step", "native"]
        subprocess.run(command, env=environment, check=True)
        return
    import evalkit

    for arm, candidate in native_arms(plan).items():
        folder = plan.out / "native" / arm
        done = folder / f"done-{plan.documents}-{plan.tokens}-{plan.task_documents}-{plan.layer_documents}"
        if done.exists():
            continue
        model = evalkit.load(plan.checkpoint, candidate, device=plan.device)
        native_answers(plan, model, folder)
        native_logits(plan, model, folder)
        native_layers(plan, model, arm, folder)
        (folder / "candidate").write_text(str(model.evalkit.candidate))
        done.touch()


def native_answers(plan: Plan, model: Any, folder: Path) -> None:
    from evalkit.evaluate.engines.native import NativeEngine

    folder.mkdir(parents=True, exist_ok=True)
    engine = NativeEngine(model, batch_size=16, tokenizer=plan.tokenizer)
    ids = {number: list(answer.ids) for number, answer in engine.generate(plan.prompts)}
    (folder / "texts.json").write_text(json.dumps(plan.texts(ids)))
    say(f"{model.evalkit.candidate}: {len(ids)} answers")


@torch.inference_mode()
def native_logits(plan: Plan, model: Any, folder: Path) -> None:
    (folder / "logits").mkdir(parents=True, exist_ok=True)
    for number, ids in enumerate(plan.forced):
        file = folder / "logits" / f"{number:04}.safetensors"
        if not file.exists():
            out = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
            save_file({"logits": out.logits[0, :-1].bfloat16().cpu().contiguous()}, file)
    say(f"{model.evalkit.candidate}: {len(plan.forced)} documents' logits")


@torch.inference_mode()
def native_layers(plan: Plan, model: Any, arm: str, folder: Path) -> None:
    """Every layer on vLLM's own input to it, with its own selection and with vLLM's."""
    from evalkit.compare.capture import Capture
    from evalkit.compare.metrics import compare

    probes = frozenset({"values", "output", "selection"})
    rows = []
    for number in range(plan.layer_documents):
        theirs = load_file(
            plan.out / "vllm" / arm / "layers" / f"{number:04}.safetensors", device=str(model.device)
        )
        for layer, path in enumerate(model.evalkit.layers):
            hidden = theirs[f"{layer}.hidden"][None].to(model.dtype)
            positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
            row: dict[str, Any] = {"document": number, "layer": layer}
            selection = theirs[f"{layer}.selection"].long()
            for forced in (False, True):
                cache = model.evalkit.new_cache()
                cache.state.observer = capture = Capture(probes, keep_calls=False)
                if forced:
                    cache.state.forced_selection = {layer: selection[None]}
                path(
                    hidden,
                    position_embeddings=model.model.rotary_emb(hidden, position_ids=positions),
                    past_key_values=cache,
                )
                ours = capture.joined()
                name = "forced_" if forced else ""
                for probe in ("values", "output"):
                    got, ref = ours[probe].flatten(1), theirs[f"{layer}.{probe}"].flatten(1)
                    row[name + probe] = compare(got.float(), ref.float()).relative_l2
                if not forced:
                    row["recall"] = recall(ours["selection"], selection)
            row["row_bytes_equal"] = same_bytes(theirs, layer, cache.state.format)
            rows.append(row)
    (folder / "layers.json").write_text(json.dumps(rows))
    say(f"{model.evalkit.candidate}: {len(rows)} layers compared")


def recall(got: Tensor, ref: Tensor) -> float:
    """Share of the reference's columns [T, K] that are in got [T, K]; -1 is none."""
    width = int(max(got.max(), ref.max())) + 2
    seen = torch.zeros(len(ref), width, dtype=torch.bool, device=ref.device)
    seen.scatter_(1, got.long() + 1, True)
    wanted = ref >= 0
    return float((seen.gather(1, ref + 1) & wanted).sum() / wanted.sum())


def same_bytes(theirs: dict[str, Tensor], layer: int, format: Any) -> float:
    """Share of vLLM's row bytes that this project's writer makes of vLLM's own latent and rope."""
    ours = format.encode(theirs[f"{layer}.latent"], theirs[f"{layer}.rope"], Scales())
    return float((ours.view(torch.uint8) == theirs[f"{layer}.rows"].view(torch.uint8)).float().mean())


@dataclass(frozen=True)
class Compared:
    """Two sources of logits over the same documents: per document [T - 1] each."""

    change: list[np.ndarray]  # |Δ log-probability| of the text's own token
    kl: list[np.ndarray]  # KL divergence of `got` from `ref`, nats


def compared(plan: Plan, got: Path, ref: Path) -> Compared:
    change, kl = [], []
    device = plan.device or ("cuda" if torch.cuda.is_available() else "cpu")
    for number, ids in enumerate(plan.forced):
        a, b = (
            load_file(folder / "logits" / f"{number:04}.safetensors", device=device)["logits"]
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
    there, here = (
        compared(plan, vllm / FP8, vllm / BF16),
        compared(plan, native / FP8, native / BF16),
    )
    kl = {
        "floor": mean(floor.kl),
        "vllm_fp8": mean(there.kl),
        "native_fp8": mean(here.kl),
        "native_bf16_against_vllm": mean(ours.kl),
    }
    ratio = ratio_of(here.kl, there.kl)
    found: dict[str, Any] = {
        "plan": {
            "documents": plan.documents,
            "tokens": plan.tokens,
            "topk": plan.topk,
            "write_rule": write_rule(plan),
        },
        "proof": {arm: json.loads((vllm / arm / PROOF).read_text()) for arm in ARMS},
        "tasks": task_table(plan),
        "logprobs": [
            multiple_row("below top-k", ours, floor, slice(0, plan.topk)),
            multiple_row("above top-k", ours, floor, slice(plan.topk, None)),
        ],
        "kl_nats": kl,
        "kl_ratio": ratio,
        "kl_by_document": {
            name: [float(one.mean()) for one in source.kl] for name, source in (("native", here), ("vllm", there))
        },
        "kl_ratio_by_context": {
            name: ratio_of([one[part] for one in here.kl], [one[part] for one in there.kl])
            for name, part in (
                ("below top-k", slice(0, plan.topk)),
                ("above top-k", slice(plan.topk, None)),
            )
        },
        "layers": {arm: json.loads((native / arm / "layers.json").read_text()) for arm in (BF16, FP8)},
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
    for where, arms in (("vllm", ARMS), ("native", (BF16, FP8))):
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
            f"  {row['engine']:7} {row['arm']:22} {row['right']:.3f}  {row['as_vllm_bf16']:.3f}  n {row['n']}"
        )
    say(f"\n|Δ log-probability| of native bf16+index=fp8 from vLLM's {BF16}; want at most {WITHIN} floors")
    for row in found["logprobs"]:
        fine = "ok" if row["high"] <= WITHIN else "OVER"
        say(
            f"  {row['context']}: {row['native_nats']:.5f} over a floor of {row['floor_nats']:.5f} nats = "
            f"{row['ratio']:.2f} (90 % {row['low']:.2f} to {row['high']:.2f})  {fine}"
        )
    say("\nmean KL divergence, nats: " + ", ".join(f"{k} {v:.3e}" for k, v in found["kl_nats"].items()))
    ratio = found["kl_ratio"]
    fine = "ok" if RATIO[0] <= ratio["low"] <= ratio["high"] <= RATIO[1] else "OUT"
    say(
        f"  native over vLLM's, fp8_ds_mla from bf16: {ratio['ratio']:.3f} "
        f"(90 % {ratio['low']:.3f} to {ratio['high']:.3f}); want {RATIO[0]} to {RATIO[1]}  {fine}"
    )
    for context, part in found["kl_ratio_by_context"].items():
        say(f"    {context}: {part['ratio']:.3f} (90 % {part['low']:.3f} to {part['high']:.3f})")
    say("\nlayers on vLLM's own input, relative L2 (with vLLM's selection in brackets), selection recall")
    for arm, rows in found["layers"].items():
        for layer in sorted({row["layer"] for row in rows}):
            of = [row for row in rows if row["layer"] == layer]
            at = {key: float(np.mean([row[key] for row in of])) for key in of[0]}
            say(
                f"  {arm:22} layer {layer}: values {at['values']:.2e} ({at['forced_values']:.2e}), output "
                f"{at['output']:.2e} ({at['forced_output']:.2e}), recall {at['recall']:.5f}, row bytes equal "
                f"{at['row_bytes_equal']:.6f}"
            )


def two_gpus_step(plan: Plan) -> dict[str, Any]:
    """BF16 and FP8, one after the other on the first GPU, then at once on two; fresh folders, so nothing is kept."""
    base = plan.out / "two-gpus" / f"{int(time.time())}"
    say(f"{len(plan.prompts)} prompts, {len(plan.forced)} documents")  # made before the clock starts

    def one(arm: str, folder: Path, gpu: int) -> float:
        began = time.perf_counter()
        with plan.engine(arm, folder, (gpu,)) as engine:
            dict(engine.generate(plan.prompts))
            engine.keep(plan.forced)
        return time.perf_counter() - began

    if not (plan.out / "vllm" / FP8 / "texts.json").exists():
        # A first start compiles kernels, which all later ones find.
        say(f"warm-up: {sum(one(arm, base / 'warm-up' / arm, 0) for arm in (BF16, FP8)):.1f} s")
    began = time.perf_counter()
    alone = [one(arm, base / "after" / arm, 0) for arm in (BF16, FP8)]
    after_s = time.perf_counter() - began
    began = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(one, arm, base / "at-once" / arm, gpu) for gpu, arm in enumerate((BF16, FP8))]
        beside = [future.result() for future in futures]
    at_once_s = time.perf_counter() - began
    found = {
        "one_after_the_other_s": after_s,
        "at_once_s": at_once_s,
        "share": at_once_s / after_s,
        "each_alone_s": alone,
        "each_at_once_s": beside,
        "answers_equal": [
            answers(base / "after" / arm) == answers(base / "at-once" / arm) for arm in (BF16, FP8)
        ],
    }
    fine = "ok" if found["share"] <= SIDE_BY_SIDE else "OVER"
    say(
        f"two candidates at once on two GPUs {at_once_s:.1f} s, one after the other {after_s:.1f} s: "
        f"{found['share']:.2f}, want at most {SIDE_BY_SIDE}  {fine}; each alone "
        f"{', '.join(f'{s:.1f}' for s in alone)} s; same answers: {found['answers_equal']}"
    )
    return found


def answers(folder: Path) -> dict[str, list[int]]:
    lines = (folder / ANSWERS).read_text().splitlines()[1:]
    return {one["key"]: one["answer"]["ids"] for one in map(json.loads, lines)}


def say(text: str) -> None:
    print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--step", choices=[*STEPS, "two-gpus"], action="append")
    parser.add_argument("--checkpoint", default="dsa-nano")
    parser.add_argument("--documents", type=int, default=96, help="of forced text")
    parser.add_argument("--tokens", type=int, default=2048, help="of each")
    parser.add_argument("--task-documents", type=int, default=64)
    parser.add_argument("--layer-documents", type=int, default=2)
    parser.add_argument("--device", help="of the native arms; default: the GPU where there is one")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    plan = Plan(
        args.out.resolve(),
        resolve_checkpoint(args.checkpoint).resolve(),
        args.documents,
        args.tokens,
        args.task_documents,
        args.layer_documents,
        args.device,
    )
    found: dict[str, Any] = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    for step in [args.step[-1]] if args.step else STEPS:
        began = time.perf_counter()
        if step == "vllm":
            vllm_step(plan)
        elif step == "native":
            native_step(plan)
        elif step == "report":
            found |= report_step(plan)
        else:
            found["two_gpus"] = two_gpus_step(plan)
        if not os.environ.get("SERVING_NATIVE"):
            say(f"[{step}: {time.perf_counter() - began:.1f} s]")
    if args.json and not os.environ.get("SERVING_NATIVE"):
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
