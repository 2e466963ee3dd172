"""Texts as batches: which go together, and how they are padded."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from r2m_async.models.batches import by_length, right_padded


@given(st.lists(st.integers(1, 30), max_size=40), st.integers(1, 60), st.data())
def test_every_item_is_in_one_batch_none_is_too_large_and_lengths_rise(lengths, max_tokens, data):
    indices = data.draw(st.none() | st.lists(st.sampled_from(range(len(lengths))), unique=True)) if lengths else None
    batches = by_length(lengths, max_tokens, indices)
    assert sorted(index for batch in batches for index in batch) == sorted(
        range(len(lengths)) if indices is None else indices
    )
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= max_tokens
    in_order = [lengths[index] for batch in batches for index in batch]
    assert in_order == sorted(in_order)
    for before, after in zip(batches, batches[1:], strict=False):
        assert (len(before) + 1) * lengths[after[0]] > max_tokens, "a batch was closed too early"


def test_rows_are_padded_on_the_right_and_the_mask_says_where():
    ids, mask = right_padded([[5, 6, 7], [8], [0, 9]], padding=0)
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0], [0, 9, 0]] and ids.dtype == torch.int64
    assert mask.tolist() == [[True] * 3, [True, False, False], [True, True, False]]
