"""Imported by vLLM's worker processes where one engine has several GPUs: repairs there what `repair` says."""

from __future__ import annotations

from evalkit.evaluate.engines.repair import repair


class Extension:
    """Named as vLLM's `worker_extension_cls`, which is how a worker process comes to import this module."""


repair()
