"""The operands that FlashMLA's kernels are given."""

import torch

from evalkit.attention.backends import flashmla


def test_a_query_whose_parts_lie_side_by_side_is_taken_without_a_copy():
    query = torch.randn(6, 8, 576)
    latent, rope = query.split([512, 64], -1)
    for part in (slice(0, 6), slice(2, 5)):
        whole = flashmla._whole(latent[part], rope[part])
        assert whole.data_ptr() == query[part].data_ptr()
        assert whole.equal(query[part])
        assert whole.is_contiguous()


def test_parts_that_are_no_views_of_one_query_are_copied():
    query = torch.randn(6, 8, 576)
    latent, rope = query.split([512, 64], -1)
    apart = [
        (latent.clone(), rope.clone()),
        (latent, rope.clone()),
        (latent, query[..., 448:512]),  # of the same query, elsewhere in it
        (latent[::2], rope[::2]),
        (latent[:, :4], rope[:, :4]),
        (latent[:5], rope[1:]),
    ]
    for pair in apart:
        assert flashmla._whole(*pair) is None
        assert flashmla._query(*pair, len(pair[0]), pair[0].shape[1]).equal(torch.cat(pair, -1))
