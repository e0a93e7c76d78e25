"""A store as an endless stream of rows: complete, another order each epoch, exact from any position."""

import itertools
import os
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import palimpsest.store.reader as reader
from palimpsest.buffer import ShuffleBuffer, prefetch
from palimpsest.errors import ArtifactError, ConfigError, SiteError
from palimpsest.store import ActivationStore
from store_fixture import CALLS, D_MODEL, SITES, joined, write

BLOCK_ROWS = 5


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(reader, "BLOCK_BYTES", BLOCK_ROWS * 2 * D_MODEL * 4)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("stream") / "s"
    write(path, CALLS)
    return ActivationStore(path)


@pytest.fixture
def damaged(tmp_path):
    write(tmp_path / "s", CALLS)
    return ActivationStore(tmp_path / "s")


def rows(store, *arguments, count=None, **keywords):
    """The first `count` rows of an endless stream, or one epoch."""
    chunks = store.stream(SITES[0], *arguments, **({"epochs": 1} if count is None else {}) | keywords)
    found, total = [], 0
    for chunk in chunks:
        found.append(chunk)
        total += len(chunk)
        if count is not None and total >= count:
            break
    chunks.close()
    joined_rows = torch.cat(found) if found else torch.empty(0, 2, D_MODEL)
    return joined_rows if count is None else joined_rows[:count]


def row_numbers(found):
    """Which row of the store each one is."""
    place = {tuple(row.tolist()): i for i, row in enumerate(joined(CALLS, SITES[0])[0][:, 0])}
    return [place[tuple(row.tolist())] for row in found[:, 0]]


def test_without_a_seed_the_rows_come_as_they_were_written(store):
    acts = joined(CALLS, SITES[0])[0]
    assert torch.equal(rows(store), acts)
    assert torch.equal(rows(store, epochs=2), torch.cat([acts, acts]))


def test_a_seed_mixes_shards_and_blocks_and_loses_no_row(store):
    total = store.rows
    assert len(store.shards) >= 4
    epochs = [row_numbers(part) for part in rows(store, count=3 * total, seed=4).split(total)]
    assert all(sorted(epoch) == list(range(total)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, list(range(total))]}) == 4
    assert row_numbers(rows(store, seed=4)) == epochs[0] != row_numbers(rows(store, seed=5))
    # Rows of a block stay together, blocks do not stay in order.
    follows = [b == a + 1 for a, b in itertools.pairwise(epochs[0])]
    assert 0.5 < sum(follows) / len(follows) < (BLOCK_ROWS - 0.5) / BLOCK_ROWS


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 400), st.one_of(st.none(), st.integers(0, 3)))
def test_a_position_goes_on_exactly_there(store, position, seed):
    whole = rows(store, count=position + 150, seed=seed)
    assert torch.equal(rows(store, position, count=150, seed=seed), whole[position:])


def test_a_position_behind_the_last_epoch_gives_nothing(store):
    assert len(rows(store, store.rows)) == 0
    assert len(rows(store, store.rows - 1)) == 1


def test_shards_before_the_position_are_not_read(damaged, monkeypatch):
    opened = []
    inner = damaged.open_shard
    monkeypatch.setattr(damaged, "open_shard", lambda shard: opened.append(shard) or inner(shard))
    rows(damaged, damaged.shards[0]["rows"] + damaged.shards[1]["rows"] + 1, count=1)
    assert opened == [2]


def test_through_a_buffer_every_row_is_served_once_and_resumes(store):
    def source(position):
        return prefetch(store.stream(SITES[0], position, seed=1, epochs=2))

    def make():
        return ShuffleBuffer(source, capacity=30, batch_size=10, seed=3)

    whole = list(make())
    served = row_numbers(torch.cat(whole))
    assert sorted(served) == sorted([*range(store.rows)] * 2)
    first = make()
    for _ in range(7):
        next(first)
    state = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    first.close()
    second = make()
    second.load_state_dict(state)
    rest = list(second)
    assert len(rest) == len(whole) - 7
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[7:], strict=True))


def test_no_thread_outlives_a_stream(store):
    before = threading.active_count()
    stream = store.stream(SITES[0])
    next(stream)
    stream.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("seed", [None, 0])
def test_a_damaged_shard_is_named_when_its_turn_comes(damaged, seed):
    path = damaged.path / "shard-00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"shard-00002\.safetensors is damaged.*hash"):
        rows(damaged, seed=seed)
    stream, good = damaged.stream(SITES[0]), []
    with pytest.raises(ArtifactError):
        good.extend(iter(stream))
    assert sum(map(len, good)) == sum(shard["rows"] for shard in damaged.shards[:2])


def test_a_shard_that_is_cut_while_it_is_read_is_an_error_and_no_crash(damaged):
    stream = damaged.stream(SITES[0])
    next(stream)
    path = damaged.path / "shard-00000.safetensors"
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(ArtifactError, match=r"shard-00000\.safetensors is damaged.*ends inside"):
        for _ in range(20):
            next(stream)


def test_an_unknown_site_a_position_below_zero_and_an_empty_store_are_refused(store, tmp_path):
    with pytest.raises(SiteError, match=r"resid_post\.9"):
        store.stream("resid_post.9")
    with pytest.raises(ConfigError, match="starts at a row"):
        store.stream(SITES[0], -1)
    write(tmp_path / "none", [], finish=False)
    with pytest.raises(ArtifactError, match="is empty"):
        ActivationStore(tmp_path / "none", allow_running=True).stream(SITES[0])
