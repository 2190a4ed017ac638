"""What a run is asked to do: one frozen RunConfig, from a TOML file and `--set key=value`.

No environment variable changes a result; what is not said here has the default written here.
"""

import difflib
import os
import re
import tomllib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Self, Union, get_args, get_origin, get_type_hints

from evalkit import shipped
from evalkit.errors import InputError

STAGES = ("layers", "kld", "tasks")
# What each engine is told; the other ones take none of it.
ENGINES: dict[str, tuple[str, ...]] = {
    "native": (),
    "vllm": (
        "engine_python",
        "engine_starts",
        "gpus",
        "tensor_parallel",
        "pipeline_parallel",
        "data_parallel",
        "expert_parallel",
        "eager",
        "memory_share",
        "max_length",
    ),
    "endpoint": ("endpoint", "max_length"),
}
WORDS = {
    str: "text",
    int: "an integer",
    bool: "true or false",
    float: "a number",
    Path: "a path",
    type(None): "null",
    tuple[str, ...]: "a list of names",
    Literal["default"]: '"default"',
    Literal["auto"]: '"auto"',
}


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything a run depends on.

    Attributes:
        name: ends the run directory's name.
        checkpoint: an embedded checkpoint's name or a directory in Hugging Face layout.
        device: `cpu`, `cuda` or `cuda:N`; None takes the GPU where there is one.
        dtype: `bfloat16` or `float32`; None is bfloat16 on a GPU and bf16-rounded float32 on a CPU.
        candidates: what is compared, or "default".
        profile: the ranges that latent and rope are given, by a profile's name or TOML file; "native" leaves the
            checkpoint's own.
        stream: whether to hold one layer's weights at a time; "auto" does where all of them find no room.
        layers_prompt_tokens: prefilled tokens of each compared prompt.
        layers_decode_tokens: tokens then decoded one by one.
        phase_tokens: of each compared prompt, for the comparison of phases; 0 leaves it out, as streamed weights do.
        layers_prompts: a text file to compare layers on, or JSON lines, a text a line; None generates documents.
        layers_documents: how many texts; from 40 on, mean KL divergence has an interval.
        layers_frozen: whether candidates also run with selection and routing frozen to the reference's; None is false
            for a streamed checkpoint only.
        attribution: whether to find out which component of a candidate its loss comes from.
        attribution_documents: how many of the compared prompts that is done on.
        attribution_tokens: how many of their first tokens.
        kld_texts: text files to find KL divergence on; empty finds none on texts.
        kld_run: a run whose baseline's prompts and answers to find it on.
        kld_tokens: how many tokens of a text are read at once.
        tasks: names of tasks to score; empty scores none.
        task_documents: documents of each task, the same for every candidate.
        data: a folder for tasks that read files, as docs/tasks.md names them.
        batch_size: sequences that decode together, which fixes the shapes of every pass; "auto" takes what the device
            holds, and the run records it.
        engine: what scores the tasks: `native`, this project's own; `vllm`; or `endpoint`, servers that run already
            (docs/serving.md). vLLM also shows its layers and next tokens; servers score tasks only.
        engine_python: the interpreter of vLLM's environment; None is this one.
        engine_starts: fresh engines of each candidate, on the same documents; samples of each are kept apart.
        endpoint: the server of each candidate, in their order.
        gpus: names of the GPUs that engines may take, one engine beside the other; a name that is given several times
            takes as many engines at once; empty takes all, an engine each.
        tensor_parallel: GPUs that each layer is cut over.
        pipeline_parallel: GPUs that the layers are spread over.
        data_parallel: engines of one candidate, each with its share of the documents.
        expert_parallel: whether experts are spread over an engine's GPUs instead of each being cut.
        eager: whether vLLM runs without CUDA graphs.
        memory_share: of a GPU's memory, for an engine.
        max_length: the longest context that an engine has room for; None is what the tasks need, or a server's own.
        policy: the policy that the run is for, by the name of one that evalkit ships or by a TOML file; stored before
            anything is scored, and its planted damage is scored too.
        seed: of every random choice.
        stages: what a run does of `layers`, `kld` and `tasks`.
        out: the directory of runs.
    """

    name: str = "run"
    checkpoint: str = "dsa-nano"
    device: str | None = None
    dtype: str | None = None
    candidates: tuple[str, ...] | Literal["default"] = "default"
    profile: str = "native"
    stream: bool | Literal["auto"] = "auto"
    layers_prompt_tokens: int = 2048
    layers_decode_tokens: int = 32
    phase_tokens: int = 768
    layers_prompts: Path | None = None
    layers_documents: int = 1
    layers_frozen: bool | None = None
    attribution: bool = False
    attribution_documents: int = 1
    attribution_tokens: int = 1024
    kld_texts: tuple[str, ...] = ()
    kld_run: Path | None = None
    kld_tokens: int = 2048
    tasks: tuple[str, ...] = ()
    task_documents: int = 24
    data: Path | None = None
    batch_size: int | Literal["auto"] = "auto"
    engine: str = "native"
    engine_python: Path | None = None
    engine_starts: int = 3
    endpoint: tuple[str, ...] = ()
    gpus: tuple[str, ...] = ()
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    data_parallel: int = 1
    expert_parallel: bool = False
    eager: bool = True
    memory_share: float = 0.8
    max_length: int | None = None
    policy: str | None = None
    seed: int = 0
    stages: tuple[str, ...] = STAGES
    out: Path = Path("runs")

    def __post_init__(self) -> None:
        """Refuse values no run can have; files are looked at in `load`."""
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise InputError(
                f"name is {self.name!r}: letters, digits, '.', '_' and '-' make a directory's name"
            )
        if self.device is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise InputError(f"device is {self.device!r}: give cpu, cuda or cuda:N, or leave it out")
        if self.dtype not in (None, "bfloat16", "float32"):
            raise InputError(f"dtype is {self.dtype!r}: give bfloat16 or float32, or leave it out")
        if not self.candidates:
            raise InputError('candidates is empty: name at least one, or "default"')
        if not self.stages or not set(self.stages) <= set(STAGES):
            raise InputError(
                f"stages is {', '.join(self.stages) or 'empty'}: give some of {', '.join(STAGES)}"
            )
        least = {
            "layers_prompt_tokens": 1,
            "phase_tokens": 0,
            "layers_decode_tokens": 0,
            "layers_documents": 1,
            "kld_tokens": 2,
            "attribution_documents": 1,
            "attribution_tokens": 1,
            "task_documents": 1,
            "batch_size": 1,
            "engine_starts": 1,
            "tensor_parallel": 1,
            "pipeline_parallel": 1,
            "data_parallel": 1,
            "max_length": 1,
            "seed": 0,
        }
        for key, minimum in least.items():
            if getattr(self, key) not in ("auto", None) and getattr(self, key) < minimum:
                raise InputError(f"{key} is {getattr(self, key)}: it must be at least {minimum}")
        self._refuse_what_the_engine_does_not_take()

    def _refuse_what_the_engine_does_not_take(self) -> None:
        if self.engine not in ENGINES:
            raise InputError(f"engine is {self.engine!r}: give {', '.join(ENGINES)}")
        if not 0 < self.memory_share <= 1:
            raise InputError(f"memory_share is {self.memory_share:g}: a share of a GPU's memory, up to 1")
        defaults = {field.name: field.default for field in fields(self)}
        for key in dict.fromkeys(key for keys in ENGINES.values() for key in keys):
            if key not in ENGINES[self.engine] and getattr(self, key) != defaults[key]:
                takers = " or ".join(engine for engine, keys in ENGINES.items() if key in keys)
                raise InputError(f"{key} is given, and engine is {self.engine}: it is for engine={takers}")

    @classmethod
    def load(
        cls, path: str | Path | None = None, overrides: Sequence[str] = (), policy: str | None = None
    ) -> Self:
        """Read a TOML file, or take the defaults, then apply `key=value` overrides in order.

        Args:
            path: the file, or the name of a configuration that evalkit ships.
            overrides: each as `key=value`.
            policy: goes before the one that file or overrides give.

        Raises:
            InputError: a file is missing or unreadable, a key unknown, or a value of the wrong type.
        """
        values: dict[str, Any] = {}
        if path is not None:
            file = shipped.find("configuration", path)
            values = {key: _value(key, raw, str(file)) for key, raw in _toml(file).items()}
        for override in overrides:
            key, equals, text = override.partition("=")
            if not equals:
                raise InputError(f"--set {override}: give it as key=value")
            values[key.strip()] = _from_text(key.strip(), text.strip())
        if policy is not None:
            values["policy"] = policy
        if values.get("policy") is not None:
            # The run keeps it, and may go on from another folder.
            values["policy"] = shipped.lasting("policy", values["policy"])
        config = cls(**values)
        if config.layers_prompts is not None:
            _refuse_unreadable(config.layers_prompts)
        if config.data is not None and not config.data.is_dir():
            raise InputError(
                f"data is {config.data}, which is no folder: name the one that holds the tasks' files"
            )
        if config.engine_python is not None and not os.access(config.engine_python, os.X_OK):
            raise InputError(
                f"engine_python is {config.engine_python}, which is no program: name a python that has vLLM"
            )
        _refuse_unwritable(config.out)
        return config

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """What `to_json` wrote, as a run directory keeps it."""
        return cls(**{key: _value(key, raw, "run.json") for key, raw in values.items() if raw is not None})

    def to_json(self) -> dict[str, Any]:
        """The configuration as JSON values, None included."""
        return {
            key: str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
        }

    def with_values(self, **values: Any) -> Self:
        """A copy with some values replaced."""
        return replace(self, **values)


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except IsADirectoryError:
        raise InputError(f"{path} is a directory: give a TOML file") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not TOML: {error}") from None


def _refuse_unreadable(prompts: Path) -> None:
    if not prompts.is_file():
        raise InputError(f"layers_prompts: no text file at {prompts}")
    try:
        text = prompts.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"layers_prompts: {prompts} is not UTF-8 text: {error}") from None
    except OSError as error:
        raise InputError(f"layers_prompts: {prompts} cannot be read: {error.strerror}") from None
    if not text.strip():
        raise InputError(f"layers_prompts: {prompts} is empty: give text of a few thousand tokens")


def _refuse_unwritable(out: Path) -> None:
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not there.is_dir():
        raise InputError(f"out is {out}, and {there} is a file: name a directory that runs can be made in")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"out is {out}, and {there} cannot be written to: name another directory")


def _options(key: str, where: str) -> tuple[Any, ...]:
    """The types that a key's value may have."""
    hints = get_type_hints(RunConfig)
    if key not in hints:
        known = [field.name for field in fields(RunConfig)]
        raise InputError(f"{where}: unknown key {key!r}{_meant(key, known)} (keys: {', '.join(known)})")
    return get_args(hints[key]) if get_origin(hints[key]) in (Union, UnionType) else (hints[key],)


def _value(key: str, raw: object, where: str) -> Any:
    """A TOML or JSON value as its field's type."""
    for option in _options(key, where):
        if option is Path and isinstance(raw, str):
            return Path(raw)
        if (
            get_origin(option) is tuple
            and isinstance(raw, list)
            and all(isinstance(item, str) for item in raw)
        ):
            return tuple(raw)
        if get_origin(option) is Literal and raw in get_args(option):
            return raw
        if option in (str, int, bool) and type(raw) is option:
            return raw
        if option is float and isinstance(raw, (int, float)) and not isinstance(raw, bool):
            return float(raw)
    raise InputError(f"{where}: {key} is {raw!r}: it takes {_takes(key)}")


def _from_text(key: str, text: str) -> Any:
    """A `--set` value as its field's type: lists are separated by commas, `null` is None."""
    takes = _takes(key)
    if text in ("", "null") and "null" in takes:
        return None
    raw: object = text
    if "an integer" in takes and re.fullmatch(r"[+-]?\d+", text):
        raw = int(text)
    elif "a number" in takes:
        with suppress(ValueError):
            raw = float(text)
    elif "true or false" in takes and text in ("true", "false"):
        raw = text == "true"
    elif "list" in takes and text != "default":
        raw = [item.strip() for item in text.split(",") if item.strip()]
    return _value(key, raw, "--set")


def _takes(key: str) -> str:
    return " or ".join(WORDS[option] for option in _options(key, "--set"))


def _meant(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f", did you mean {close[0]!r}?" if close else ""
