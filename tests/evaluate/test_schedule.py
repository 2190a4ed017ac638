import pytest

from evalkit.evaluate.engines.schedule import PREFILL_TOKENS_PER_SEQUENCE, groups, shared_prefix


def test_every_request_is_in_one_group_longest_first():
    lengths = [5, 300, 70, 1000, 70, 64, 999]
    found = groups(lengths, 4, 4096)
    order = [i for group in found for i in group.members]
    assert order == [3, 6, 1, 2, 4, 5, 0]
    assert all(lengths[i] <= group.width for group in found for i in group.members)


@pytest.mark.parametrize("sequences", [1, 4, 100, 256])
def test_a_group_is_bounded_and_widths_are_whole_blocks(sequences):
    for group in groups([1000 + i % 50 for i in range(300)], sequences, 4096):
        tokens = group.width * len(group.members)
        assert tokens <= PREFILL_TOKENS_PER_SEQUENCE * sequences or len(group.members) == 1
        assert len(group.members) <= sequences
        assert group.width % 64 == 0


def test_groups_of_one_round_leave_room_for_none_more():
    """Room that stays empty is computed all the same."""
    sizes = [len(group.members) for group in groups([1100] * 256, 256, 4096)]
    assert sum(sizes) == 256
    assert max(sizes) * (256 // max(sizes)) >= 250


def test_a_group_can_be_kept_to_a_part_of_the_sequences():
    assert [len(group.members) for group in groups([10] * 20, 8, 4096, parts=4)] == [2] * 10
    assert [len(group.members) for group in groups([10] * 3, 3, 4096, parts=4)] == [1] * 3


def test_no_width_is_beyond_what_the_model_holds():
    assert [group.width for group in groups([90, 100], 2, 100)] == [100]


def test_half_the_sequences_are_prefilled_by_half_as_many():
    """A control in other shapes must be in other shapes throughout."""
    whole, half = (groups([1088] * 256, n, 4096)[0] for n in (256, 128))
    assert len(half.members) < 0.6 * len(whole.members)


@pytest.mark.parametrize(
    ("prompts", "shared"),
    [
        ([[1] * 600 + [2], [1] * 600 + [3, 4]], 576),
        ([[1] * 256 + [2], [1] * 256 + [3]], 256),
        ([[1] * 255 + [2], [1] * 255 + [3]], 0),  # not worth it
        ([[1] * 320, [1] * 320 + [3]], 256),  # a token is left to each
        ([[1] * 600], 0),
        ([[2] + [1] * 600, [3] + [1] * 600, [2] + [1] * 600], 0),
    ],
)
def test_what_all_prompts_begin_with(prompts, shared):
    assert shared_prefix(prompts) == shared
