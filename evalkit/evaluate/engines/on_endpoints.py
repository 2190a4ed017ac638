"""A run's tasks on servers that run already, one for each candidate: what they say of themselves is all there is."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from evalkit import kv
from evalkit.candidate import BEST, Candidate
from evalkit.config import RunConfig
from evalkit.errors import EngineDiedError, InputError
from evalkit.evaluate.engines.arms import Arm
from evalkit.evaluate.engines.endpoint import UNSEEN, EndpointEngine, NoServerError
from evalkit.evaluate.engines.served import Gpus, Served
from evalkit.model.proof import candidate_record
from evalkit.records import CandidateRecord

# What servers say that a report has room for; their proof.json has the rest.
STATED = ("version", "attention_backend", "kv_cache_dtype", "quantization", "tp_size")


class EndpointScorer(Served):
    """Servers that run already, one for each candidate."""

    def __init__(self, config: RunConfig, checkpoint: Path, requested: Sequence[str]) -> None:
        named = requested if config.candidates == "default" else config.candidates
        # Where none stores bf16, a baseline was added that has no server.
        if not len(config.endpoint) == len(named) == len(requested):
            raise InputError(
                f"endpoint names {len(config.endpoint)} servers, candidates are {', '.join(requested)}: give one URL a "
                "candidate, in their order"
            )
        self.urls = dict(zip(named, config.endpoint, strict=True))
        super().__init__(config, checkpoint, requested)
        print(f"ATTENTION: {', '.join(config.endpoint)}: {UNSEEN}", file=sys.stderr)

    @property
    def place(self) -> tuple[str, str]:
        return f"served at {', '.join(self.config.endpoint)}", "unseen"

    def longest(self, most: int) -> int:
        """Of the server that holds least; each has to be there by now."""
        wanted = self.config.max_length
        with TemporaryDirectory() as folder:
            folders = ((url, Path(folder, str(place))) for place, url in enumerate(self.config.endpoint))
            made = (EndpointEngine(url, self.checkpoint, own, max_length=wanted) for url, own in folders)
            return min(engine.max_length for engine in made)

    def resolve(self, candidate: Candidate) -> Candidate:
        backend = "endpoint" if candidate.backend == BEST else candidate.backend
        return candidate.on(backend, kv.resolve(candidate.format, backend))

    def rooms(self) -> list[list[Gpus]]:
        return [[()]]

    def engine(self, arm: Arm, folder: Path, gpus: Gpus = ()) -> EndpointEngine:
        url = self.urls[self.requested[self.candidates.index(arm.candidate)]]
        try:
            return EndpointEngine(
                url, self.checkpoint, folder, max_length=self.config.max_length, at_once=arm.batch_size
            )
        except NoServerError as error:
            raise EngineDiedError(str(error)) from None  # it was there before the run began

    def refuse_mixed(self, folder: Path) -> None:
        """Servers of two formats may well be of two versions: their records say so."""

    def record(self, arm: Arm, requested: str, proof: dict[str, Any]) -> CandidateRecord:
        candidate = arm.candidate
        told = {**(proof.get("get_server_info") or {}), **(proof.get("version") or {})}
        said = json.dumps({key: told[key] for key in STATED if key in told})
        return candidate_record(
            candidate,
            kernel=f"unseen: {proof['url']} says {said}",
            heads=self.heads,
            bytes_per_token_read_back=None,
            requested=requested,
            note=f"ATTENTION: {UNSEEN}",
        )
