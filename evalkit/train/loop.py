"""The training loop: dense curriculum, the indexer's warm-up with the model frozen, then both with selection on.

Everything lives in the run's directory: `state.pt` (written atomically, so that a killed run resumes), `log.jsonl`,
`training.json` and, at the end of each phase, `export/`.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from evalkit import environment
from evalkit.errors import InputError
from evalkit.train import checkpoint
from evalkit.train.config import PHASES, TrainConfig
from evalkit.train.data import TASKS, Loader
from evalkit.train.model import Nano, probe_kernels
from evalkit.train.optimizer import Optimizers

FINAL_LR = 0.02


@dataclass
class Progress:
    """Where a run stands; saved with the weights."""

    phase: int = 0
    stage: int = 0
    stage_step: int = 0
    phase_step: int = 0
    stage_seconds: float = 0.0
    phase_seconds: float = 0.0
    tokens: int = 0
    phases: list[dict[str, Any]] = field(default_factory=list)


class Meter:
    """Sums kept on the device, so that no step waits for the host."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.reset()

    def reset(self) -> None:
        size = len(TASKS) + 1
        self.sums = torch.zeros(4, size, device=self.device)  # loss, positions, answers, exact answers
        self.kl = torch.zeros(2, device=self.device)

    @torch.no_grad()
    def add(self, losses: Tensor, wrong: Tensor, batch: dict[str, Tensor]) -> None:
        others = torch.full((1,), len(TASKS), device=self.device)
        task_of_answer = torch.cat([batch["answer_tasks"], others])
        task = task_of_answer[batch["answers"]]
        self.sums[0].index_add_(0, task, losses)
        self.sums[1].index_add_(0, task, torch.ones_like(losses))
        errors = torch.zeros(len(task_of_answer), device=self.device).index_add_(
            0, batch["answers"], wrong.float()
        )
        self.sums[2].index_add_(0, task_of_answer, torch.ones_like(errors))
        self.sums[3].index_add_(0, task_of_answer, (errors == 0).float())

    def add_kl(self, kl: Tensor) -> None:
        self.kl += torch.stack([kl.detach(), torch.ones_like(kl)])

    def read(self) -> dict[str, Any]:
        """Means since the last reset; waits for the device."""
        loss, positions, answers, exact = self.sums.double().tolist()
        kl, steps = self.kl.tolist()
        seen = [index for index in range(len(TASKS)) if answers[index]]
        return {
            "loss": {TASKS[i]: loss[i] / positions[i] for i in seen},
            "exact": {TASKS[i]: exact[i] / answers[i] for i in seen},
            "lm_loss": loss[-1] / positions[-1] if positions[-1] else None,
            "indexer_kl": kl / steps if steps else None,
        }


class Trainer:
    """One run in one directory."""

    def __init__(self, config: TrainConfig, out: Path, device: torch.device) -> None:
        self.config, self.out, self.device = config, out, device
        self.model = Nano(config.model)
        self.model.initialise(config.seed)
        self.model.to(device)
        self.model.use(probe_kernels(config.model, device))
        self.progress = Progress()
        self.origin: dict[str, Any] | None = None  # the record of the run whose weights this one started from
        self.optimizers: Optimizers | None = None
        self.meter = Meter(device)
        self.last_print = self.last_save = time.monotonic()
        out.mkdir(parents=True, exist_ok=True)

    # --- State ----------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """state.pt is always whole: written beside and moved."""
        state = {
            "config": asdict(self.config),
            "model": self.model.state_dict(),
            "optimizers": self.optimizers.state_dict() if self.optimizers else None,
            "progress": asdict(self.progress),
            "origin": self.origin,
        }
        partial = self.out / "state.pt.partial"
        torch.save(state, partial)
        partial.replace(self.out / "state.pt")
        self.last_save = time.monotonic()

    def resume(self) -> None:
        """Continues from state.pt.

        Raises:
            InputError: the state belongs to a run of another model or seed.
        """
        state = torch.load(self.out / "state.pt", map_location=self.device, weights_only=True)
        for key in ("model", "seed", "stages"):
            mine = asdict(self.config)[key]
            if state["config"][key] != mine:
                raise InputError(
                    f"{self.out / 'state.pt'}: its {key} is {state['config'][key]}, this run's {mine}"
                )
        self.model.load_state_dict(state["model"])
        self.progress = Progress(**state["progress"])
        self.origin = state["origin"]
        if state["optimizers"] is not None:
            self.optimizers = self._optimizers()
            self.optimizers.load_state_dict(state["optimizers"])

    def _optimizers(self) -> Optimizers:
        config, phase = self.config, PHASES[self.progress.phase]
        if phase == "joint":
            lr = config.joint_lr
            return Optimizers(self.model, phase, muon_lr=lr, adam_lr=lr, indexer_lr=lr)
        return Optimizers(
            self.model, phase, muon_lr=config.muon_lr, adam_lr=config.adam_lr, indexer_lr=config.indexer_lr
        )

    # --- Steps ----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """All phases that are left, then the export."""
        with Loader(self.config) as loader:
            while self.progress.phase < len(PHASES):
                self._phase(loader)
        self.save()
        self._log({"event": "done", "bytes": self._export()})

    def _phase(self, loader: Loader) -> None:
        progress = self.progress
        if self.optimizers is None:
            self.optimizers = self._optimizers()
        if progress.phase > 0:
            progress.stage = len(self.config.stages) + progress.phase - 1
        clock: float | None = None
        while self._fraction(progress.phase_step, progress.phase_seconds) < 1:
            batch = loader.next(progress.stage, progress.stage_step)
            # The workers' start is no training time.
            clock = clock or time.monotonic()
            self._step(batch.to(self.device))
            progress.tokens += batch.tokens.size
            progress.phase_step += 1
            progress.stage_step += 1
            now = time.monotonic()
            progress.phase_seconds += now - clock
            progress.stage_seconds += now - clock
            clock = now
            if progress.phase_step % self.config.check_steps == 0:
                self._check()
        self._finish_phase()

    def _fraction(self, step: int, seconds: float) -> float:
        """The share of the current phase that is over."""
        if self.config.steps is not None:
            steps = self.config.steps[self.progress.phase]
            return step / steps if steps else 1.0
        return seconds / self.config.seconds[self.progress.phase]

    def _step(self, batch: dict[str, Tensor]) -> None:
        config, progress = self.config, self.progress
        phase = PHASES[progress.phase]
        self.model.train()
        rows = None if phase == "dense" else batch["rows"]
        # The cache would hand a cast made without gradients, in the selection, to the indexer's loss.
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.device.type == "cuda", cache_enabled=False
        ):
            hidden, kl = self.model(batch["tokens"], "own" if phase == "joint" else "dense", rows)
            loss = torch.zeros((), device=self.device)
            if phase != "indexer":
                logits = self.model.logits(hidden.flatten(0, 1).index_select(0, batch["scored"]))
                losses = F.cross_entropy(logits, batch["labels"], reduction="none")
                loss = loss + (losses * batch["weights"]).sum()
                self.meter.add(losses.detach(), logits.argmax(-1) != batch["labels"], batch)
            if kl is not None:
                loss = loss + kl
                self.meter.add_kl(kl)
        loss.backward()
        assert self.optimizers is not None
        self.optimizers.step(self._lr_scale())
        for router in self.model.routers():
            router.balance(config.bias_step if phase != "indexer" else 0.0)

    def _lr_scale(self) -> float:
        """A short warm-up, constant to half of the phase, then linear to a fiftieth."""
        progress = self.progress
        warmup = self.config.warmup_steps if progress.phase == 0 else max(1, self.config.warmup_steps // 5)
        over = self._fraction(progress.phase_step, progress.phase_seconds)
        decay = min(1.0, 1 - (1 - FINAL_LR) * (over - 0.5) / 0.5) if over > 0.5 else 1.0
        return min(1.0, (progress.phase_step + 1) / warmup) * decay

    # --- Between steps --------------------------------------------------------------------------------------------

    def _check(self) -> None:
        means = self.meter.read()
        self.meter.reset()
        losses = means["loss"]
        found = [*losses.values(), means["lm_loss"], means["indexer_kl"]]
        if not all(math.isfinite(value) for value in found if value is not None):
            raise FloatingPointError(f"the loss is not finite at step {self.progress.phase_step}: {means}")
        now = time.monotonic()
        if now - self.last_print >= self.config.report_seconds:
            self.last_print = now
            self._log(self._describe() | means)
        if self.progress.phase == 0 and self._stage_is_over(losses):
            self._log({"event": "stage", **self._describe(), **means})
            self.progress.stage += 1
            self.progress.stage_step, self.progress.stage_seconds = 0, 0.0
        if now - self.last_save >= self.config.save_seconds:
            self.save()

    def _stage_is_over(self, losses: dict[str, float]) -> bool:
        progress, config = self.progress, self.config
        if progress.stage == len(config.stages) - 1:
            return False
        share = config.stages[progress.stage].share
        if self._fraction(progress.stage_step, progress.stage_seconds) >= share:
            return True
        learnt = sum(losses.values()) / len(losses) < config.advance_loss
        if progress.stage == 0:
            learnt = learnt and losses.get("registers", 1.0) < config.advance_register_loss
        return learnt and progress.stage_step >= config.advance_steps

    def _finish_phase(self) -> None:
        progress = self.progress
        summary = {**self._describe(), "tokens": progress.tokens}
        progress.phases.append(summary)
        self._log({"event": "phase", **summary})
        progress.phase += 1
        progress.stage_step = progress.phase_step = progress.tokens = 0
        progress.stage_seconds = progress.phase_seconds = 0.0
        self.optimizers = None
        self.save()
        self._export()

    def _export(self) -> int:
        size = checkpoint.export(self.model, self.out / "export")
        (self.out / "training.json").write_text(json.dumps(self.record(), indent=2) + "\n")
        return size

    def record(self) -> dict[str, Any]:
        """What the model card says about the run."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return {
            "commit": environment.commit(),
            "config": asdict(self.config),
            "device": name,
            "torch": torch.__version__,
            "parameters": parameters,
            "phases": self.progress.phases,
            "origin": self.origin,
        }

    def _describe(self) -> dict[str, Any]:
        progress = self.progress
        return {
            "phase": PHASES[progress.phase],
            "stage": progress.stage,
            "step": progress.phase_step,
            "seconds": round(progress.phase_seconds, 1),
            "tokens_per_second": round(progress.tokens / max(progress.phase_seconds, 1e-9)),
        }

    def _log(self, event: dict[str, Any]) -> None:
        with (self.out / "log.jsonl").open("a") as file:
            file.write(json.dumps(event) + "\n")
        print(_line(event), flush=True)


def _line(event: dict[str, Any]) -> str:
    parts = []
    for key, value in event.items():
        if isinstance(value, dict):
            parts.append(key + " " + " ".join(f"{name}={number:.3f}" for name, number in value.items()))
        elif isinstance(value, float) and key != "seconds":
            parts.append(f"{key}={value:.3f}")
        elif value is not None:
            parts.append(f"{key}={value}")
    return " ".join(parts)
