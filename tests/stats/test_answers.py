import pytest

from evalkit.stats.answers import first_difference, is_degenerate


@pytest.mark.parametrize(
    ("ids", "is_one"),
    [
        ([*range(24), *[7] * 12], True),  # one token, over and over
        ([*range(24), *[1, 2, 3, 4] * 3], True),  # four tokens, three times: the least
        ([*range(24), *[1, 2, 3, 4, 5, 6] * 2], False),  # only twice
        ([*range(24), *[1, 2, 3] * 3, 1, 2, 9], False),  # it ends in something else
        ([*range(22), *[7] * 11], False),  # a last third of 11 tokens may be the answer
        ([*range(25), *[7] * 12], False),  # the last third is 13 tokens, of which one precedes the cycle
        ([5] * 36, True),
        ([*range(36)], False),
        ([], False),
        ([*range(200), *[1, 2] * 60, 1], True),  # a cycle may be cut off in its middle
    ],
)
def test_a_degenerate_answer_ends_in_a_cycle_over_its_last_third(ids: list[int], is_one: bool):
    assert is_degenerate(ids) is is_one


@pytest.mark.parametrize(
    ("before", "after", "place"),
    [
        ([1, 2, 3], [1, 2, 3], None),
        ([1, 2, 3], [9, 2, 3], 0),
        ([1, 2, 3], [1, 2, 4], 2),
        ([1, 2, 3], [1, 2], 2),
        ([1, 2], [1, 2, 3], 2),
        ([], [], None),
        ([1, 2, 3, 4], [1, 9, 3, 4], 1),
    ],
)
def test_two_answers_part_at_the_first_token_that_differs(
    before: list[int], after: list[int], place: int | None
):
    assert first_difference(before, after) == place
