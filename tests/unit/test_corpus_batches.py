"""Bucketed and packed batches against brute force."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palimpsest.corpus import Role, TokenBatch
from palimpsest.corpus.batches import Masking, bucketed, packed
from palimpsest.corpus.tokenize import Document

documents_strategy = st.lists(
    st.lists(st.tuples(st.integers(3, 99), st.integers(0, 5), st.booleans()), min_size=1, max_size=30),
    max_size=25,
)


def build(rows: list) -> list[Document]:
    columns = [np.array(row) for row in rows]
    return [
        Document(i, c[:, 0].astype(np.int32), c[:, 1].astype(np.uint8), c[:, 2].astype(bool))
        for i, c in enumerate(columns)
    ]


def contents(batches: list[TokenBatch]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for batch in batches:
        for row in range(len(batch.input_ids)):
            for place in batch.attention_mask[row].nonzero().flatten().tolist():
                index = int(batch.document[row, place])
                found.setdefault(index, []).append(int(batch.input_ids[row, place]))
    return found


@settings(max_examples=60, deadline=None)
@given(documents_strategy, st.integers(1, 80), st.integers(1, 9))
def test_bucketed_batches_hold_every_token_once(rows, budget, window):
    documents = build(rows)
    batches = list(bucketed(documents, Masking(2), budget, window))
    assert contents(batches) == {d.index: d.token_ids.tolist() for d in documents}
    for batch in batches:
        assert batch.input_ids.numel() <= budget or len(batch.input_ids) == 1
        assert batch.input_ids.dtype == torch.int64
        padding = ~batch.attention_mask
        assert (batch.input_ids[padding] == 2).all()
        assert (batch.document[padding] == -1).all()
        assert not (batch.attention_mask[:, 1:] & padding[:, :-1]).any()  # padding is on the right


@settings(max_examples=60, deadline=None)
@given(
    documents_strategy,
    st.one_of(st.none(), st.sets(st.sampled_from(list(Role)), min_size=1)),
    st.booleans(),
)
def test_keep_matches_brute_force(rows, roles, everything):
    masking = Masking(2, None if roles is None else tuple(roles), everything)
    documents = build(rows)
    for batch in bucketed(documents, masking, 64, 4):
        for row, place in np.ndindex(*batch.keep.shape):
            index = int(batch.document[row, place])
            if index < 0:
                expected = False
            else:
                role, special = Role(documents[index].roles[place]), documents[index].special[place]
                chosen = role != Role.TEMPLATE if roles is None else role in roles
                expected = everything or (chosen and not special)
                assert int(batch.role[row, place]) == role
            assert bool(batch.keep[row, place]) == expected


@settings(max_examples=60, deadline=None)
@given(documents_strategy, st.integers(2, 12), st.integers(1, 3), st.integers(1, 2), st.booleans())
def test_packed_blocks_hold_every_token_once_and_begin_with_bos(rows, length, batch_size, epochs, bos):
    documents = build(rows)
    bos_id = 0 if bos else None
    batches = list(
        packed(lambda: documents, Masking(2), length, batch_size=batch_size, epochs=epochs, bos_id=bos_id)
    )
    found = contents(batches)
    if bos:
        assert all((batch.input_ids[:, 0] == 0).all() and not batch.keep[:, 0].any() for batch in batches)
        found = {index: [one for one in ids if one != 0] for index, ids in found.items()}
    assert found == {d.index: d.token_ids.tolist() * epochs for d in documents}
    assert all(batch.attention_mask.all() for batch in batches[:-1])
    assert all(len(batch.input_ids) == batch_size for batch in batches[:-1])
