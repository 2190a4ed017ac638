"""Indexer key formats: what each owes its users, bytes worked out by hand, and the rule in numpy."""

import numpy as np
import pytest
import torch
from torch import Tensor

from evalkit.candidate import KEYS
from evalkit.errors import InputError
from evalkit.kv import index
from evalkit.kv.index import IndexFormat
from tests.kv.codes import E4M3, encode


@pytest.fixture(params=index.names())
def key_format(request: pytest.FixtureRequest) -> IndexFormat:
    return index.get(request.param)


def keys() -> Tensor:
    """150 bf16-valued keys of magnitudes 1e-6 to 1e4, zeros, ±448 and e4m3 subnormals among them."""
    draw = torch.Generator().manual_seed(9)
    values = torch.randn(150, 128, generator=draw) * torch.logspace(-6, 4, 150)[:, None]
    values[0] = 0
    values[1, ::2], values[1, 1::2] = 448, -448
    values[2] = torch.arange(128) * 2.0**-10
    values[2, 0] = 300
    return values.bfloat16().float()


def stored(key_format: IndexFormat, slots: Tensor, values: Tensor, page_size: int = 16) -> Tensor:
    cache = key_format.allocate(256, page_size).fill_(0xA5)
    key_format.store(cache, slots, values)
    return cache


def test_every_choice_of_a_candidate_has_a_format() -> None:
    assert {"model", *index.OPTIONS} == set(KEYS["index"])
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert index.resolve("model", dtype).dtype == dtype
        assert [index.resolve(option, dtype).key_bytes for option in index.OPTIONS] == [132, 132, 256]
    with pytest.raises(InputError, match=r"unknown indexer key format 'torch\.float64'"):
        index.resolve("model", torch.float64)


# The largest of 3 makes 3 / 448 -> 2^-7 = 0x3c000000 or 0x3bdb6db7 as it is; -1 is -128 = 0xf0 of the power of two, or
# -144 = 0xf1 (from -149.3) of the other. -500 makes 2 or 1.1161 = 0x3f8edb6e;
# divided by 2 it is -256 = 0xf8 (from -250), 17 ties at 8.5 to 8 = 0x50, and 135 becomes 64 = 0x68 (from 67.5).
WORKED = {
    "bf16": [("4040 80bf c03f", 256), ("fac3 8841 0743", 256)],
    "fp32": [("00004040 000080bf 0000c03f", 512), ("0000fac3 00008841 00000743", 512)],
    "fp16": [("0042 00bc 003e", 256), ("d0df 404c 3858", 256)],
    "indexer_fp8_ue8m0": [("7c f0 74", 128), ("f8 50 68", 128), ("0000003c 00000040", 8)],
    "indexer_fp8_fp32": [("7e f1 76", 128), ("fe 57 6f", 128), ("b76ddb3b 6edb8e3f", 8)],
}


@pytest.mark.parametrize("name", index.names())
def test_a_page_has_the_bytes_worked_out_by_hand(name: str) -> None:
    """Codes of the whole page first, then the scales: not token by token."""
    values = torch.zeros(2, 128)
    values[0, :3] = torch.tensor([3.0, -1.0, 1.5])
    values[1, :3] = torch.tensor([-500.0, 17.0, 135.0])
    key_format = index.get(name)
    cache = key_format.allocate(4, page_size=2)
    key_format.store(cache, torch.tensor([2, 3]), values)
    expected = b"".join(bytes.fromhex(lead).ljust(length, b"\0") for lead, length in WORKED[name])
    assert cache.flatten().numpy().tobytes() == bytes(len(expected)) + expected


@pytest.mark.parametrize("page_size", [1, 16, 64, 256])
@pytest.mark.parametrize(("name", "rounded"), [("indexer_fp8_ue8m0", True), ("indexer_fp8_fp32", False)])
def test_the_bytes_are_those_of_the_writers_rule(name: str, rounded: bool, page_size: int) -> None:
    values, key_format = keys(), index.get(name)
    slots = torch.randperm(256, generator=torch.Generator().manual_seed(page_size))[: len(values)]
    slots[::7] = -1
    cache = stored(key_format, slots, values, page_size).numpy()
    amax = np.maximum(np.abs(values.numpy()).max(-1), np.float32(1e-4))
    scale = amax / np.float32(448)
    if rounded:
        scale = np.exp2(np.ceil(np.log2(scale.astype(np.float64)))).astype(np.float32)
    expected = np.full_like(cache, 0xA5)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            page, place = divmod(slot, page_size)
            expected[page, place * 128 :][:128] = encode(values[token].numpy() / scale[token], E4M3)
            expected[page, page_size * 128 + place * 4 :][:4] = np.atleast_1d(scale[token]).view(np.uint8)
    np.testing.assert_array_equal(cache, expected)


def test_keys_come_back_from_the_slots_they_went_to(key_format: IndexFormat) -> None:
    values = keys()
    slots = torch.randperm(256, generator=torch.Generator().manual_seed(1))[:150]
    for page_size in (1, 3, 64, 256):
        got = key_format.load(stored(key_format, slots, values, page_size), slots)
        # Half a step of e4m3 and half a subnormal, 2^-10 of a scale below amax / 224; 2^-25 is float16's.
        limit = values.abs() * 2**-4 + values.abs().amax(-1, keepdim=True) * 2**-10 / 224 + 2**-25
        assert bool(((got - values).abs() <= limit).all())
    strided = values.bfloat16().t().contiguous().t()
    assert torch.equal(stored(key_format, slots.int(), strided), stored(key_format, slots, values.bfloat16()))


def test_a_skipped_key_leaves_every_byte_untouched(key_format: IndexFormat) -> None:
    slots = torch.full((150,), -1)
    assert bool((stored(key_format, slots, keys()) == 0xA5).all())
    slots[1::2] = torch.arange(75)
    cache = stored(key_format, slots, keys())
    assert torch.equal(cache, stored(key_format, torch.arange(75), keys()[1::2]))
    key_format.store(cache, slots[:0], keys()[:0])


def test_planes_share_memory_with_the_cache(key_format: IndexFormat) -> None:
    slots = torch.arange(150)
    cache = stored(key_format, slots, keys(), page_size=64)
    codes, scale = key_format.planes(cache)
    assert (tuple(codes.shape), codes.dtype) == ((4, 64, 128), key_format.dtype)
    assert codes.untyped_storage().data_ptr() == cache.untyped_storage().data_ptr()
    values = codes.float().flatten(0, 1)
    if scale is not None:
        assert scale.untyped_storage().data_ptr() == cache.untyped_storage().data_ptr()
        values = values * scale.flatten()[:, None]
    assert torch.equal(values[:150], key_format.load(cache, slots))


def test_what_does_not_fit_is_named_before_anything_is_written(key_format: IndexFormat) -> None:
    cache = key_format.allocate(64)
    for slots, values, says in (
        (torch.tensor([64]), torch.ones(1, 128), "slot 64 of token 0 is outside the cache: -1 to 63"),
        (torch.tensor([0]), torch.ones(1, 64), r"keys are torch.float32 \[1, 64\].*\[1, 128\] is right"),
        (torch.tensor([0]), torch.ones(1, 128).int(), "keys are torch.int32"),
    ):
        with pytest.raises(InputError, match=says):
            key_format.store(cache, slots, values)
    assert not bool(cache.any())
    with pytest.raises(InputError, match="slot -1 of token 0 is outside the cache: 0 to 63"):
        key_format.load(cache, torch.tensor([-1]))
    with pytest.raises(InputError, match=f"a multiple of {key_format.key_bytes} is right"):
        key_format.planes(cache[:, 1:])
    with pytest.raises(InputError, match="both must be at least 1"):
        key_format.allocate(0)
