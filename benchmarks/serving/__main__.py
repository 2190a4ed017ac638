"""This project's own path against vLLM's: the same checkpoint, tokens and formats, in the serving engine and here.

    PYTHONPATH=SITE python -m benchmarks.serving OUT --checkpoint CHECKPOINT --json serving.json

with vLLM in SITE (or installed) runs on one GPU, in steps that are skipped once their files are in OUT. The checkpoint
has to carry scales (`evalkit calibrate --into CHECKPOINT`), for the arm that stores rows at them:

    vllm       every arm in a vLLM of its own: answers to task documents, logits of forced text, layers
    native     the same documents on this project's path
    report     tables: task answers; |Δ log-probability| below and above top-k in multiples of vLLM's own floor;
               KL divergence of fp8 from bf16 here over there, with an interval; layers
    two-gpus   two arms at once on two GPUs against one after the other; engine starts count (not in the default)

`--step NAME`, as often as wanted, runs those. The floor is vLLM's bf16 on FlashMLA against its bf16 on FlashAttention.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.serving.figures import answers, proof_line, report_step
from benchmarks.serving.native import ARM, native_step
from benchmarks.serving.plan import ARMS, BF16, FP8, Plan, say
from evalkit.model.checkpoint import resolve_checkpoint

STEPS = ("vllm", "native", "report")
SIDE_BY_SIDE = 0.6


def vllm_step(plan: Plan) -> None:
    """Every arm in an engine of its own, `plan.at_once` of them at once."""
    say(f"{len(plan.prompts)} prompts, {len(plan.forced)} documents")  # made before threads ask for them

    def one(arm: str) -> None:
        folder = plan.out / "vllm" / arm
        began = time.perf_counter()
        with plan.engine(arm, folder) as engine:
            answers = dict(engine.generate(plan.prompts))
            say(f"{arm}: {len(answers)} answers after {time.perf_counter() - began:.1f} s")
            engine.keep(plan.forced)
            say(f"{arm}: {len(plan.forced)} documents' logits after {time.perf_counter() - began:.1f} s")
            shown = plan.forced[: plan.layer_documents]
            # The first of them once more, by the same engine.
            engine.keep([*shown, *shown[:1]], layers=True, operands=True)
            if engine.proof:
                say(f"{arm}: " + proof_line(engine.proof))
        ids = {number: list(answer.ids) for number, answer in answers.items()}
        (folder / "texts.json").write_text(json.dumps(plan.texts(ids)))

    with ThreadPoolExecutor(plan.at_once) as pool:
        for future in [pool.submit(one, arm) for arm in ARMS]:
            future.result()


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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--step",
        choices=[*STEPS, "two-gpus"],
        action="append",
        help="may be repeated; default: the first three",
    )
    parser.add_argument("--checkpoint", default="dsa-nano")
    parser.add_argument("--documents", type=int, default=96, help="of forced text")
    parser.add_argument("--tokens", type=int, default=2048, help="of each")
    parser.add_argument("--task-documents", type=int, default=64)
    parser.add_argument("--layer-documents", type=int, default=2)
    parser.add_argument("--device", help="of the native arms; default: the GPU where there is one")
    parser.add_argument(
        "--at-once", type=int, default=1, help="engines on one GPU at once, and arms of this project's own"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    inside = ARM in os.environ  # in a process that the step native starts
    plan = Plan(
        args.out.resolve(),
        resolve_checkpoint(args.checkpoint).resolve(),
        args.documents,
        args.tokens,
        args.task_documents,
        args.layer_documents,
        args.device,
        args.at_once,
    )
    found: dict[str, Any] = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    for step in ["native"] if inside else args.step or STEPS:
        began = time.perf_counter()
        if step == "vllm":
            vllm_step(plan)
        elif step == "native":
            native_step(plan)
        elif step == "report":
            found |= report_step(plan)
        else:
            found["two_gpus"] = two_gpus_step(plan)
        if not inside:
            say(f"[{step}: {time.perf_counter() - began:.1f} s]")
    if args.json and not inside:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
