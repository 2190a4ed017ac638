"""evalkit's models as an lm-eval model, and lm-eval's own command with that model registered.

Batches are left-padded, longest first, and their make-up depends on the requests alone: every candidate multiplies
matrices of the same shapes, so that no difference comes from a GEMM's choice. Nothing is ever truncated.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.model import CacheHook, TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from evalkit.errors import InputError
from evalkit.evaluate.damage import damaging

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from lm_eval.api.instance import Instance
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_BATCH_SIZE = 8
# Logits of a whole window times a vocabulary of 129,280 would take 2 GB; the head runs on so many rows at a time.
HEAD_ROWS = 512
# A stop string of n bytes touches at most n tokens that print something; some tokens print nothing.
SILENT_TOKENS = 8
GREEDY_KWARGS = {"do_sample", "max_gen_toks", "temperature", "until"}


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """How much context the scored (generated or continuation) tokens of one request had.

    stored: whether their attention read rows of a candidate's cache.
    truncated: whether a generation ended at its length limit; None where nothing was generated.
    """

    task: str | None
    doc_id: int | None
    context_tokens: int
    scored_tokens: int
    stored: bool = False
    truncated: bool | None = None

    def over(self, topk: int) -> int:
        """Scored tokens with more than topk tokens before them: those whose attention had to select."""
        return self.scored_tokens - min(self.scored_tokens, max(0, topk - self.context_tokens + 1))


@dataclass(frozen=True, kw_only=True)
class _Span:
    """Tokens to score after their context."""

    label: _Label
    context: list[int]
    continuation: list[int]


@dataclass(frozen=True, kw_only=True)
class _Prompt:
    label: _Label
    ids: list[int]
    max_new: int
    until: list[str]


@dataclass(frozen=True)
class _Label:
    task: str | None
    doc_id: int | None

    def __str__(self) -> str:
        return f"{self.task or 'request'} document {'?' if self.doc_id is None else self.doc_id}"


@register_model("evalkit")
class EvalkitLM(TemplateLM):
    """lm-eval model `evalkit`: a checkpoint whose attention runs on one candidate.

    `coverage` holds one entry for each request scored or text generated so far.

    Args:
        pretrained: a checkpoint, or a model that `evalkit.load` (or transformers) returned.
        candidate: what to load the checkpoint with; with a loaded model, what its caches hold instead of its own.
        scales: layer to `Scales`, as `evalkit.load` takes them.
        tokenizer: needed when a loaded model does not name its checkpoint.
        damage: size of the planted damage, see `evalkit.evaluate.damage`; 0 is none.
        max_length: longest context plus scored or generated tokens; the model's own by default.

    Raises:
        InputError: an argument means nothing here, or differs from what the model can do.
    """

    def __init__(
        self,
        pretrained: str | Path | PreTrainedModel,
        candidate: Any = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        batch_size: int | str = DEFAULT_BATCH_SIZE,
        max_length: int | str | None = None,
        scales: Mapping[int, Any] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        damage: float = 0.0,
    ) -> None:
        super().__init__()
        self.batch_size = _positive("batch_size", batch_size)
        self._new_cache: Callable[[], Cache | None]
        if isinstance(pretrained, (str, Path)):
            from evalkit import load

            self.model = load(
                pretrained, candidate or "bf16@reference", device=device, dtype=_dtype(dtype), scales=scales
            )
            self._new_cache = self.model.evalkit.new_cache
        else:
            if device is not None or dtype is not None:
                raise InputError("device and dtype belong to loading; the model given is loaded already")
            self.model = pretrained
            if hasattr(pretrained, "evalkit"):
                self._new_cache = partial(pretrained.evalkit.new_cache, candidate, scales)
            elif candidate is None:
                self._new_cache = lambda: None
            else:
                raise InputError(
                    f"candidate {candidate} needs a model from evalkit.load, not plain transformers"
                )
        if damage:
            self._new_cache = damaging(self._new_cache, damage)
        self.tokenizer = tokenizer or _tokenizer(self.model.config._name_or_path)
        words, rows = len(self.tokenizer), int(self.model.config.vocab_size)
        if words > rows:
            raise InputError(f"{self.tokenizer_name}: the tokenizer has {words} tokens, the model {rows}")
        longest = int(self.model.config.max_position_embeddings)
        self.max_length = longest if max_length is None else _positive("max_length", max_length)
        if self.max_length > longest:
            raise InputError(f"max_length {self.max_length} is over the model's {longest} positions")
        self._device = self.model.device
        self.coverage: list[Coverage] = []

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> EvalkitLM:
        """From lm-eval's command: what `--model_args` says goes before `--device` and `--batch_size`.

        Raises:
            InputError: an argument that this model does not take.
        """
        given = {k: v for k, v in (additional_config or {}).items() if v is not None} | arg_dict
        given.pop("max_batch_size", None)
        known = {"pretrained", "candidate", "device", "dtype", "batch_size", "max_length"}
        if unknown := sorted(given.keys() - known):
            raise InputError(f"model_args has {', '.join(unknown)}; evalkit takes {', '.join(sorted(known))}")
        if "pretrained" not in given:
            raise InputError("model_args lacks pretrained=CHECKPOINT")
        return cls(**given)

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> EvalkitLM:
        """The same from `key=value,key=value`; a value may itself hold `=`, as candidates do."""
        pairs = (pair.partition("=") for pair in arg_string.split(",") if pair)
        return cls.create_from_arg_obj(
            {key.strip(): value.strip() for key, _, value in pairs}, additional_config
        )

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Refuse lm-eval's response cache: its keys lack the model, so one candidate's answers serve another."""
        if cache_hook.dbdict is not None:
            raise InputError("lm-eval's response cache does not tell candidates apart; leave out use_cache")
        super().set_cache_hook(cache_hook)

    @property
    def eot_token_id(self) -> int:
        return self._stop_ids[0]

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        # Not verbose: what is too long is refused here, and a warning would only foretell it.
        return list(self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding would give it) of each continuation.

        Raises:
            InputError: a continuation has no token, or is too long together with its context.
        """
        spans = []
        for request in requests:
            context, continuation = request.args
            if context:
                ids = self._encode_pair(context, continuation)
            else:
                ids = ([self.prefix_token_id], self.tok_encode(continuation, add_special_tokens=False))
            spans.append(_Span(label=_label(request), context=ids[0], continuation=ids[1]))
        return self._score(spans, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood in nats of each whole text, in windows of max_length where it is longer."""
        spans, owners = [], []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            for context, continuation in map(make_disjoint_window, windows):
                spans.append(_Span(label=_label(request), context=context, continuation=continuation))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (nats, _) in zip(owners, self._score(spans, disable_tqdm), strict=True):
            totals[owner] += nats
        return totals

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        spans = [_Span(label=_Label(None, None), context=c, continuation=t) for _, c, t in requests]
        return self._score(spans, disable_tqdm)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy text after each prompt, cut before the first of its stop strings.

        Raises:
            InputError: a request asks for sampling or another decoding, has no prompt, or is too long.
        """
        prompts = [self._prompt(request) for request in requests]
        texts = [""] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: (-prompts[i].max_new, -len(prompts[i].ids), i))
        with tqdm(
            total=len(prompts), desc="generating", unit="document", disable=disable_tqdm or None
        ) as bar:
            # One budget in a batch, so that the longest prompt's check holds for every row.
            for _, same in groupby(order, key=lambda i: prompts[i].max_new):
                for batch in _chunks(list(same), self.batch_size):
                    for i, ids in zip(batch, self._generate([prompts[i] for i in batch]), strict=True):
                        text = self.tokenizer.decode(ids, skip_special_tokens=True)
                        texts[i] = postprocess_generated_text(text, prompts[i].until, think_end_token=None)
                        self._cover(
                            prompts[i].label,
                            len(prompts[i].ids),
                            len(ids),
                            not self._stopped(prompts[i], ids),
                        )
                    bar.update(len(batch))
        return texts

    def check(self, request: Instance) -> None:
        """Refuse a text that cannot be generated (too long a prompt, sampling) without generating it."""
        self._prompt(request)

    @property
    def _stop_ids(self) -> list[int]:
        eos = getattr(self.model.generation_config, "eos_token_id", None)
        eos = self.tokenizer.eos_token_id if eos is None else eos
        if eos is None:
            raise InputError(f"{self.tokenizer_name} names no end-of-text token; set eos_token in its config")
        return [int(i) for i in eos] if isinstance(eos, (list, tuple)) else [int(eos)]

    def _prompt(self, request: Instance) -> _Prompt:
        text, asked = request.args
        label = _label(request)
        wanted = normalize_gen_kwargs(asked)
        if wanted["do_sample"]:
            raise InputError(f"{label} asks for sampling; evalkit generates greedily (do_sample: false)")
        if other := sorted(wanted.keys() - GREEDY_KWARGS):
            raise InputError(f"{label} asks for {', '.join(other)}; greedy decoding has no such option")
        ids, max_new = self.tok_encode(text), int(wanted["max_gen_toks"])
        if not ids:
            raise InputError(f"{label} has an empty prompt")
        if max_new < 1:
            raise InputError(f"{label} asks for {max_new} tokens; want max_gen_toks of at least 1")
        if len(ids) + max_new > self.max_length:
            raise InputError(
                f"{label}: prompt of {len(ids)} tokens + {max_new} to generate = {len(ids) + max_new}, "
                f"over max_length {self.max_length}; shorten the prompt or max_gen_toks"
            )
        return _Prompt(
            label=label, ids=ids, max_new=max_new, until=[stop for stop in wanted["until"] if stop]
        )

    @torch.inference_mode()
    def _generate(self, batch: list[_Prompt]) -> list[list[int]]:
        """Generated ids of each prompt, the last of them the one that ended it."""
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
                return generated
            positions = positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(batch), 1)], dim=1)

    def _ended(self, prompt: _Prompt, ids: list[int]) -> bool:
        return len(ids) == prompt.max_new or self._stopped(prompt, ids)

    def _stopped(self, prompt: _Prompt, ids: list[int]) -> bool:
        """Whether the last token ended the text, or completed a stop string."""
        if ids[-1] in self._stop_ids:
            return True
        if not prompt.until:
            return False
        tail = self.tokenizer.decode(ids[-max(len(s.encode()) for s in prompt.until) - SILENT_TOKENS :])
        return any(stop in tail for stop in prompt.until)

    @torch.inference_mode()
    def _score(self, spans: list[_Span], disable_tqdm: bool) -> list[tuple[float, bool]]:
        for span in spans:
            self._check(span)
        scores = [(0.0, False)] * len(spans)
        order = sorted(
            range(len(spans)), key=lambda i: (-len(spans[i].context) - len(spans[i].continuation), i)
        )
        with tqdm(total=len(spans), desc="scoring", unit="request", disable=disable_tqdm or None) as bar:
            for batch in _chunks(order, self.batch_size):
                ids, mask = self._left_pad([(spans[i].context + spans[i].continuation)[:-1] for i in batch])
                cache = self._new_cache()
                hidden = self.model.base_model(
                    input_ids=ids,
                    attention_mask=mask,
                    position_ids=_positions(mask),
                    past_key_values=cache,
                    use_cache=cache is not None,
                ).last_hidden_state  # [B, T, D]
                for row, i in zip(hidden, batch, strict=True):
                    scores[i] = self._read(row, spans[i].continuation)
                    self._cover(spans[i].label, len(spans[i].context), len(spans[i].continuation))
                bar.update(len(batch))
        return scores

    def _read(self, hidden: Tensor, continuation: list[int]) -> tuple[float, bool]:
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

    def _check(self, span: _Span) -> None:
        if not span.continuation:
            raise InputError(f"{span.label}: the continuation has no token, so there is nothing to score")
        length = len(span.context) + len(span.continuation) - 1  # the last token is predicted, never read
        if length > self.max_length:
            raise InputError(
                f"{span.label}: context of {len(span.context)} + continuation of {len(span.continuation)} tokens "
                f"needs {length} positions, over max_length {self.max_length}"
            )

    def _left_pad(self, rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        width = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        fill = self._stop_ids[0] if pad is None else int(pad)
        ids = [[fill] * (width - len(row)) + row for row in rows]
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
        return torch.tensor(ids, device=self.device), torch.tensor(mask, device=self.device)

    def _cover(
        self, label: _Label, context_tokens: int, scored_tokens: int, truncated: bool | None = None
    ) -> None:
        self.coverage.append(
            Coverage(
                task=label.task,
                doc_id=label.doc_id,
                context_tokens=context_tokens,
                scored_tokens=scored_tokens,
                stored=hasattr(self.model, "evalkit"),
                truncated=truncated,
            )
        )


def lm_eval_main(argv: Sequence[str]) -> None:
    """Run lm-eval's own command line with model `evalkit` known and tasks/ on its include path.

    `run` takes `--model evalkit`, this machine's device and evalkit's batch size where it is not told otherwise.

    Raises:
        InputError: lm-eval's caches are asked for; neither tells candidates or generated documents apart.
        SystemExit: as lm-eval's parser decides.
    """
    from lm_eval._cli import HarnessCLI
    from lm_eval.config.evaluate_config import EvaluatorConfig
    from lm_eval.utils import setup_logging

    from evalkit.evaluate.tasks import tasks_dir

    setup_logging()
    before, sys.argv = sys.argv, ["evalkit lm-eval", *argv]  # all that its parser reads
    try:
        cli = HarnessCLI()
        args = cli.parse_args()
    finally:
        sys.argv = before
    config = getattr(args, "config", None)
    given = EvaluatorConfig.load_yaml_config(config) if config else {}
    defaults: dict[str, Any] = {"include_path": str(tasks_dir())}
    if args.command == "run":
        for cache in ("use_cache", "cache_requests"):
            if getattr(args, cache, None) or given.get(cache):
                raise InputError(
                    f"--{cache} does not tell candidates or generated documents apart; leave it out"
                )
        defaults |= {
            "model": "evalkit",
            "device": "cuda" if torch.cuda.is_available() else "cpu",
            "batch_size": DEFAULT_BATCH_SIZE,
        }
    for name, value in defaults.items():
        if getattr(args, name, None) is None and name not in given:
            setattr(args, name, value)
    cli.execute(args)


def _label(request: Instance) -> _Label:
    return _Label(request.task_name, request.doc_id)


def _positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


def _chunks(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _positive(name: str, value: int | str) -> int:
    if not str(value).isdecimal() or int(value) < 1:
        raise InputError(f"{name}={value}: want a whole number of at least 1, the same for every candidate")
    return int(value)


def _dtype(value: str | torch.dtype | None) -> torch.dtype | None:
    if value is None or value == "auto":
        return None
    dtype = value if isinstance(value, torch.dtype) else getattr(torch, value, None)
    if not isinstance(dtype, torch.dtype):
        raise InputError(f"dtype={value}: want one of torch's names, such as bfloat16 or float32, or auto")
    return dtype


def _tokenizer(checkpoint: str) -> PreTrainedTokenizerBase:
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
