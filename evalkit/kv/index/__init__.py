"""How the indexer's keys are stored: one vector of 128 per token, in formats of their own."""

import torch

from evalkit.kv.index.base import IndexFormat, Keys, index_formats

index_formats.discover(__name__)
get = index_formats.get
names = index_formats.names

__all__ = ["OPTIONS", "IndexFormat", "Keys", "get", "index_formats", "names", "resolve"]

# What a candidate's `index=` calls the formats that do not depend on the model.
OPTIONS = {"fp8": "indexer_fp8_ue8m0", "fp8_fp32": "indexer_fp8_fp32", "bf16": "bf16"}
OF_MODEL = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def resolve(option: str, dtype: torch.dtype) -> IndexFormat:
    """The format of a candidate's `index=option`, where `model` is the one that holds the model's keys of `dtype`.

    Raises:
        InputError: no such format, or none of that dtype.
    """
    return get(OF_MODEL.get(dtype, str(dtype)) if option == "model" else OPTIONS[option])
