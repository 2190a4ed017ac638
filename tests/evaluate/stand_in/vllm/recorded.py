"""What was recorded of vLLM, as classes and functions that refuse every other argument."""

import json
import os
from dataclasses import field, make_dataclass
from pathlib import Path

VERSION = os.environ.get("STAND_IN_VERSION", "0.33.0")
RECORDED = json.loads(Path(__file__).parents[2].joinpath("vllm_signatures.json").read_text())["0.33.0"]
SCRIPT = json.loads(os.environ.get("STAND_IN_SCRIPT", "{}"))


def dataclass_of(name):
    return make_dataclass(name, [(one, object, field(default=None)) for one in RECORDED["fields"][name]])


EngineArgs, SamplingParams = dataclass_of("EngineArgs"), dataclass_of("SamplingParams")
CompletionOutput, Logprob = dataclass_of("CompletionOutput"), dataclass_of("Logprob")


def takes(name, *args, **kwargs):
    """Raise TypeError unless the recorded function takes these arguments."""
    names = [one for one in RECORDED["functions"][name] if not one.startswith("*")]
    free = any(one.startswith("**") for one in RECORDED["functions"][name])
    if len(args) > len(names) or (not free and set(kwargs) - set(names)):
        raise TypeError(f"{name} takes {names}, got {len(args)} and {sorted(kwargs)}")
