"""evalkit's models as an lm-eval model, and lm-eval's own command with that model registered.

Text becomes token ids here and ids text; what cannot be done greedily and in full is refused. An engine
(evalkit/evaluate/engines/) runs the candidate. Nothing is ever truncated.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from lm_eval.api.model import CacheHook, TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from evalkit.errors import InputError
from evalkit.evaluate.engines.base import Engine, Label, Prompt, Span
from evalkit.evaluate.engines.native import NativeEngine, auto_batch_size
from evalkit.progress import progress
from evalkit.shipped import tasks_dir

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager

    from lm_eval.api.instance import Instance
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPTS_KEPT = 8192
GREEDY_KWARGS = {"do_sample", "max_gen_toks", "temperature", "until"}


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """How much context the scored (generated or continuation) tokens of one request had.

    stored: whether their attention read rows of a candidate's cache.
    truncated: whether a generation ended at its length limit; None where nothing was generated.
    ids: the generated tokens, their stop included; None where nothing was generated.
    """

    task: str | None
    doc_id: int | None
    context_tokens: int
    scored_tokens: int
    stored: bool = False
    truncated: bool | None = None
    ids: Sequence[int] | None = None

    def over(self, topk: int) -> int:
        """Scored tokens with more than topk tokens before them: those whose attention had to select."""
        return self.scored_tokens - min(self.scored_tokens, max(0, topk - self.context_tokens + 1))


@register_model("evalkit")
class EvalkitLM(TemplateLM):
    """lm-eval model `evalkit`: an engine, or a checkpoint whose attention runs on one candidate.

    `coverage` holds one entry for each request scored or text generated so far.

    Args:
        pretrained: a checkpoint, or a model that `evalkit.load` (or transformers) returned.
        candidate: what to load the checkpoint with; with a loaded model, what its caches hold instead of its own.
        scales: layer to `Scales`, as `evalkit.load` takes them.
        tokenizer: needed when a loaded model does not name its checkpoint.
        batch_size: see `NativeEngine`; "auto" takes what the device holds.
        damage: size of the planted damage, see `evalkit.evaluate.damage`; 0 is none.
        max_length: longest context plus scored or generated tokens; the model's own by default.
        engine: what runs, in place of all the others.

    Raises:
        InputError: an argument means nothing here, or differs from what the model can do.
    """

    def __init__(
        self,
        pretrained: str | Path | PreTrainedModel | None = None,
        candidate: Any = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        batch_size: int | str = "auto",
        max_length: int | str | None = None,
        scales: Mapping[int, Any] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        damage: float = 0.0,
        *,
        engine: Engine | None = None,
    ) -> None:
        super().__init__()
        given_size = None if batch_size == "auto" else _positive("batch_size", batch_size)
        if (pretrained is None) == (engine is None):
            raise InputError("an lm-eval model needs a checkpoint or model, or an engine, and not both")
        if engine is None:
            if isinstance(pretrained, (str, Path)):
                from evalkit import load

                pretrained = load(
                    pretrained,
                    candidate or "bf16@reference",
                    device=device,
                    dtype=_dtype(dtype),
                    scales=scales,
                )
                candidate = scales = None  # they are the model's own now
            elif device is not None or dtype is not None:
                raise InputError("device and dtype belong to loading; the model given is loaded already")
            engine = NativeEngine(
                pretrained,
                candidate,
                scales,
                batch_size=auto_batch_size(pretrained) if given_size is None else given_size,
                max_length=None if max_length is None else _positive("max_length", max_length),
                tokenizer=tokenizer,
                damage=damage,
            )
        self.engine = engine
        self.batch_size = getattr(engine, "batch_size", 1)  # which lm-eval only tells
        self.tokenizer, self.max_length = engine.tokenizer, engine.max_length
        self._device = getattr(engine, "device", None)
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
        return self.engine.stop_ids[0]

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
            add_special_tokens = self._adds_special_tokens(string)
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
            spans.append(Span(label=_label(request), context=ids[0], continuation=ids[1]))
        return self._score(spans, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood in nats of each whole text, in windows of max_length where it is longer."""
        spans, owners = [], []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            for context, continuation in map(make_disjoint_window, windows):
                spans.append(Span(label=_label(request), context=context, continuation=continuation))
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
        spans = [Span(label=Label(None, None), context=c, continuation=t) for _, c, t in requests]
        return self._score(spans, disable_tqdm)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy text after each prompt, cut before the first of its stop strings.

        Raises:
            InputError: a request asks for sampling or another decoding, has no prompt, or is too long.
        """
        prompts = self.check(requests)
        texts = [""] * len(prompts)
        with _shown("answering", prompts, disable_tqdm) as advance:
            for i, answer in self.engine.generate(prompts):
                text = self.tokenizer.decode(answer.ids, skip_special_tokens=True)
                texts[i] = postprocess_generated_text(text, list(prompts[i].until), think_end_token=None)
                truncated = answer.ended == "length"
                self._cover(prompts[i], len(prompts[i].ids), len(answer.ids), truncated, answer.ids)
                advance()
        return texts

    def check(self, requests: Sequence[Instance]) -> list[Prompt]:
        """The prompts of requests to generate; nothing is generated.

        Raises:
            InputError: a request asks for sampling or another decoding, has no prompt, or is too long.
        """
        self._encode_prompts([request.args[0] for request in requests])  # all at once, which is faster
        return [self._prompt(request) for request in requests]

    def _prompt(self, request: Instance) -> Prompt:
        text, asked = request.args
        label = _label(request)
        wanted = normalize_gen_kwargs(asked)
        if wanted["do_sample"]:
            raise InputError(f"{label} asks for sampling; evalkit generates greedily (do_sample: false)")
        if other := sorted(wanted.keys() - GREEDY_KWARGS):
            raise InputError(f"{label} asks for {', '.join(other)}; greedy decoding has no such option")
        ids, max_new = list(_PROMPTS[self.tokenizer][text]), int(wanted["max_gen_toks"])
        if not ids:
            raise InputError(f"{label} has an empty prompt")
        if max_new < 1:
            raise InputError(f"{label} asks for {max_new} tokens; want max_gen_toks of at least 1")
        if len(ids) + max_new > self.max_length:
            raise InputError(
                f"{label}: prompt of {len(ids)} tokens + {max_new} to generate = {len(ids) + max_new}, "
                f"over max_length {self.max_length}; shorten the prompt or max_gen_toks"
            )
        return Prompt(label=label, ids=ids, max_new=max_new, until=[stop for stop in wanted["until"] if stop])

    def _adds_special_tokens(self, string: str) -> bool:
        bos = self.tokenizer.bos_token
        return not (bos and string.startswith(bos))

    def _encode_prompts(self, texts: Sequence[str]) -> None:
        """Tokenise prompts that no candidate before this one was asked, all at once."""
        known = _PROMPTS.setdefault(self.tokenizer, {})
        if len(known) > PROMPTS_KEPT and not all(text in known for text in texts):
            known.clear()
        missing = [text for text in dict.fromkeys(texts) if text not in known]
        for adds in (False, True):
            if alike := [text for text in missing if self._adds_special_tokens(text) == adds]:
                ids = self.tokenizer(alike, add_special_tokens=adds, verbose=False)["input_ids"]
                known |= {text: array("i", row) for text, row in zip(alike, ids, strict=True)}

    def _score(self, spans: list[Span], disable_tqdm: bool) -> list[tuple[float, bool]]:
        for span in spans:
            self._check(span)
        scores = [(0.0, False)] * len(spans)
        with _shown("scoring", spans, disable_tqdm) as advance:
            for i, score in self.engine.score(spans):
                scores[i] = score
                self._cover(spans[i], len(spans[i].context), len(spans[i].continuation))
                advance()
        return scores

    def _check(self, span: Span) -> None:
        if not span.continuation:
            raise InputError(f"{span.label}: the continuation has no token, so there is nothing to score")
        length = len(span.context) + len(span.continuation) - 1  # the last token is predicted, never read
        if length > self.max_length:
            raise InputError(
                f"{span.label}: context of {len(span.context)} + continuation of {len(span.continuation)} tokens "
                f"needs {length} positions, over max_length {self.max_length}"
            )

    def _cover(
        self,
        request: Prompt | Span,
        context_tokens: int,
        scored_tokens: int,
        truncated: bool | None = None,
        ids: Sequence[int] | None = None,
    ) -> None:
        self.coverage.append(
            Coverage(
                task=request.label.task,
                doc_id=request.label.doc_id,
                context_tokens=context_tokens,
                scored_tokens=scored_tokens,
                stored=self.engine.stored(request),
                truncated=truncated,
                ids=ids,
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
            "batch_size": "auto",
        }
    for name, value in defaults.items():
        if getattr(args, name, None) is None and name not in given:
            setattr(args, name, value)
    cli.execute(args)


# The ids of every prompt asked so far, by tokenizer: every candidate is asked the same ones.
_PROMPTS: WeakKeyDictionary[Any, dict[str, array[int]]] = WeakKeyDictionary()


def _shown(
    doing: str, asked: Sequence[Prompt | Span], disable: bool
) -> AbstractContextManager[Callable[[], None]]:
    """A progress bar of so many requests, named after the first one's task."""
    if disable or not asked:
        return nullcontext(lambda: None)
    return progress(f"{doing} {asked[0].label.task or 'requests'}", len(asked))


def _label(request: Instance) -> Label:
    return Label(request.task_name, request.doc_id)


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
