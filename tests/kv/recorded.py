"""Caches that CUDA writers left, with the rows they were given: one .npz, and its table of cases in JSON beside it."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evalkit.kv import Scales

FILE = Path(__file__).parent / "fixtures" / "cuda_bytes.npz"


@dataclass(frozen=True, kw_only=True)
class Case:
    format: str
    rows: str
    scales: Scales
    page_size: int


@dataclass(kw_only=True)
class Recording:
    """`source` says what wrote the bytes; `cases` names each case's array of them."""

    source: dict[str, str]
    cases: dict[Case, str] = field(default_factory=dict)
    arrays: dict[str, NDArray[np.generic]] = field(default_factory=dict)

    def add(self, case: Case, row: tuple[Tensor, Tensor], slots: Tensor, cache: Tensor) -> None:
        """Keep a case; a cache that is the same at every page size is kept once."""
        for part, tensor in zip(("latent", "rope", "slots"), (*row, slots), strict=True):
            bits = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor.short()
            self.arrays[f"{case.rows}.{part}"] = bits.numpy()
        content = cache.numpy()
        name = hashlib.sha256(content.tobytes()).hexdigest()[:16]
        self.arrays[name], self.cases[case] = content, name

    def given(self, case: Case) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """The rows and slots of a case: (latent [T, 512], rope [T, 64]) bf16, slots [T] int64."""
        latent, rope, slots = (
            torch.from_numpy(self.arrays[f"{case.rows}.{part}"]) for part in ("latent", "rope", "slots")
        )
        return (latent.view(torch.bfloat16), rope.view(torch.bfloat16)), slots.long()

    def save(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(file, **self.arrays)
        cases = [{**asdict(case), "cache": name} for case, name in self.cases.items()]
        lines = ",\n".join(json.dumps(case) for case in cases)
        file.with_suffix(".json").write_text(
            f'{{"source": {json.dumps(self.source, indent=1)},\n"cases": [\n{lines}\n]}}\n', encoding="utf-8"
        )

    @classmethod
    def read(cls, file: Path = FILE) -> "Recording":
        table = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
        cases = {}
        for entry in table["cases"]:
            name = entry.pop("cache")
            cases[Case(**{**entry, "scales": Scales(**entry["scales"])})] = name
        with np.load(file) as arrays:
            return cls(source=table["source"], cases=cases, arrays=dict(arrays))
