"""The same documents on this project's own path, and every layer of it on what vLLM fed its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.serving.layers import native_layers
from benchmarks.serving.plan import BF16, CALIBRATED, FP8, ONE, Plan, say
from evalkit.evaluate.engines.native import NativeEngine

ARM = "SERVING_NATIVE_ARM"  # set in the process that scores this arm


def write_rule(plan: Plan) -> str:
    """Which rule wrote vLLM's fp8_ds_mla rows, told by their scales: powers of two, or any float32."""
    found = load_file(plan.out / "vllm" / FP8 / "layers" / "0000.safetensors")
    rows = torch.cat([value for name, value in found.items() if name.endswith(".rows")])
    scales = rows[:, 512:528].contiguous().view(torch.float32)
    return "fp8_ds_mla" if bool((scales.log2() == scales.log2().round()).all()) else "fp8_ds_mla_fp32scale"


def native_arms(plan: Plan) -> dict[str, str]:
    """This project's candidate for each of vLLM's formats: exact attention that reads as an SM90 kernel does.

    Rows are written as vLLM 0.33.0 writes them.
    """
    read = "@reference+index=fp8+reader=sm90_bf16+write=fused"
    return {
        BF16: "bf16@reference+index=fp8+write=fused",
        FP8: write_rule(plan) + read,
        ONE: f"fp8_e4m3:one{read}",
        CALIBRATED: f"fp8_e4m3:checkpoint{read}",
    }


def native_step(plan: Plan) -> None:
    """Each arm in a process of its own without vLLM, so that no kernel of its version stands in for this project's own.

    A folder `vllm` that is no package, and holds FlashMLA's library alone, stays.
    """
    if not os.environ.get(ARM):
        paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
        kept = [path for path in paths if not Path(path, "vllm", "__init__.py").exists()]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(kept)}
        command = [sys.executable, "-m", "benchmarks.serving", *sys.argv[1:]]

        def one(arm: str) -> None:
            subprocess.run(command, env={**environment, ARM: arm}, check=True)

        with ThreadPoolExecutor(plan.at_once) as pool:
            for future in [pool.submit(one, arm) for arm in (BF16, FP8, ONE, CALIBRATED)]:
                future.result()
        return
    import evalkit

    arm = os.environ[ARM]
    folder = plan.out / "native" / arm
    done = folder / f"done-{plan.documents}-{plan.tokens}-{plan.task_documents}-{plan.layer_documents}"
    if done.exists():
        return
    scales = plan.scales if arm == CALIBRATED else None
    model = evalkit.load(plan.checkpoint, native_arms(plan)[arm], device=plan.device, scales=scales)
    native_answers(plan, model, folder)
    native_logits(plan, model, folder)
    native_layers(plan, model, arm, folder)
    (folder / "candidate").write_text(str(model.evalkit.candidate))
    done.touch()


def native_answers(plan: Plan, model: Any, folder: Path) -> None:
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
            save_file({"logits": out.logits[0].bfloat16().cpu().contiguous()}, file)
    say(f"{model.evalkit.candidate}: {len(plan.forced)} documents' logits")
