"""evalkit: what a KV-cache format costs a sparse-MLA model, layer by layer and on tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evalkit.model.load import load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import; `evalkit --help` needs neither.
    if name == "load":
        from evalkit.model.load import load

        return load
    raise AttributeError(f"module 'evalkit' has no attribute {name!r}")
