"""Reading ahead in a thread: the same items, errors in their place, and a thread that always ends."""

import gc
import signal
import threading
import time
import traceback

import pytest
import torch

from helpers import python_source
from palimpsest.buffer import ShuffleBuffer, prefetch
from palimpsest.errors import ConfigError


class Closing:
    """An iterator that says when it was closed."""

    def __init__(self, count, *, error=None, wait=0.0):
        self.left, self.error, self.wait, self.taken = count, error, wait, 0
        self.closed = threading.Event()

    def __iter__(self):
        return self

    def __next__(self):
        time.sleep(self.wait)
        if self.taken == self.left:
            if self.error is not None:
                raise self.error
            raise StopIteration
        self.taken += 1
        return torch.full((2,), self.taken)

    def close(self):
        self.closed.set()


def ended(count):
    """Whether the number of threads falls back to what it was."""
    for _ in range(100):
        if threading.active_count() == count:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("depth", [1, 2, 50])
def test_prefetching_gives_the_same_items_and_ends_its_thread(depth):
    before, source = threading.active_count(), Closing(30)
    assert [int(item[0]) for item in prefetch(source, depth)] == list(range(1, 31))
    assert source.closed.is_set() and ended(before)


def test_prefetching_reads_no_further_than_its_depth():
    source = Closing(100)
    ahead = prefetch(source, depth=3)
    next(ahead)
    time.sleep(0.3)
    assert source.taken <= 1 + 3 + 1  # served, in the queue, in the thread's hand
    ahead.close()
    assert source.taken <= 6 and source.closed.is_set()
    with pytest.raises(StopIteration):
        next(ahead)


def test_an_error_behind_a_prefetch_comes_up_in_its_place_with_its_traceback():
    def source():
        yield 1
        yield 2
        raise ValueError("deep below")

    before, ahead = threading.active_count(), prefetch(source(), depth=5)
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(ValueError, match="deep below") as caught:
        next(ahead)
    assert "in source" in "".join(traceback.format_tb(caught.value.__traceback__))
    assert ended(before)
    with pytest.raises(StopIteration):
        next(ahead)


def test_a_dropped_prefetch_ends_its_thread():
    before, source = threading.active_count(), Closing(1000)
    ahead = prefetch(source)
    next(ahead)
    del ahead
    gc.collect()
    assert source.closed.is_set() and ended(before)


def test_closing_a_buffer_closes_what_it_reads():
    source = Closing(1000)
    chunks = (item.float()[:, None, None] for item in source)
    buffer = ShuffleBuffer(lambda _: prefetch(chunks), capacity=8, batch_size=4, seed=0)
    next(buffer)
    before = threading.active_count()
    buffer.close()
    assert ended(before - 1)


def test_a_depth_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="depth 1 or more"):
        prefetch([1], depth=0)


@pytest.mark.parametrize(
    ("end", "status"), [("pass", 0), ("raise KeyboardInterrupt", -signal.SIGINT), ("raise ValueError", 1)]
)
def test_the_interpreter_ends_with_a_prefetch_still_open(end, status):
    code = (
        "import itertools\nfrom palimpsest.buffer import prefetch\n"
        f"ahead = prefetch(itertools.count())\nassert next(ahead) == 0\nprint('read', flush=True)\n{end}"
    )
    done = python_source(code)
    assert (done.stdout, done.returncode) == ("read\n", status)
    assert "Fatal" not in done.stderr and done.stderr.count("Traceback") == (status != 0)
