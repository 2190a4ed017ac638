"""How fast documents are answered: transformers' `generate`, the native engine, and each further candidate.

    python -m benchmarks.engine --json engine.json
    python -m benchmarks.engine --task evalkit_multi_key_1024 --documents 4 --batch-sizes 2,4 --batch-size 2

Rates count tokenising and generating the same documents, not loading. `generate` runs the plain checkpoint with eager
attention in one batch of each size tried, the largest first, of the first so many documents, and its best rate counts.
It ends at any token that prints a stop string, which is cheaper than the strings. Answers of one candidate alone, in a
model of its own, must be those that it gives after others; the command fails where they are not. Where the time of the
first candidate goes is measured in a pass of its own, which waits for the device.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lm_eval.models.utils import postprocess_generated_text

import evalkit
from evalkit import environment
from evalkit.errors import InputError
from evalkit.evaluate import lm as lm_module
from evalkit.evaluate.engines.decoding import Decoder
from evalkit.evaluate.lm import EvalkitLM
from evalkit.evaluate.tasks import load_tasks
from evalkit.model.checkpoint import resolve_checkpoint

BATCH_SIZES = (256, 128, 64, 32, 16, 8)
WARM_UP_TOKENS = 24  # more than one round of steps, so that what is recorded once is


def main(argv: Sequence[str] | None = None) -> int:
    options = _options(argv)
    device = torch.device(options.device)
    environment.exact_numerics()
    (task,) = load_tasks((options.task,), options.documents, options.seed)
    task.build_all_requests(limit=options.documents, rank=0, world_size=1)
    requests = task.instances
    if any(request.request_type != "generate_until" for request in requests):
        raise InputError(f"{options.task} generates nothing: name a task that does")
    targets = [str(task.doc_to_target(doc)).strip() for doc in task.eval_docs][: options.documents]

    say(f"{options.task}, {len(requests)} documents, {describe(device)}")
    checkpoint = resolve_checkpoint(options.checkpoint)
    baseline = transformers_rates(checkpoint, device, requests, options)
    found: dict[str, dict[str, Any]] = {}
    for candidate in options.candidates:
        say(f"{candidate} alone")
        found[candidate] = alone(checkpoint, device, candidate, requests, options)
    say("all together")
    added, together, halves, spent = all_together(checkpoint, device, requests, options)
    best = max((row["per_s"] for row in baseline["sizes"] if row["per_s"] is not None), default=None)
    for candidate, row in found.items():
        row |= {
            "per_s": len(requests) / row["answer_s"],
            "added_s": added[candidate],
            "added_per_s": len(requests) / added[candidate],
            "same_alone_and_together": row["texts"] == together[candidate],
            "flips_at_half_the_batch": sum(
                a != b for a, b in zip(together[candidate], halves[candidate], strict=True)
            )
            if candidate in halves
            else None,
            "right": sum(a.strip() == b for a, b in zip(row["texts"], targets, strict=False)),
            "as_transformers": sum(a == b for a, b in zip(row["texts"], baseline["texts"], strict=False)),
        }
        row["over_transformers"] = None if best is None else row["per_s"] / best
        row["together_over_transformers"] = None if best is None else row["added_per_s"] / best
    result = {
        "task": options.task,
        "documents": len(requests),
        "device": describe(device),
        "batch_size": options.batch_size,
        "torch": torch.__version__,
        "transformers": {key: value for key, value in baseline.items() if key != "texts"}
        | {"best_per_s": best},
        "candidates": {
            name: {key: value for key, value in row.items() if key != "texts"} for name, row in found.items()
        },
        "spent": spent,
    }
    show(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if all(row["same_alone_and_together"] for row in found.values()) else 1


def transformers_rates(
    checkpoint: Path, device: torch.device, requests: Sequence[Any], options: Any
) -> dict[str, Any]:
    """`generate` on the plain checkpoint: documents a second at every batch size tried, and its texts."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # A CPU multiplies bf16 so slowly that nobody would choose it.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, attn_implementation="eager")
    model = model.to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
    until = requests[0].args[1]["until"]
    stops = {model.generation_config.eos_token_id, tokenizer.eos_token_id} - {None}
    stops |= {
        token for token in range(len(tokenizer)) if any(stop in tokenizer.decode([token]) for stop in until)
    }
    limit = int(requests[0].args[1]["max_gen_toks"])

    @torch.inference_mode()
    def answer(texts: Sequence[str], most: int) -> list[str]:
        batch = tokenizer(list(texts), return_tensors="pt", padding=True).to(device)
        out = model.generate(**batch, max_new_tokens=most, do_sample=False, eos_token_id=sorted(stops))
        said = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        return [postprocess_generated_text(text, list(until), think_end_token=None) for text in said]

    prompts = [request.args[0] for request in requests]
    rows: list[dict[str, Any]] = []
    texts: list[str] = []
    started = time.perf_counter()
    answer(prompts[:2], WARM_UP_TOKENS)
    for size in options.batch_sizes:
        if rows and time.perf_counter() - started > options.baseline_seconds:
            say(f"transformers, no batch of {size}: its {options.baseline_seconds:.0f} seconds are over")
            break
        batch = prompts[:size]
        synchronize(device)
        before = time.perf_counter()
        try:
            said = answer(batch, limit)
        except torch.OutOfMemoryError:
            rows.append({"batch_size": size, "documents": len(batch), "seconds": None, "per_s": None})
            say(f"transformers, batch of {size}: out of memory")
            continue
        finally:
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        seconds = time.perf_counter() - before
        texts = said if len(said) >= len(texts) else texts
        rows.append(
            {
                "batch_size": len(batch),
                "documents": len(batch),
                "seconds": seconds,
                "per_s": len(batch) / seconds,
            }
        )
        say(f"transformers, batch of {size}: {len(batch) / seconds:.2f} documents/s")
    return {"dtype": str(dtype), "sizes": rows, "texts": texts}


def alone(
    checkpoint: Path, device: torch.device, candidate: str, requests: Sequence[Any], options: Any
) -> dict[str, Any]:
    """One candidate in a model of its own: seconds to load and to answer."""
    lm_module._PROMPTS.clear()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    synchronize(device)
    started = time.perf_counter()
    model = evalkit.load(checkpoint, device=device)
    loaded = time.perf_counter()
    lm = EvalkitLM(model, candidate=candidate, batch_size=options.batch_size)
    warm_up(lm, requests)
    warm = time.perf_counter()
    lm_module._PROMPTS.clear()
    lm = EvalkitLM(model, candidate=candidate, batch_size=options.batch_size)
    texts = lm.generate_until(list(requests), disable_tqdm=True)
    synchronize(device)
    ended = time.perf_counter()
    tokens = sum(one.scored_tokens for one in lm.coverage)
    say(f"  {len(requests) / (ended - warm):.2f} documents/s, {tokens / (ended - warm):.0f} tokens/s")
    return {
        "load_s": loaded - started,
        "warm_up_s": warm - loaded,
        "answer_s": ended - warm,
        "generated_tokens": tokens,
        "longest_answer": max(one.scored_tokens for one in lm.coverage),
        "ended_at_limit": sum(bool(one.truncated) for one in lm.coverage),
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "texts": texts,
    }


def all_together(
    checkpoint: Path, device: torch.device, requests: Sequence[Any], options: Any
) -> tuple[dict[str, float], dict[str, list[str]], dict[str, list[str]], dict[str, float]]:
    """Every candidate on one model, one after the other.

    Returns:
        Seconds that each added, its texts, the first one's at half the batch, and where the first one's time goes.
    """
    lm_module._PROMPTS.clear()
    model = evalkit.load(checkpoint, device=device)
    added, texts, halves = {}, {}, {}
    for candidate in options.candidates:
        synchronize(device)
        started = time.perf_counter()
        lm = EvalkitLM(model, candidate=candidate, batch_size=options.batch_size)
        texts[candidate] = lm.generate_until(list(requests), disable_tqdm=True)
        synchronize(device)
        added[candidate] = time.perf_counter() - started
        say(f"  {candidate} adds {added[candidate]:.2f} s")
    first = options.candidates[0]
    half = max(1, min(options.batch_size, len(requests)) // 2)
    halves[first] = EvalkitLM(model, candidate=first, batch_size=half).generate_until(
        list(requests), disable_tqdm=True
    )
    lm = EvalkitLM(model, candidate=first, batch_size=options.batch_size)
    with spending(device) as spent:
        lm.generate_until(list(requests), disable_tqdm=True)
    return added, texts, halves, spent


@contextmanager
def spending(device: torch.device) -> Iterator[dict[str, float]]:
    """Within the block, seconds of prefilling and of stepping, each to its end on the device, and their numbers."""
    spent = {"fills": 0.0, "fill_s": 0.0, "steps": 0.0, "step_s": 0.0}
    fill, steps = Decoder.fill, Decoder.steps

    def timed_fill(self: Decoder, *given: Any) -> None:
        synchronize(device)
        before = time.perf_counter()
        fill(self, *given)
        synchronize(device)
        spent["fills"] += 1
        spent["fill_s"] += time.perf_counter() - before

    def timed_steps(self: Decoder, count: int) -> list[list[int]]:
        before = time.perf_counter()
        tokens = steps(self, count)
        spent["steps"] += count
        spent["step_s"] += time.perf_counter() - before
        return tokens

    with patch.multiple(Decoder, fill=timed_fill, steps=timed_steps):
        yield spent


def warm_up(lm: EvalkitLM, requests: Sequence[Any]) -> None:
    """Compile what is compiled once a process."""
    few = []
    for request in requests[: max(2, min(8, lm.batch_size))]:
        text, wanted = request.args
        few.append(
            lm._prompt(type(request)(**vars_of(request, (text, wanted | {"max_gen_toks": WARM_UP_TOKENS}))))
        )
    for _ in lm.engine.generate(few):
        pass


def vars_of(request: Any, arguments: tuple[Any, ...]) -> dict[str, Any]:
    """What makes an lm-eval request like this one, with other arguments."""
    return {
        "request_type": request.request_type,
        "doc": request.doc,
        "arguments": arguments,
        "idx": request.idx,
        "metadata": (request.task_name, request.doc_id, request.repeats),
    }


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def show(result: dict[str, Any]) -> None:
    """The table, in Markdown."""
    n = result["documents"]
    print(f"\n{result['task']}, {n} documents, {result['device']}, batches of {result['batch_size']}\n")
    print(
        "| engine | documents/s | over transformers | load + answer s | adds s | right | as transformers | alone = together |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---|")
    for row in result["transformers"]["sizes"]:
        rate = "out of memory" if row["per_s"] is None else f"{row['per_s']:.2f}"
        print(f"| transformers generate, batch of {row['batch_size']} | {rate} | | | | | | |")
    compared = max((row["documents"] for row in result["transformers"]["sizes"] if row["per_s"]), default=0)
    for name, row in result["candidates"].items():
        over = "n/a" if row["over_transformers"] is None else f"{row['over_transformers']:.2f}x"
        print(
            f"| native {name} | {row['per_s']:.2f} | {over} | {row['load_s'] + row['answer_s']:.2f} | "
            f"{row['added_s']:.2f} | {row['right']}/{n} | {row['as_transformers']}/{compared} | "
            f"{'yes' if row['same_alone_and_together'] else 'NO'} |"
        )
    spent = result["spent"]
    steps = max(1.0, spent["steps"])
    print(
        f"\n{spent['fills']:.0f} prefills take {spent['fill_s']:.2f} s, {steps:.0f} steps {spent['step_s']:.2f} s: "
        f"{1e3 * spent['step_s'] / steps:.2f} ms each"
    )
    for name, row in result["candidates"].items():
        if row["flips_at_half_the_batch"] is not None:
            print(f"\n{name}: {row['flips_at_half_the_batch']} of {n} answers differ at half the batch size")
        print(
            f"{name}: longest answer {row['longest_answer']} tokens, {row['ended_at_limit']} ended at the limit"
        )


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description="documents a second of transformers and of the native engine"
    )
    parser.add_argument("--task", default="evalkit_registers_1024")
    parser.add_argument("--documents", type=int, default=256 if cuda else 8)
    parser.add_argument(
        "--baseline-seconds", type=float, default=30.0, help="no further batch size after that"
    )
    parser.add_argument("--batch-sizes", type=lambda text: [int(n) for n in text.split(",")], default=None)
    parser.add_argument("--batch-size", type=int, default=256 if cuda else 8, help="of the native engine")
    parser.add_argument("--candidates", type=lambda text: text.split(","), default=None)
    parser.add_argument("--checkpoint", default="dsa-nano")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    options.batch_sizes = options.batch_sizes or list(BATCH_SIZES if cuda else BATCH_SIZES[-1:])
    options.candidates = options.candidates or ["bf16", "fp8_e4m3:one", "fp8_ds_mla"]
    return options


if __name__ == "__main__":
    sys.exit(main())
