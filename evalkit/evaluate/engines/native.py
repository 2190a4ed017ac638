"""This project's own engine: greedy decoding and scoring on the sparse MLA path, or on plain transformers.

`batch_size` sequences are decoded together; one whose answer has ended makes room for a prompt that waits. Which
prompts are prefilled together, how wide they are padded, and how many sequences a step has follows from the requests
alone (schedule.py): every candidate multiplies matrices of the same shapes, so that no difference comes from a GEMM's
choice. When a waiting prompt gets its room, and beside which others, follows from the answers. Its attention does not
depend on that; its experts do, by rounding, since they multiply as many rows at once as all sequences send them. What
that makes, the control in batches of half the size shows with the rest. Nothing is ever truncated.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evalkit import kv
from evalkit.attention.paged_layer import BLOCK
from evalkit.errors import InputError
from evalkit.evaluate.damage import damaging
from evalkit.evaluate.engines import plain
from evalkit.evaluate.engines.base import Answer, Prompt, Span
from evalkit.evaluate.engines.decoding import STEPS_AT_ONCE, Decoder
from evalkit.evaluate.engines.schedule import groups, shared_prefix
from evalkit.evaluate.engines.stops import Stops
from evalkit.evaluate.engines.timing import Call
from evalkit.kv import index

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

# Logits of a whole window times a vocabulary of 129,280 would take 2 GB; the head runs on so many rows at a time.
HEAD_ROWS = 512
PARTS = 4  # of the sequences that decode together: so many may wait before a prompt takes their room
CPU_BATCH_SIZE = 8
LARGEST_BATCH_SIZE = 512  # a step of a small model takes hardly longer up to there
PLANNED_COLUMNS = 8192
MOST_SLOTS = 2**31 // 576  # kernels may count the elements of all rows in 32 bits


def auto_batch_size(model: Any) -> int:
    """How many sequences a model's device decodes together well, a power of two on a GPU.

    There, half the memory beside the weights holds that many of `PLANNED_COLUMNS` tokens stored in bf16; the other
    half is for prefilling. It is the same for every candidate.
    """
    device = torch.device(model.device)
    if device.type != "cuda":
        return CPU_BATCH_SIZE
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    room = (torch.cuda.get_device_properties(device).total_memory - weights) // 2
    token = kv.get("bf16").row_bytes + index.resolve("bf16", torch.bfloat16).key_bytes
    columns = min(PLANNED_COLUMNS, int(model.config.max_position_embeddings))
    fits = int(room // (token * columns * model.config.num_hidden_layers))
    return 1 << (min(max(fits, CPU_BATCH_SIZE), LARGEST_BATCH_SIZE).bit_length() - 1)


@dataclass
class _Writing:
    """An answer in progress: the request's place, and what it has so far."""

    place: int
    prompt: Prompt
    stops: Stops
    ids: list[int] = field(default_factory=list)

    def take(self, tokens: Sequence[int]) -> Answer | None:
        """Take what was generated next; the answer, where it ends therein."""
        known = len(self.ids)
        self.ids += tokens[: self.prompt.max_new - known]
        end = self.stops.end(self.ids, known)
        if end is not None:
            return Answer(ids=self.ids[: end + 1], ended="stop")
        return Answer(ids=self.ids, ended="length") if len(self.ids) == self.prompt.max_new else None


class NativeEngine:
    """One candidate on a loaded model.

    Args:
        model: what `evalkit.load` or transformers returned.
        candidate: what its caches hold; None is the model's own.
        scales: layer to `Scales`, as `evalkit.load` takes them.
        tokenizer: needed when the model does not name its checkpoint.
        batch_size: how many sequences are decoded together; it also fixes how many are prefilled (schedule.py).
        max_length: longest context plus scored or generated tokens; the model's own by default.
        damage: size of the planted damage, see `evalkit.evaluate.damage`; 0 is none.
        graphs: whether steps may be recorded in a CUDA graph, on a GPU and where the backend can.

    Attributes:
        timed: what advanced sequences together and how long it took, see `Decoder.timed`; none in plain transformers.
        aside_s: seconds spent on steps for the sake of timing them alone, see `Decoder.time_on`.

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
        graphs: bool = True,
    ) -> None:
        self.model, self.batch_size, self._damage, self._graphs = model, batch_size, damage, graphs
        self.timed: list[Call] = []
        self.aside_s = 0.0
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

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Answer]]:
        """As `Engine.generate`; an answer comes when it has ended."""
        if not hasattr(self.model, "evalkit"):
            yield from self._generate_plainly(prompts)
        elif prompts:
            yield from self._generate(prompts)

    def _generate(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Answer]]:
        columns = max(len(prompt.ids) + prompt.max_new for prompt in prompts)
        count, most = min(self.batch_size, len(prompts)), MOST_SLOTS // (columns + BLOCK) - 1
        if count > most:
            # Fewer of one than of twice as many: a control in batches of half the size is to have other shapes.
            count = max(1, most - -(-most // 4) * _odd(count))
        # Noise in a beginning that all share would be one draw for all documents, which are to be independent.
        shared = 0 if self._damage else shared_prefix([prompt.ids for prompt in prompts])
        waiting = deque(
            groups([len(prompt.ids) - shared for prompt in prompts], count, self.max_length - shared, PARTS)
        )
        begins = prompts[0].ids[:shared]
        decoder = Decoder(self.model, self._new_cache(), count, columns, begins, self._graphs)
        stops = self._stops()
        free, busy, fresh = list(range(count)), dict[int, _Writing](), set[int]()
        while waiting or busy:
            while waiting and len(waiting[0].members) <= len(free):
                group = waiting.popleft()
                taken, free = free[: len(group.members)], free[len(group.members) :]
                decoder.fill(taken, [prompts[i].ids for i in group.members], group.width)
                for sequence, i in zip(taken, group.members, strict=True):
                    busy[sequence] = _Writing(i, prompts[i], stops(prompts[i]))
                fresh.update(taken)
            left = max(one.prompt.max_new - len(one.ids) - (n in fresh) for n, one in busy.items())
            tokens = decoder.steps(min(left, STEPS_AT_ONCE[self.device.type]))
            for sequence, one in list(busy.items()):
                answer = one.take(tokens[sequence][sequence not in fresh :])
                if answer is not None:
                    free.append(sequence)
                    del busy[sequence]
                    yield one.place, answer
            free.sort()
            fresh.clear()
        began = time.perf_counter()
        decoder.time_on()
        self.aside_s += time.perf_counter() - began
        self.timed += decoder.timed

    def _generate_plainly(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Answer]]:
        order = sorted(range(len(prompts)), key=lambda i: (-prompts[i].max_new, -len(prompts[i].ids), i))
        stops = self._stops()
        # One budget in a batch, so that the longest prompt's length holds for every row.
        for _, same in groupby(order, key=lambda i: prompts[i].max_new):
            for batch in _chunks(list(same), self.batch_size):
                asked = [prompts[i] for i in batch]
                ids, mask = self._left_pad([prompt.ids for prompt in asked])  # [B, T]
                yield from zip(batch, plain.decode(self.model, asked, ids, mask, stops), strict=True)

    def _stops(self) -> Callable[[Prompt], Stops]:
        """What finds the end of a prompt's answer, one for all prompts with the same stop strings."""
        ids = tuple(self.stop_ids)
        make = cache(lambda until: Stops(self.tokenizer, ids, until))
        return lambda prompt: make(tuple(prompt.until))

    @torch.inference_mode()
    def score(self, spans: Sequence[Span]) -> Iterator[tuple[int, tuple[float, bool]]]:
        """As `Engine.score`, batch after batch."""
        lengths = [len(span.context) + len(span.continuation) - 1 for span in spans]
        count = min(self.batch_size, max(1, len(spans)))
        for group in groups(lengths, count, self.max_length):
            batch = group.members
            # Half a batch has other shapes also where a pass has room for one text only.
            more = BLOCK * _odd(count) if len(batch) == 1 else 0
            ids, mask = self._left_pad(
                [[*spans[i].context, *spans[i].continuation][:-1] for i in batch], more
            )
            cache = self._new_cache()
            hidden = self.model.base_model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=plain.positions(mask),
                use_cache=cache is not None,
                **({} if cache is None else cache.argument),
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

    def _left_pad(self, rows: Sequence[Sequence[int]], more: int = 0) -> tuple[Tensor, Tensor]:
        width = max(map(len, rows))
        width = max(width, min(width + more, int(self.model.config.max_position_embeddings)))
        pad = self.tokenizer.pad_token_id
        fill = self.stop_ids[0] if pad is None else int(pad)
        ids = [[fill] * (width - len(row)) + list(row) for row in rows]
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
        return torch.tensor(ids, device=self.device), torch.tensor(mask, device=self.device)


def _odd(count: int) -> int:
    """1 or 0, another one for half as many."""
    return count.bit_length() % 2


def _chunks(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (items[start : start + size] for start in range(0, len(items), size))


@cache
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
