"""Stands in for vLLM in tests: the names and signatures that evalkit uses, over this project's own path on a CPU.

Signatures are those recorded from vLLM's sources (vllm_signatures.json) in the version that STAND_IN_VERSION names.
STAND_IN_SCRIPT says what goes wrong: {"die_at": step, "once": file, "say": line, "fail_start": line, "backend": name,
"drift": size of what each start adds to values and logits}.
"""

from vllm.llm import LLM
from vllm.recorded import VERSION, SamplingParams

__version__ = VERSION

__all__ = ["LLM", "SamplingParams", "__version__"]
