"""A run on vLLM: how an arm is launched, which GPUs it gets, and its record from its own account."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from evalkit import kv
from evalkit.candidate import BEST, Candidate
from evalkit.errors import InputError
from evalkit.evaluate.engines.arms import Arm, starts_of
from evalkit.evaluate.engines.launch import Launch, launch
from evalkit.evaluate.engines.served import Gpus, Served
from evalkit.evaluate.engines.vllm import PROOF, VllmEngine
from evalkit.model.proof import candidate_record
from evalkit.records import CandidateRecord

LENGTH_STEP = 1024  # of an engine's longest context
# Tokens of a prompt that every version's default takes in one step on a GPU of 70 GiB and more.
IN_ONE_PIECE = 8192
# Where a candidate names no backend.
BEST_BACKEND, BEST_OF = "flashmla", {"fp8_e4m3": "flashinfer"}


class VllmScorer(Served):
    """vLLM, a process for each arm and share of the documents."""

    @property
    def place(self) -> tuple[str, str]:
        return "cuda:0" if torch.cuda.is_available() else "cpu", "bfloat16"

    def longest(self, most: int) -> int:
        self.most = most if self.config.max_length is None else self.config.max_length
        if self.most > most:
            raise InputError(f"max_length is {self.most}, the checkpoint holds {most}: give less")
        return self.most - 2

    def resolve(self, candidate: Candidate) -> Candidate:
        return Candidate.parse(self.launch(candidate, self.batch_size).candidate)

    def launch(self, candidate: Candidate, sequences: int, gpus: Gpus = ()) -> Launch:
        config = self.config
        if candidate.backend == BEST:
            backend = BEST_OF.get(candidate.format, BEST_BACKEND)
            candidate = candidate.on(backend, kv.resolve(candidate.format, backend))
        if candidate.scales == "calibrated":
            raise InputError(
                f"{candidate}: no scales are found on engine=vllm: make a checkpoint that carries them "
                "(`evalkit calibrate --into DIR`), and name its candidate with :checkpoint"
            )
        scales = {}
        if candidate.scales == "checkpoint":
            scales = {layer: one.latent for layer, one in kv.from_checkpoint(self.checkpoint).items()}
        piece = max(map(len, self.asked.documents), default=0)
        needed = -(-(self.asked.longest + 2) // LENGTH_STEP) * LENGTH_STEP
        return launch(
            self.checkpoint,
            candidate,
            max_length=self.most if config.max_length is not None else min(needed, self.most),
            scales=scales,
            eager=config.eager,
            tensor_parallel=config.tensor_parallel,
            pipeline_parallel=config.pipeline_parallel,
            expert_parallel=config.expert_parallel,
            sequences=sequences,
            memory_share=config.memory_share,
            shared=any(self.config.gpus.count(gpu) > 1 for gpu in gpus),
            gpus=gpus,
            seed=config.seed,
            extra={"max_num_batched_tokens": piece} if piece > IN_ONE_PIECE else {},
        )

    def arms(self, damage: float | None, endpoints: tuple[str, ...] = ()) -> list[Arm]:
        """Every candidate starts afresh several times: batching and start order leave a spread."""
        first = super().arms(damage, endpoints)
        return first + starts_of(first, self.config.engine_starts)

    def rooms(self) -> list[list[Gpus]]:
        config, named = self.config, self.config.gpus or visible_gpus()
        each = config.tensor_parallel * config.pipeline_parallel
        if not named:
            return [[()] * config.data_parallel]
        if len(named) < each * config.data_parallel:
            raise InputError(
                f"an arm takes tensor_parallel {config.tensor_parallel} x pipeline_parallel {config.pipeline_parallel} x "
                f"data_parallel {config.data_parallel} = {each * config.data_parallel} GPUs, there are {len(named)}"
            )
        groups = [tuple(named[at : at + each]) for at in range(0, len(named) - each + 1, each)]
        if twice := next((gpu for group in groups for gpu in group if group.count(gpu) > 1), None):
            raise InputError(
                f"gpus names {twice} twice for one engine of tensor_parallel {config.tensor_parallel} x pipeline_parallel "
                f"{config.pipeline_parallel} GPUs: name GPUs that differ one after the other"
            )
        rooms = range(0, len(groups) - config.data_parallel + 1, config.data_parallel)
        return [groups[at : at + config.data_parallel] for at in rooms]

    def engine(self, arm: Arm, folder: Path, gpus: Gpus = ()) -> VllmEngine:
        made = self.launch(arm.candidate, arm.batch_size, gpus)
        return VllmEngine(made, folder, python=self.config.engine_python)

    def refuse_mixed(self, folder: Path) -> None:
        """Engines of one run, perhaps of before it was stopped, are of one version of vLLM."""
        found = sorted({str(json.loads(file.read_text())["vllm"]) for file in folder.rglob(PROOF)})
        if len(found) > 1:
            raise InputError(
                f"engines in {folder} ran vLLM {', '.join(found)}: their numbers would not compare; start a new run"
            )

    def record(self, arm: Arm, requested: str, proof: dict[str, Any]) -> CandidateRecord:
        first = proof["layers"][0]
        return candidate_record(
            arm.candidate,
            kernel=f"vLLM {proof['vllm']} {first['backend']} ({first['implementation']}), cache "
            f"{first['cache_dtype']} as {first['cache_tensor']}; index scores: vLLM's own",
            index="fp8",
            read="native",
            heads=first["heads"],
            bytes_per_token_read_back=first["row_bytes"],
            requested=requested,
            note="; ".join(self._notes(proof)),
        )

    def _notes(self, proof: dict[str, Any]) -> Iterator[str]:
        scales = [one["k_scale"] for one in proof["layers"]]
        yield f"k_scale {min(scales):.3g} to {max(scales):.3g} over {len(scales)} layers, as vLLM says"
        if dense := proof.get("dense_prefill_tokens"):
            yield f"a step whose prompts have at most {dense} tokens attends past the cache"
        for key in ("tensor_parallel", "pipeline_parallel", "data_parallel"):
            if getattr(self.config, key) > 1:
                yield f"{key} {getattr(self.config, key)}"


def visible_gpus() -> Gpus:
    """The GPUs that this process may use, by the names that CUDA_VISIBLE_DEVICES takes; empty where there is none."""
    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return tuple(named[:count] if named else map(str, range(count)))
