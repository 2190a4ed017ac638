"""Stands in for vLLM in tests: the names and signatures that evalkit uses, over this project's own path on a CPU.

Signatures are those recorded from vLLM's sources (vllm_signatures.json). STAND_IN_VERSION is what it says its version is.
STAND_IN_SCRIPT says what goes wrong: {"die_at": step, "once": file, "say": line, "fail_start": line, "backend": name,
"drift": size of what each start adds to values and logits}.
"""

from vllm.llm import LLM
from vllm.recorded import VERSION, SamplingParams

__version__ = VERSION

__all__ = ["LLM", "SamplingParams", "__version__"]
