"""What every registered format owes its users; a new format is tested here without an edit."""

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from evalkit import cli, kv
from evalkit.candidate import Candidate
from evalkit.errors import InputError
from evalkit.kv.base import RowFormat, formats
from evalkit.kv.scales import Scales

# Saturates nothing in the fixtures, and is neither a power of two nor the same for both parts.
SCALES = Scales(latent=11.3, rope=13.7)

Row = tuple[Tensor, Tensor]


@pytest.fixture(params=kv.names())
def row_format(request: pytest.FixtureRequest) -> RowFormat:
    return kv.get(request.param)


def stored(row_format: RowFormat, slots: Tensor, row: Row, page_size: int = 16, count: int = 96) -> Tensor:
    cache = row_format.allocate(count, page_size=page_size)
    row_format.store(cache, slots, *row, SCALES)
    return cache


def scattered(count: int) -> Tensor:
    """Distinct slots below 96 in no order."""
    return torch.randperm(96, generator=torch.Generator().manual_seed(5))[:count]


def test_values_come_back_from_the_slots_they_went_to(row_format: RowFormat, rows: Row) -> None:
    slots = scattered(37)
    cache = stored(row_format, slots, rows)
    for got, ref in zip(row_format.load(cache, slots, SCALES), rows, strict=True):
        assert got.dtype == torch.float32
        # Half a step of e4m3 is 2^-4 of a value; a subnormal's is 2^-10 of the scale.
        limit = ref.abs() * 2**-4 + 2**-10 * max(SCALES.latent, SCALES.rope)
        if row_format.four_bit and got.shape[1] == 512:
            # Half of e2m1's widest step is 1/6 of the group's largest, its scale's rounding 1/8 of that again. A group
            # loses all of it where its scale rounds to zero.
            largest = ref.unflatten(-1, (-1, 16)).abs().amax(-1).repeat_interleave(16, -1)
            limit = largest * (1 / 6 + 1 / 48) + 6 * 2**-10 * SCALES.latent
        assert bool(((got - ref).abs() <= limit).all())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_slots_of_either_integer_type_are_the_same(
    row_format: RowFormat, rows: Row, dtype: torch.dtype
) -> None:
    slots = scattered(37)
    torch.testing.assert_close(stored(row_format, slots.to(dtype), rows), stored(row_format, slots, rows))


def test_strided_and_half_precision_inputs_are_taken(row_format: RowFormat, rows: Row) -> None:
    slots = torch.stack([scattered(37)] * 2, 1)[:, 0]
    latent, rope = (part.bfloat16().t().contiguous().t() for part in rows)
    assert not slots.is_contiguous()
    assert not latent.is_contiguous()
    assert torch.equal(stored(row_format, slots, (latent, rope)), stored(row_format, scattered(37), rows))


def test_a_skipped_token_leaves_every_byte_untouched(row_format: RowFormat, rows: Row) -> None:
    """Slot 0 is the one that a clamped -1 would hit: with other bytes, or over those that this call wrote."""
    other = (torch.arange(96) + 5) % 37
    cache = stored(row_format, torch.arange(96), (rows[0][other], rows[1][other]))
    before = cache.clone()
    row_format.store(cache, torch.full((37,), -1), *rows, SCALES)
    assert torch.equal(cache, before)

    slots = torch.arange(37)
    slots[1::2] = -1
    row_format.store(cache, slots, *rows, SCALES)
    row_format.store(before, slots[::2], rows[0][::2], rows[1][::2], SCALES)
    assert torch.equal(cache, before)


def test_a_row_does_not_depend_on_its_neighbours(row_format: RowFormat, rows: Row) -> None:
    slots = scattered(37)
    together = row_format.load(stored(row_format, slots, rows), slots, SCALES)
    loud = tuple(part * 1e3 for part in rows)
    cache = stored(row_format, (slots + 1) % 96, loud)
    row_format.store(cache, slots[7:8], rows[0][7:8], rows[1][7:8], SCALES)
    alone = row_format.load(cache, slots[7:8], SCALES)
    for got, ref in zip(alone, together, strict=True):
        assert torch.equal(got, ref[7:8])


@pytest.mark.parametrize("page_size", [1, 3, 64, 4096])
def test_a_row_does_not_depend_on_the_page_size(row_format: RowFormat, rows: Row, page_size: int) -> None:
    slots = scattered(37)
    expected = row_format.load(stored(row_format, slots, rows), slots, SCALES)
    got = row_format.load(stored(row_format, slots, rows, page_size=page_size), slots, SCALES)
    for part, ref in zip(got, expected, strict=True):
        assert torch.equal(part, ref)


def test_zeros_stay_zero(row_format: RowFormat) -> None:
    """A writer without a floor on its scale divides by zero here."""
    slots = torch.tensor([3])
    cache = stored(row_format, slots, (torch.ones(1, 512), torch.ones(1, 64)))
    row_format.store(cache, slots, torch.zeros(1, 512), torch.zeros(1, 64), SCALES)
    for part in row_format.load(cache, slots, SCALES):
        assert torch.equal(part, torch.zeros_like(part))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("magnitude", [1e-4, 1e-2, 1.0, 448.0, 1e3, 3e38])
def test_finite_input_reads_back_finite(row_format: RowFormat, magnitude: float, dtype: torch.dtype) -> None:
    slots = torch.tensor([1, 2])
    sign = torch.tensor([[1.0], [-1.0]])
    row = (torch.linspace(0, 1, 512) * magnitude * sign, torch.linspace(0, 1, 64) * magnitude * sign)
    cache = stored(row_format, slots, tuple(part.to(dtype) for part in row))
    for part in row_format.load(cache, slots, SCALES):
        assert bool(part.isfinite().all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_is_not_stored_as_a_number(row_format: RowFormat, bad: float) -> None:
    """An infinity may saturate, as the real writers of a per-tensor format do; NaN must stay visible."""
    slots = torch.tensor([0, 1])
    latent, rope = torch.ones(2, 512), torch.ones(2, 64)
    latent[1, 200], rope[1, 20] = bad, bad
    got_latent, got_rope = row_format.load(stored(row_format, slots, (latent, rope)), slots, SCALES)
    assert bool(got_latent[0].isfinite().all())
    assert bool(got_rope[0].isfinite().all())
    for value, has_nan in ((got_latent[1, 200], not row_format.four_bit), (got_rope[1, 20], True)):
        if bad == bad:
            assert not abs(value) < 448
        elif has_nan:
            assert bool(value.isnan())


def test_a_tile_of_nothing_but_nan_stays_nan(row_format: RowFormat) -> None:
    slots = torch.tensor([0])
    cache = stored(row_format, slots, (torch.full((1, 512), torch.nan), torch.full((1, 64), torch.nan)))
    latent, rope = row_format.load(cache, slots, SCALES)
    assert bool(rope.isnan().all())
    assert bool(latent.isnan().all()) != row_format.four_bit


def test_a_row_is_row_bytes_and_no_more(row_format: RowFormat, rows: Row) -> None:
    """The bytes that end equal, whatever the cache held before, are the bytes written."""
    slots = scattered(37)
    cache = row_format.allocate(96, page_size=16)
    assert cache.dtype == torch.uint8
    assert cache.numel() == 96 * row_format.row_bytes
    black, white = cache.clone().fill_(0x00), cache.clone().fill_(0xFF)
    for each in (black, white):
        row_format.store(each, slots, *rows, SCALES)
    assert int((black == white).sum()) == 37 * row_format.row_bytes


def test_loaded_values_survive_another_round_trip(row_format: RowFormat, rows: Row) -> None:
    slots = scattered(37)
    once = row_format.load(stored(row_format, slots, rows), slots, SCALES)
    twice = row_format.load(stored(row_format, slots, once), slots, SCALES)
    for got, ref in zip(twice, once, strict=True):
        # Dividing 448 * scale by 448 may miss a scale that is no power of two by an ulp.
        changed = ~torch.isclose(got, ref, rtol=2**-22, atol=0)
        # A group of e2m1 whose largest value was lowered gets another scale: 0.15 and 1.3 % of these latents change.
        limit = 0.015 if row_format.four_bit and got.shape[1] == 512 else 0
        assert float(changed.float().mean()) <= limit


def test_planes_share_memory_with_the_cache(row_format: RowFormat, rows: Row) -> None:
    cache = row_format.allocate(96, page_size=16)
    planes = row_format.planes(cache)
    assert sum(plane.numel() * plane.element_size() for plane in planes) == cache.numel()
    row_format.store(cache, scattered(37), *rows, SCALES)
    for plane in planes:
        start = plane.data_ptr() - cache.data_ptr()
        seen = cache.view(-1)[start : start + plane.numel() * plane.element_size()]
        assert torch.equal(plane.view(torch.uint8).flatten(), seen)
        assert bool(seen.any())


def test_uses_scales_says_whether_a_scale_changes_the_bytes(row_format: RowFormat, rows: Row) -> None:
    slots = scattered(37)
    cache = row_format.allocate(96)
    row_format.store(cache, slots, *rows, Scales())
    assert torch.equal(cache, stored(row_format, slots, rows, page_size=64)) != row_format.uses_scales


def test_no_tokens_are_no_work(row_format: RowFormat) -> None:
    cache = row_format.allocate(96)
    none = torch.empty(0, dtype=torch.int64)
    row_format.store(cache, none, torch.empty(0, 512), torch.empty(0, 64), SCALES)
    assert not bool(cache.any())
    latent, rope = row_format.load(cache, none, SCALES)
    assert (latent.shape, rope.shape) == ((0, 512), (0, 64))


@pytest.mark.parametrize(
    ("slots", "latent", "rope", "says"),
    [
        (torch.tensor([0, 96]), (2, 512), (2, 64), "slot 96 of token 1 is outside the cache: -1 to 95"),
        (torch.tensor([-2, 0]), (2, 512), (2, 64), "slot -2 of token 0 is outside the cache"),
        (torch.tensor([0.0, 1.0]), (2, 512), (2, 64), "slots are torch.float32"),
        (torch.tensor([[0, 1]]), (2, 512), (2, 64), r"int32 or int64 \[T\] is right"),
        (torch.tensor([0, 1]), (2, 511), (2, 64), r"latent is torch.float32 \[2, 511\].*\[2, 512\] is right"),
        (torch.tensor([0, 1]), (2, 512), (1, 64), r"rope is torch.float32 \[1, 64\].*\[2, 64\] is right"),
    ],
)
def test_what_does_not_fit_is_named_before_anything_is_written(
    row_format: RowFormat, slots: Tensor, latent: tuple[int, ...], rope: tuple[int, ...], says: str
) -> None:
    cache = row_format.allocate(96, page_size=16)
    with pytest.raises(InputError, match=says):
        row_format.store(cache, slots, torch.ones(latent), torch.ones(rope), SCALES)
    assert not bool(cache.any())


def test_a_load_refuses_a_skipped_slot_and_a_foreign_cache(row_format: RowFormat) -> None:
    cache = row_format.allocate(96, page_size=16)
    with pytest.raises(InputError, match="slot -1 of token 1 is outside the cache: 0 to 95"):
        row_format.load(cache, torch.tensor([0, -1]), SCALES)
    for foreign in (cache.float(), cache.flatten(), cache[:, :-1], cache.t()):
        with pytest.raises(InputError, match=f"a multiple of {row_format.row_bytes} is right"):
            row_format.load(foreign, torch.tensor([0]), SCALES)
    with pytest.raises(InputError, match="both must be at least 1"):
        row_format.allocate(0)


def test_tensors_on_another_device_than_the_cache_are_refused(row_format: RowFormat) -> None:
    cache = row_format.allocate(96)
    with pytest.raises(InputError, match="latent on meta, cache on cpu"):
        row_format.store(
            cache, torch.tensor([0]), torch.ones(1, 512, device="meta"), torch.ones(1, 64), SCALES
        )


# All that a new format is, but for its row of bytes and its docstring.
ONE_FILE = """
import torch
from evalkit.kv.base import RowFormat, Rows, as_bytes, formats
@formats.register
class RopeFirst(RowFormat):
    name, row_bytes = "rope_first", 1152
    def encode(self, latent, rope, scales):
        return as_bytes(rope.bfloat16(), latent.bfloat16())
    def decode(self, rows, scales, read_scale):
        values = rows.view(torch.bfloat16).float()
        return values[:, 64:], values[:, :64]
    def planes(self, cache):
        return Rows(cache.view(-1, 1152).view(torch.bfloat16))
"""


@pytest.fixture
def rope_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of rope_first.py, which is imported, and forgotten afterwards."""
    (tmp_path / "rope_first.py").write_text(ONE_FILE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    before = kv.names()
    importlib.import_module("rope_first")
    yield tmp_path
    formats.remove("rope_first")
    del sys.modules["rope_first"]
    assert kv.names() == before


def test_a_format_is_twelve_lines_that_every_command_knows(
    rope_first: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(ONE_FILE.strip().splitlines()) <= 12
    assert "rope_first" in kv.names()
    monkeypatch.setenv("COLUMNS", "200")
    for command, said in (
        ("formats", r"rope_first\W+1152\W+100%"),
        ("doctor", r"reference\W+rope_first\W+native\W+relative L2"),
    ):
        with pytest.raises(SystemExit) as caught:
            cli.main([command])
        assert caught.value.code == 0
        assert re.search(said, capsys.readouterr().out)
    candidate = Candidate.parse("rope_first@reference+reader=sm90_bf16")
    assert kv.resolve(candidate.format, candidate.backend) == "rope_first"
    assert str(candidate.on("reference", "rope_first")) == "rope_first@reference+reader=sm90_bf16"
    with pytest.raises(InputError, match="rope_first takes no scale from outside"):
        Candidate.parse("rope_first:calibrated@reference").on("reference", "rope_first")


def test_the_checks_of_this_file_run_over_a_format_of_another(rope_first: Path) -> None:
    """In a process of its own, since pytest asks for the names when it collects."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "rope_first",
            "-k",
            "[rope_first",
            __file__,
        ],
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(rope_first), *sys.path])},
        capture_output=True,
        text=True,
    )
    counts = re.search(r"(\d+) passed, \d+ deselected", done.stdout)
    assert done.returncode == 0, done.stdout
    assert counts is not None, done.stdout
    assert int(counts[1]) >= 35
