"""Writes a checkpoint of given sizes with random weights, in the file layout of the published ones.

Matrices are N(0, 1 / fan-in), norms one, so that every layer adds about as much as it is given. Tensors are made one
at a time, on the GPU where there is one, and written at their place in their shard: no layer is ever whole in memory.
A tensor's values follow from seed, name and kind of device.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from evalkit.errors import InputError
from evalkit.model.checkpoint import EMBEDDED, read_config
from evalkit.model.synthetic.dims import DIMS, QUANTIZATION
from evalkit.model.weights.fp8 import SCALE_SUFFIX, quantise, scale_shape

BLOCK: Final = (128, 128)
SHARD_BYTES: Final = 4 << 30
WRITERS: Final = 8
UNWRITTEN_BYTES: Final = 2 << 30
STORED_AS: Final = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3"}
# Published checkpoints leave these in bf16 (the correction bias in float32) beside fp8 matrices.
WIDE: Final = ("embed_tokens.weight", "lm_head.weight", "mlp.gate.weight", "indexer.weights_proj.weight")
TOKENIZER: Final = ("tokenizer.json", "tokenizer_config.json")

Advance = Callable[[], None]


@dataclass(frozen=True)
class Piece:
    """One tensor of the checkpoint, and its scales' name where it is stored in fp8 blocks."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def entries(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """What is stored for it: (name, dtype, shape)."""
        found = [(self.name, self.dtype, self.shape)]
        if self.dtype == torch.float8_e4m3fn:
            found.append((self.name + SCALE_SUFFIX, torch.float32, scale_shape(self.shape, BLOCK)))
        return found

    @property
    def nbytes(self) -> int:
        return sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in self.entries)


def synth_config(dims: str, layers: int | None, changes: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """config.json of a checkpoint with these sizes.

    Args:
        dims: a name in `DIMS`.
        layers: decoder layers; None takes as many as the published one. With fewer, one is dense.
        changes: keys of config.json over the published ones.
        dtype: `fp8` or `bf16`.

    Raises:
        InputError: dims, dtype or a key is not known, or there is no layer.
    """
    if dims not in DIMS:
        raise InputError(f"dims is {dims!r}: give one of {', '.join(DIMS)}")
    if dtype not in ("fp8", "bf16"):
        raise InputError(f"dtype is {dtype!r}: give fp8 or bf16")
    config = dict(DIMS[dims])
    if unknown := sorted(changes.keys() - config.keys() - {"indexer_types", "index_topk_freq"}):
        raise InputError(f"--set {unknown[0]}: {dims} has no such key (keys: {', '.join(sorted(config))})")
    if layers is not None:
        if layers < 1:
            raise InputError(f"layers is {layers}: at least one is needed")
        if layers < config["num_hidden_layers"]:
            config["first_k_dense_replace"] = 1
        config["num_hidden_layers"] = layers
    config |= changes
    return config | ({"quantization_config": QUANTIZATION} if dtype == "fp8" else {})


def synth(
    out: Path, config: Mapping[str, Any], seed: int = 0, advance: Advance | None = None, device: Any = None
) -> Path:
    """Write the checkpoint to `out`, whole or not at all, with the embedded checkpoint's tokenizer.

    Args:
        out: a directory that does not exist or is empty.
        config: what `synth_config` returns.
        seed: of all weights.
        advance: called once for each whole 1,000,000 bytes made; `synth_bytes` says how many there are.
        device: where weights are made; None takes the GPU where there is one.

    Raises:
        InputError: `out` is in use, the disk has no room, or the configuration is not one of a model.
    """
    _refuse_in_use(out)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    partial = out.absolute().with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    there = next(path for path in partial.parents if path.exists())
    try:
        partial.mkdir(parents=True)
        (partial / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n")
        pieces = _pieces(partial)
        needed, free = sum(piece.nbytes for piece in pieces), shutil.disk_usage(there).free
        if needed > free:
            raise InputError(f"{out} takes {needed / 1e9:.1f} GB, {there} has {free / 1e9:.1f} GB free")
        for name in TOKENIZER:
            shutil.copy(EMBEDDED / "dsa-nano" / name, partial)
        index = _write_shards(partial, pieces, seed, place, advance or (lambda: None))
        (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        partial.rename(out)
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def synth_bytes(config: Mapping[str, Any]) -> int:
    """How much the tensors of such a checkpoint take."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(dict(config)))
        return sum(piece.nbytes for piece in _pieces(Path(directory)))


def changes_of(texts: Sequence[str]) -> dict[str, Any]:
    """`key=value` as keys of config.json; a value is JSON, or text where it is none.

    Raises:
        InputError: a text has no `=`.
    """
    changes = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"--set {text}: give it as key=value")
        try:
            changes[key.strip()] = json.loads(value)
        except json.JSONDecodeError:
            changes[key.strip()] = value.strip()
    return changes


def _refuse_in_use(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is {'not empty' if out.is_dir() else 'a file'}: name a directory to be made")


def _pieces(directory: Path) -> list[Piece]:
    """All tensors in the order of the layers, experts one by one."""
    from transformers import AutoModelForCausalLM

    from evalkit.model.weights.stream import sources, state_of

    config = read_config(directory)
    narrow = (
        torch.float8_e4m3fn if getattr(config, "quantization_config", None) is not None else torch.bfloat16
    )
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    words = json.loads((EMBEDDED / "dsa-nano" / "tokenizer.json").read_text())["model"]["vocab"]
    if config.vocab_size < len(words):
        raise InputError(
            f"vocab_size is {config.vocab_size}: the tokenizer that goes with it has {len(words)} tokens"
        )
    found = []
    for name, tensor in state_of(model).items():
        match name.partition(".mlp.experts."):
            case (layer, ".mlp.experts.", parameter):
                experts = sources(f"mlp.experts.{parameter}", {f"mlp.experts.{parameter}": tensor})
                rows = tensor.shape[1] // (2 if parameter == "gate_up_proj" else 1)
                found += [Piece(f"{layer}.{source}", (rows, tensor.shape[2]), narrow) for source in experts]
            case _:
                found.append(Piece(name, tuple(tensor.shape), _dtype(name, tensor, narrow)))
    return found


def _dtype(name: str, tensor: Tensor, narrow: torch.dtype) -> torch.dtype:
    if name.endswith("e_score_correction_bias"):
        return torch.float32
    is_matrix = tensor.dim() == 2 and not name.endswith(WIDE)
    return narrow if is_matrix else torch.bfloat16


def _write_shards(
    directory: Path, pieces: Sequence[Piece], seed: int, device: torch.device, advance: Advance
) -> dict[str, Any]:
    """Write every shard; the index of what lies where."""
    shards: list[list[Piece]] = [[]]
    for piece in pieces:
        if shards[-1] and sum(held.nbytes for held in shards[-1]) + piece.nbytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(piece)
    places: dict[str, str] = {}
    writing: deque[tuple[int, Future[None]]] = deque()
    made = 0
    with ThreadPoolExecutor(WRITERS) as writers:
        for number, shard in enumerate(shards, start=1):
            name = f"model-{number:05}-of-{len(shards):05}.safetensors"
            offsets, header = _layout(shard)
            descriptor = os.open(directory / name, os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.pwrite(descriptor, header, 0)
                for piece in shard:
                    for stored, value in _make(piece, seed, device):
                        content = _on_host(value)
                        writing.append(
                            (len(content), writers.submit(_write, descriptor, content, offsets[stored]))
                        )
                        places[stored] = name
                    while sum(size for size, _ in writing) > UNWRITTEN_BYTES:
                        writing.popleft()[1].result()
                    for _ in range((made + piece.nbytes) // 1_000_000 - made // 1_000_000):
                        advance()
                    made += piece.nbytes
                while writing:
                    writing.popleft()[1].result()
            finally:
                os.close(descriptor)
    return {
        "metadata": {"total_size": sum(p.nbytes for p in pieces)},
        "weight_map": dict(sorted(places.items())),
    }


def _layout(shard: Sequence[Piece]) -> tuple[dict[str, int], bytes]:
    """Where each tensor begins in the file, and the file's header. Wide dtypes lie first, so that all are aligned."""
    entries = sorted(
        (entry for piece in shard for entry in piece.entries), key=lambda entry: -entry[1].itemsize
    )
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in entries:
        size = math.prod(shape) * dtype.itemsize
        described[name] = {"dtype": STORED_AS[dtype], "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(described).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return {name: len(header) + described[name]["data_offsets"][0] for name, _, _ in entries}, header


def _make(piece: Piece, seed: int, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """The tensors stored for one piece, by name."""
    if piece.name.endswith(("norm.weight", "layernorm.weight")):
        yield piece.name, torch.ones(piece.shape, dtype=piece.dtype, device=device)
        return
    if piece.name.endswith("norm.bias"):
        yield piece.name, torch.zeros(piece.shape, dtype=piece.dtype, device=device)
        return
    digest = hashlib.sha256(f"{seed}/{piece.name}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))
    std = {"model.embed_tokens.weight": 1.0}.get(piece.name, piece.shape[-1] ** -0.5)
    values = torch.randn(piece.shape, generator=generator, device=device).mul_(std)
    if piece.dtype == torch.float8_e4m3fn:
        codes, scale = quantise(values, BLOCK)
        yield piece.name, codes
        yield piece.name + SCALE_SUFFIX, scale
    else:
        yield piece.name, values.to(piece.dtype)


def _on_host(value: Tensor) -> memoryview:
    content = value.contiguous().view(-1).view(torch.uint8)
    if content.is_cuda:
        content = torch.empty(content.shape, dtype=torch.uint8, pin_memory=True).copy_(content)
    return content.numpy().data


def _write(descriptor: int, content: memoryview, offset: int) -> None:
    while content:
        done = os.pwrite(descriptor, content, offset)
        content, offset = content[done:], offset + done
