"""What a run's engines show of its layer documents: files of each arm, until records are made of them.

Each document runs alone, its prompt in one piece and its last tokens one by one. A file holds the logits [T, V] and, of
first starts and of the baseline's second, every layer's tensors: queries, values, rows, selection and what goes in and
out. That is about 8 KB a token and layer of dsa-nano, 120 KB of DeepSeek-V3.2, and while a document runs as much of GPU
memory: 2,048 tokens are 70 MB there and 15 GB here, for each such start. Later starts keep logits alone, 4 MB and 0.5 GB.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evalkit.compare.engines import Start
from evalkit.errors import InputError
from evalkit.evaluate.engines.arms import Arm
from evalkit.progress import progress
from evalkit.records import write_whole

DOCUMENTS = "layers.sha256"
FOLDERS = ("layers", "logits")  # of an engine's folder, as `VllmEngine.keep` names them


class Shown:
    """What engines are asked to show, and where it lies.

    Args:
        documents: token ids of each; empty asks nothing.
        decode: how many of their last tokens are decoded.
        folder: of all engines.
    """

    def __init__(self, documents: Sequence[Sequence[int]], decode: int, folder: Path) -> None:
        self.documents, self.decode, self.folder = documents, decode, folder
        self._files: dict[str, list[Path]] = {}
        self._scales: dict[str, dict[int, float]] = {}

    def wants(self, arm: Arm) -> bool:
        """The control differs in its batches alone, and a document runs alone."""
        return bool(self.documents) and arm.start > 0

    def keep(self, arm: Arm, engine: Any) -> None:
        """Have an engine show every document that its folder has not.

        Raises:
            InputError: it attends prompts of this length past its cache, so that no stored row would be seen.
        """
        proof = engine.proof or engine.start()
        dense = proof.get("dense_prefill_tokens") or 0
        tokens = min(map(len, self.documents)) - self.decode
        if tokens <= dense:
            raise InputError(
                f"layers_prompt_tokens is {tokens}: vLLM {proof['vllm']} attends a prompt of at most {dense} tokens "
                "past its cache, and no stored row would be compared; ask for more"
            )
        self._scales[arm.name] = {one["layer"]: one["k_scale"] for one in proof["layers"]}
        with progress(f"layers {arm.name}", len(self.documents)) as told:
            self._files[arm.name] = engine.keep(
                self.documents, decode=self.decode, layers=arm.shows_layers, told=told
            )

    def starts(self, arms: Sequence[Arm]) -> list[Start]:
        """Of the arms that showed something; the baseline's first start leads."""
        shown = [arm for arm in arms if arm.name in self._files]
        return [
            Start(name=a.name, candidate=a.candidate, files=self._files[a.name], scales=self._scales[a.name])
            for a in shown
        ]

    def refuse_others(self) -> None:
        """Raise InputError where what lies here was shown of other documents: a prompt file may have changed."""
        shown = [self.decode, *map(list, self.documents)]
        said = hashlib.sha256(json.dumps(shown).encode()).hexdigest()
        file = self.folder / DOCUMENTS
        if file.exists() and file.read_text() != said:
            raise InputError(
                f"{file.parent} holds layers of other prompts than layers_prompts gives now: start a new run"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(file, said)

    def forget(self) -> None:
        """Delete what engines showed, of this process or of one before it."""
        for name in FOLDERS:
            for found in self.folder.glob(f"*/{name}"):
                shutil.rmtree(found)
