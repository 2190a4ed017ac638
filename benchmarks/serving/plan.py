"""What is compared: arms, documents, and where files go."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from evalkit import kv
from evalkit.evaluate.engines.base import Label, Prompt
from evalkit.evaluate.engines.launch import launch
from evalkit.evaluate.engines.vllm import VllmEngine
from evalkit.kv import Scales

BF16, FLOOR, FP8 = "bf16@flashmla", "bf16@flash_attn", "fp8_ds_mla@flashmla"
ONE, CALIBRATED = "fp8_e4m3:one@flashinfer", "fp8_e4m3:checkpoint@flashinfer"
FP8_ARMS = (FP8, ONE, CALIBRATED)
ARMS = (BF16, FLOOR, *FP8_ARMS)
TASK, TASK_LENGTH, MAX_NEW, KEYS = "multi_key", 1024, 8, 120
FORCED = ("multi_key", "registers")  # texts whose every token is scored, in turn
SEED = 4_000
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
    at_once: int = 1  # engines on one GPU, and this project's own arms beside each other

    @cached_property
    def scales(self) -> dict[int, Scales]:
        """Of each layer, as the checkpoint carries them."""
        return kv.from_checkpoint(self.checkpoint)

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
        scales = {layer: one.latent for layer, one in self.scales.items()} if arm == CALIBRATED else {}
        place = {"gpus": gpus, "memory_share": MEMORY_SHARE / self.at_once, "shared": self.at_once > 1}
        return VllmEngine(launch(self.checkpoint, arm, max_length=size, scales=scales, **place), folder)

    def texts(self, ids: dict[int, list[int]]) -> list[str]:
        return [self.tokenizer.decode(ids[number]).split(".")[0].strip() for number in sorted(ids)]


def written(task: str, length: int, number: int) -> Any:
    """Document `number` of a task, with as many keys as there is room for, up to KEYS."""
    from tasks.documents import document

    options = {"keys": min(KEYS, length * KEYS // TASK_LENGTH)} if task == "multi_key" else {}
    return document(task, length, SEED, number, **options)


def say(text: str) -> None:
    print(text, flush=True)
