"""This project's own engine: greedy decoding and scoring on the sparse MLA path, or on plain transformers.

Batches are left-padded, longest first, and their make-up depends on the requests alone: every candidate multiplies
matrices of the same shapes, so that no difference comes from a GEMM's choice. Nothing is ever truncated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evalkit.errors import InputError
from evalkit.evaluate.damage import damaging
from evalkit.evaluate.engines.base import Answer, Prompt, Span

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

# Logits of a whole window times a vocabulary of 129,280 would take 2 GB; the head runs on so many rows at a time.
HEAD_ROWS = 512
# A stop string of n bytes touches at most n tokens that print something; some tokens print nothing.
SILENT_TOKENS = 8


class NativeEngine:
    """One candidate on a loaded model.

    Args:
        model: what `evalkit.load` or transformers returned.
        candidate: what its caches hold; None is the model's own.
        scales: layer to `Scales`, as `evalkit.load` takes them.
        tokenizer: needed when the model does not name its checkpoint.
        batch_size: how many requests share a batch.
        max_length: longest context plus scored or generated tokens; the model's own by default.
        damage: size of the planted damage, see `evalkit.evaluate.damage`; 0 is none.

    Raises:
        InputError: a candidate on a plain model, no tokenizer that loads and fits, or too large a max_length.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        candidate: Any = None,
        scales: Mapping[int, Any] | None = None,
        *,
        batch_size: int,
        max_length: int | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        damage: float = 0.0,
    ) -> None:
        self.model, self.batch_size = model, batch_size
        self._new_cache: Callable[[], Cache | None]
        if hasattr(model, "evalkit"):
            self._new_cache = partial(model.evalkit.new_cache, candidate, scales)
        elif candidate is None:
            self._new_cache = lambda: None
        else:
            raise InputError(f"candidate {candidate} needs a model from evalkit.load, not plain transformers")
        if damage:
            self._new_cache = damaging(self._new_cache, damage)
        self.tokenizer = tokenizer or _tokenizer(model.config._name_or_path)
        words, rows = len(self.tokenizer), int(model.config.vocab_size)
        if words > rows:
            raise InputError(
                f"{self.tokenizer.name_or_path}: the tokenizer has {words} tokens, the model {rows}"
            )
        longest = int(model.config.max_position_embeddings)
        self.max_length = longest if max_length is None else max_length
        if self.max_length > longest:
            raise InputError(f"max_length {self.max_length} is over the model's {longest} positions")

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)

    @property
    def stop_ids(self) -> list[int]:
        """The model's end-of-text tokens, or its tokenizer's.

        Raises:
            InputError: neither names one.
        """
        eos = getattr(self.model.generation_config, "eos_token_id", None)
        eos = self.tokenizer.eos_token_id if eos is None else eos
        if eos is None:
            raise InputError(
                f"{self.tokenizer.name_or_path} names no end-of-text token; set eos_token in its config"
            )
        return [int(i) for i in eos] if isinstance(eos, (list, tuple)) else [int(eos)]

    def stored(self, request: Prompt | Span) -> bool:
        """Every token on the sparse MLA path reads stored rows, whatever the request; none in plain transformers."""
        return hasattr(self.model, "evalkit")

    def generate(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Answer]]:
        """As `Engine.generate`, batch after batch."""
        order = sorted(range(len(prompts)), key=lambda i: (-prompts[i].max_new, -len(prompts[i].ids), i))
        # One budget in a batch, so that the longest prompt's length holds for every row.
        for _, same in groupby(order, key=lambda i: prompts[i].max_new):
            for batch in _chunks(list(same), self.batch_size):
                yield from zip(batch, self._generate([prompts[i] for i in batch]), strict=True)

    @torch.inference_mode()
    def _generate(self, batch: list[Prompt]) -> list[Answer]:
        ids, mask = self._left_pad([prompt.ids for prompt in batch])  # [B, T]
        positions = _positions(mask)
        cache = self._new_cache()
        generated: list[list[int]] = [[] for _ in batch]
        unfinished = set(range(len(batch)))
        while True:
            out = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = out.past_key_values
            # Finished rows go on unread: dropping them would make shapes depend on what a candidate answered.
            ids = out.logits[:, -1:].argmax(-1)  # [B, 1]
            for row, token in enumerate(ids.flatten().tolist()):
                if row in unfinished:
                    generated[row].append(token)
                    if self._ended(batch[row], generated[row]):
                        unfinished.remove(row)
            if not unfinished:
                return [
                    Answer(ids=ids, ended="stop" if self._stopped(prompt, ids) else "length")
                    for prompt, ids in zip(batch, generated, strict=True)
                ]
            positions = positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(batch), 1)], dim=1)

    def _ended(self, prompt: Prompt, ids: list[int]) -> bool:
        return len(ids) == prompt.max_new or self._stopped(prompt, ids)

    def _stopped(self, prompt: Prompt, ids: list[int]) -> bool:
        """Whether the last token ended the text, or completed a stop string."""
        if ids[-1] in self.stop_ids:
            return True
        if not prompt.until:
            return False
        tail = self.tokenizer.decode(ids[-max(len(s.encode()) for s in prompt.until) - SILENT_TOKENS :])
        return any(stop in tail for stop in prompt.until)

    @torch.inference_mode()
    def score(self, spans: Sequence[Span]) -> Iterator[tuple[int, tuple[float, bool]]]:
        """As `Engine.score`, batch after batch."""
        order = sorted(
            range(len(spans)), key=lambda i: (-len(spans[i].context) - len(spans[i].continuation), i)
        )
        for batch in _chunks(order, self.batch_size):
            ids, mask = self._left_pad([[*spans[i].context, *spans[i].continuation][:-1] for i in batch])
            cache = self._new_cache()
            hidden = self.model.base_model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=_positions(mask),
                past_key_values=cache,
                use_cache=cache is not None,
            ).last_hidden_state  # [B, T, D]
            for row, i in zip(hidden, batch, strict=True):
                yield i, self._read(row, spans[i].continuation)

    def _read(self, hidden: Tensor, continuation: Sequence[int]) -> tuple[float, bool]:
        """Score the continuation, which the last rows of hidden [T, D] predict."""
        head = self.model.get_output_embeddings()
        nats, greedy = 0.0, True
        rows = hidden[-len(continuation) :].split(HEAD_ROWS)
        for part, wanted in zip(rows, _chunks(continuation, HEAD_ROWS), strict=True):
            logprobs = head(part).float().log_softmax(-1)  # [t, V]
            target = torch.tensor(wanted, device=logprobs.device)
            nats += logprobs.gather(-1, target[:, None]).double().sum().item()
            greedy &= bool((logprobs.argmax(-1) == target).all())
        return nats, greedy

    def _left_pad(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        width = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        fill = self.stop_ids[0] if pad is None else int(pad)
        ids = [[fill] * (width - len(row)) + list(row) for row in rows]
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
        return torch.tensor(ids, device=self.device), torch.tensor(mask, device=self.device)


def _positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


def _chunks(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _tokenizer(checkpoint: str | Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    if not checkpoint:
        raise InputError("the model does not name its checkpoint: give its tokenizer")
    try:
        return AutoTokenizer.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{checkpoint} has no tokenizer that loads; it needs tokenizer.json and tokenizer_config.json "
            f"({str(error).splitlines()[0].rstrip(':')})"
        ) from error
