"""A candidate: which KV format, scaled how, read by which backend, written `format[:scales]@backend[+key=value]`."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from evalkit.errors import InputError

SCALES = ("one", "checkpoint", "calibrated")
KEYS = {
    "index": ("model", "fp8", "fp8_fp32", "bf16"),
    "read": ("native", "decoded"),
    "reader": ("exact", "sm90_bf16", "sm100_e8m0"),
    "write": ("rounded", "fused"),
}
EXAMPLE = "fp8_e4m3:one@flashinfer+index=fp8"
BEST = "best"  # backend of a candidate written without `@`: the first that can run here

_PATTERN = re.compile(r"(?P<format>\w+)(:(?P<scales>\w+))?(@(?P<backend>\w+))?(?P<options>(\+\w+=\w+)*)")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to store and read the KV cache.

    format: how a token's latent and rope are stored, vLLM's name or an alias of it.
    scales: where a per-tensor scale comes from; `one` is 1.0.
    backend: what reads the rows and attends; `best` until it is resolved for a device.
    index: how indexer keys are stored and its queries sent: `model` (the model's dtype), `fp8` (as vLLM does at every
        cache dtype, with power-of-two scales), `fp8_fp32` (with any scale) or `bf16`.
    read: `native`, the kernel reads the rows themselves; `decoded`, rows of any format are decoded to bf16, with
        scales rounded as a kernel rounds them, and the backend's bf16 kernel reads those.
    reader: how `reference` turns rows into numbers: `exact`, or as another GPU's kernel does, with scales rounded to
        bf16 or truncated to their exponent. A kernel reads in its own way, and takes no other.
    write: what the writer of rows is given: `rounded`, latent and rope in the model's dtype; `fused`, in float32, as in
        vLLM 0.33.0, whose one kernel norms, rotates and writes. Only then is a value rounded once.
    """

    format: str
    scales: str = "one"
    backend: str = BEST
    index: str = "model"
    read: str = "native"
    reader: str = "exact"
    write: str = "rounded"

    @classmethod
    def parse(cls, text: str) -> Candidate:
        """Read `format[:scales]@backend[+key=value]`, e.g. `fp8_e4m3:one@flashinfer+index=fp8`.

        Raises:
            InputError: the text has another form, or names an unknown scale source, key or value.
        """
        match = _PATTERN.fullmatch(text.strip())
        if match is None:
            raise InputError(
                f"candidate {text!r} is not format[:scales][@backend][+key=value], e.g. {EXAMPLE}"
            )
        scales = match["scales"] or "one"
        if scales not in SCALES:
            raise InputError(f"candidate {text!r}: scales {scales!r} is not one of {', '.join(SCALES)}")
        options: dict[str, str] = {}
        for option in filter(None, match["options"].split("+")):
            key, value = option.split("=")
            if key not in KEYS:
                raise InputError(f"candidate {text!r}: unknown key {key!r}; known: {', '.join(KEYS)}")
            if value not in KEYS[key]:
                raise InputError(f"candidate {text!r}: {key}={value} is not one of {', '.join(KEYS[key])}")
            if key in options:
                raise InputError(f"candidate {text!r}: key {key!r} appears twice")
            options[key] = value
        return cls(format=match["format"], scales=scales, backend=match["backend"] or BEST, **options)

    def on(self, backend: str, format: str) -> Candidate:
        """The same candidate with its backend and format resolved to real names.

        Raises:
            InputError: it names a source of scales, and the format takes none.
        """
        from evalkit import kv

        if self.scales != "one" and not kv.get(format).uses_scales:
            raise InputError(
                f"{format}:{self.scales}@{backend}: {format} takes no scale from outside; write {format}@{backend}"
            )
        return replace(self, backend=backend, format=format)

    def __str__(self) -> str:
        from evalkit import kv

        known = self.format in kv.names()
        scaled = self.scales != "one" or (known and kv.get(self.format).uses_scales)
        text = self.format + (f":{self.scales}" if scaled else "") + f"@{self.backend}"
        text += f"+index={self.index}" if self.index != "model" else ""
        text += f"+read={self.read}" if self.read != "native" else ""
        text += f"+reader={self.reader}" if self.reader != "exact" else ""
        return text + (f"+write={self.write}" if self.write != "rounded" else "")
