"""The shuffle buffer: every row once, well mixed, resumed exactly."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palimpsest.buffer import ShuffleBuffer, buffer_capacity
from palimpsest.errors import ConfigError


def numbered(count, models=1, d_model=2):
    """Rows that hold their own number, and another in each place."""
    number = torch.arange(count, dtype=torch.float32)[:, None, None]
    return number + torch.arange(models * d_model).reshape(models, d_model) / 16


def cut(rows, sizes=(5,)):
    """A source over these rows in chunks of the given sizes, in turn; remembers where it was started."""

    def source(position):
        source.starts.append(position)
        sizes_from = itertools.cycle(sizes)

        def chunks():
            start = position
            while start < len(rows):
                size = next(sizes_from)
                yield rows[start : start + size]
                start += size

        return chunks()

    source.starts = []
    return source


def make(source, **changes):
    fields = {"capacity": 24, "batch_size": 4, "seed": 0}
    return ShuffleBuffer(source, **(fields | changes))


def numbers(batches):
    return [int(row[0, 0]) for batch in batches for row in batch]


@settings(max_examples=120, deadline=None)
@given(
    count=st.integers(1, 120),
    batch_size=st.integers(1, 17),
    extra=st.integers(0, 40),
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=4).filter(any),
    seed=st.integers(0, 3),
)
def test_every_row_is_served_once_and_only_the_last_batch_is_short(count, batch_size, extra, sizes, seed):
    rows = numbered(count, models=2)
    buffer = make(cut(rows, sizes), capacity=batch_size + extra, batch_size=batch_size, seed=seed)
    batches = list(buffer)
    served = torch.cat(batches)
    assert torch.equal(served[served[:, 0, 0].argsort()], rows)
    assert all(len(batch) == batch_size for batch in batches[:-1]) and 0 < len(batches[-1]) <= batch_size
    dropped = list(
        make(cut(rows, sizes), capacity=batch_size + extra, batch_size=batch_size, seed=seed, drop_last=True)
    )
    whole = [batch for batch in batches if len(batch) == batch_size]
    assert len(dropped) == len(whole)
    assert all(torch.equal(a, b) for a, b in zip(dropped, whole, strict=True))
    with pytest.raises(StopIteration):
        next(buffer)


def mean_distance(order):
    """Mean distance, in the order served, of rows that were neighbours in the source."""
    place = torch.empty(len(order))
    place[torch.tensor(order)] = torch.arange(len(order), dtype=torch.float32)
    return float(place.diff().abs().mean())


def correlation(order):
    """Of the order served with that of the source, inside stretches of one capacity."""
    return float(torch.corrcoef(torch.stack([torch.arange(600.0), torch.tensor(order[:600]).float()]))[0, 1])


def test_neighbours_are_served_far_apart():
    count, capacity = 6000, 600
    order = numbers(make(cut(numbered(count)), capacity=capacity, batch_size=20))
    # Two places drawn at random among n are n/3 apart on average.
    assert mean_distance(order) == pytest.approx(capacity / 3, rel=0.1)
    assert abs(correlation(order)) < 0.1
    # No batch is a stretch of the source: the rows of one spread over the whole buffer.
    spans = [max(batch) - min(batch) for batch in torch.tensor(order).split(20)]
    assert min(spans) > capacity / 2


def test_an_unshuffled_stream_is_told_from_a_mixed_one():
    order = list(range(6000))
    assert mean_distance(order) == 1 and correlation(order) > 0.99
    small = numbers(make(cut(numbered(6000)), capacity=20, batch_size=20))
    assert mean_distance(small) < 10  # a buffer of one batch mixes inside batches only


def test_the_order_depends_on_the_seed_but_not_on_the_chunks():
    rows = numbered(100)
    orders = {
        (seed, sizes): numbers(make(cut(rows, sizes), seed=seed))
        for seed in (0, 1)
        for sizes in ((1,), (7, 3), (100,), (24,))
    }
    assert len({tuple(order) for (seed, _), order in orders.items() if seed == 0}) == 1
    assert orders[0, (1,)] != orders[1, (1,)]


def saved(buffer):
    return {name: tensor.clone() for name, tensor in buffer.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [97, 96, 20, 3])
def test_a_state_from_between_any_two_batches_goes_on_bitwise(count, dtype):
    rows = torch.randn(count, 2, 3, generator=torch.Generator().manual_seed(1))
    whole, states = make(cut(rows), seed=5, dtype=dtype), []
    states.append(saved(whole))
    batches = []
    for batch in whole:
        batches.append(batch)
        states.append(saved(whole))
    assert sum(map(len, batches)) == count
    for step, state in enumerate(states):
        source = cut(rows, (9, 2))
        resumed = make(source, seed=77, dtype=dtype)  # the seed of the state counts
        if step % 2:
            next(resumed)  # a buffer that was in use takes over the state all the same
        resumed.load_state_dict(state)
        rest = list(resumed)
        assert len(rest) == len(batches) - step
        assert all(torch.equal(a, b) for a, b in zip(rest, batches[step:], strict=True))


def test_a_resumed_buffer_reads_no_row_again():
    buffer = make(cut(numbered(200)))
    for _ in range(5):
        next(buffer)
    state = saved(buffer)
    source = cut(numbered(200))
    resumed = make(source)
    resumed.load_state_dict(state)
    next(resumed)
    assert source.starts == [buffer.rows_read] == [24 + 4 * 4]


def test_the_state_of_one_buffer_is_not_shared_with_the_next():
    buffer = make(cut(numbered(200)))
    next(buffer)
    state = saved(buffer)
    resumed = make(cut(numbered(200)))
    resumed.load_state_dict(state)
    before = saved(resumed)
    list(resumed)
    assert all(torch.equal(state[name], before[name]) for name in state)


def test_bfloat16_and_two_models_are_kept_side_by_side():
    rows = torch.randn(90, 2, 5)
    order = numbers(make(cut(numbered(90)), seed=2))
    batches = list(make(cut(rows), seed=2, dtype=torch.bfloat16))
    assert {batch.dtype for batch in batches} == {torch.bfloat16}
    assert torch.equal(torch.cat(batches), rows[order].bfloat16())
    assert make(cut(rows), dtype=torch.bfloat16).state_dict()["rows"].dtype == torch.bfloat16


def test_a_step_moves_its_batch_and_allocates_nothing_as_large_as_the_buffer(monkeypatch):
    buffer = make(cut(numbered(5000), (50,)), capacity=2000, batch_size=10)
    next(buffer)
    held = buffer.state_dict()["rows"]
    before = held.clone()
    sizes = []
    randperm, cat = torch.randperm, torch.cat
    monkeypatch.setattr(torch, "randperm", lambda n, **k: sizes.append(n) or randperm(n, **k))
    monkeypatch.setattr(torch, "cat", lambda parts, *a: sizes.append(-1) or cat(parts, *a))
    for _ in range(5):
        next(buffer)
    assert buffer.state_dict()["rows"].data_ptr() == held.data_ptr()
    assert int((held != before).any(-1).any(-1).sum()) == 5 * 10
    assert sizes == []
    for _ in range(2000 // 10):
        next(buffer)
    assert sizes == [2000]


def test_an_error_of_the_source_loses_no_row():
    rows = numbered(100)
    whole = numbers(make(cut(rows)))
    failures = [KeyboardInterrupt(), OSError("the disk is gone")]

    def source(position):
        for start in range(position, 100, 5):
            if start > 60 and failures:
                raise failures.pop()
            yield rows[start : start + 5]

    buffer, served = make(source), []
    with pytest.raises(OSError, match="the disk is gone"):
        served.extend(iter(buffer))
    resumed = make(cut(rows))
    resumed.load_state_dict(saved(buffer))
    assert len(served) > 0 and numbers(served) + numbers(resumed) == whole
    with pytest.raises(KeyboardInterrupt):
        next(buffer)
    assert numbers(served) + numbers(buffer) == whole


def test_capacity_is_whole_batches_and_the_suggestion_fits():
    assert make(cut(numbered(9)), capacity=27).capacity == 24
    assert buffer_capacity(4096, 1, 256) == 64 * 4096
    assert buffer_capacity(4096, 2, 2304) == 14 * 4096  # a batch has 75 MB
    assert buffer_capacity(4096, 2, 2304) * 2 * 2304 * 4 <= 2**30
    assert buffer_capacity(4096, 2, 2304, torch.bfloat16) == 28 * 4096
    assert buffer_capacity(4096, 2, 10**6) == 2 * 4096


@pytest.mark.parametrize(("capacity", "batch_size"), [(3, 4), (0, 0), (8, 0), (0, 1)])
def test_a_buffer_smaller_than_a_batch_is_refused(capacity, batch_size):
    with pytest.raises(ConfigError, match="smaller than a batch"):
        make(cut(numbered(9)), capacity=capacity, batch_size=batch_size)


@pytest.mark.parametrize("rows", [torch.empty(0, 1, 2), torch.empty(0, 7, 7)])
def test_an_empty_source_is_refused(rows):
    for source in (lambda _: iter([rows, rows]), lambda _: iter([])):
        with pytest.raises(ConfigError, match="source of activations is empty"):
            next(make(source))


@pytest.mark.parametrize(
    ("second", "found"),
    [
        (numbered(9, d_model=3), r"\(9, 1, 3\)"),
        (numbered(9, models=2), r"\(9, 2, 2\)"),
        (numbered(9)[:, 0], "2"),
    ],
)
def test_another_width_in_mid_stream_is_refused(second, found):
    with pytest.raises(ConfigError, match=rf"shape of those before.*\(tokens, 1, 2\).*{found}"):
        list(make(lambda _: iter([numbered(9), second])))
    with pytest.raises(ConfigError, match="tokens, models, d_model"):
        next(make(lambda _: iter([torch.zeros(4, 2)])))


@pytest.mark.parametrize("change", [{"capacity": 28}, {"batch_size": 6}, {"dtype": torch.bfloat16}])
def test_a_state_of_another_buffer_is_refused(change):
    buffer = make(cut(numbered(90)))
    next(buffer)
    with pytest.raises(ConfigError, match="another shuffle buffer"):
        make(cut(numbered(90)), **change).load_state_dict(saved(buffer))


def test_a_state_of_other_rows_or_of_nothing_is_refused():
    buffer, other = make(cut(numbered(90))), make(cut(numbered(90, models=2)))
    next(buffer)
    next(other)
    with pytest.raises(ConfigError, match=r"row.*\(1, 2\).*\(2, 2\)"):
        buffer.load_state_dict(saved(other))
    with pytest.raises(ConfigError, match="no state of a shuffle buffer.*order"):
        buffer.load_state_dict({"rows": torch.zeros(24, 1, 2)})
    assert len(numbers(buffer)) == 86
