"""Reading ahead in a thread."""

import threading
import weakref
from collections.abc import Iterable, Iterator
from queue import Empty, Full, Queue
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from palimpsest.errors import ConfigError

Item = TypeVar("Item")

_WAIT = 0.1
"""Seconds between two looks at whether the other thread still lives."""

_JOIN = 5.0
"""Seconds that closing waits for a source that is in the middle of a read."""


def prefetch(
    iterator: Iterable[Item], depth: int = 2, *, device: str | torch.device | None = None
) -> "Prefetched[Item]":
    """Read ahead in a thread, so that reading overlaps with what is done with the items.

    It belongs below a `ShuffleBuffer`, whose state counts rows taken, not rows read ahead. It pays for sources that
    wait (a store's disk, a network) and for a GPU; on a CPU, two threads that both run torch fight over its
    cores, so a model's activations are not prefetched there.

    Args:
        iterator: What is read; closed, if it can be, by the thread.
        depth: Items held at most, beside the one being read.
        device: A CUDA device: tensors are staged in pinned memory and copied on a stream of their own.

    Raises:
        ConfigError: The depth is below 1. Errors of the source are raised by `next`, with their traceback.
    """
    if depth < 1:
        raise ConfigError("Reading ahead needs room for an item", expected="depth 1 or more", found=depth)
    return Prefetched(iter(iterator), depth, None if device is None else torch.device(device))


class Prefetched(Generic[Item]):
    """An iterator that a thread keeps filled; see `prefetch`. Closed by `close`, when dropped, and at exit."""

    def __init__(self, iterator: Iterator[Item], depth: int, device: torch.device | None) -> None:
        self._queue: Queue[Any] = Queue(depth)
        self._done = False
        stop = threading.Event()
        # The thread holds no reference to this object, or dropping it would never end the thread.
        self._thread = threading.Thread(
            target=_read_ahead,
            args=(iterator, self._queue, stop, device),
            name="palimpsest-prefetch",
            daemon=True,
        )
        self._finalizer = weakref.finalize(self, _stop, self._thread, self._queue, stop)
        self._thread.start()

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        if self._done:
            raise StopIteration
        kind, value, ready = self._get()
        if kind == "item":
            if ready is not None:
                stream = torch.cuda.current_stream(value.device)
                stream.wait_event(ready)
                value.record_stream(stream)
            return value
        self.close()
        if kind == "error":
            raise value
        raise StopIteration

    def close(self) -> None:
        """Stop the thread and drop what it read ahead; `next` then ends the iteration."""
        self._done = True
        self._finalizer()

    def _get(self) -> tuple[str, Any, Any]:
        while True:
            try:
                return self._queue.get(timeout=_WAIT)
            except Empty:
                # After a fork the thread exists in the parent only.
                if not self._thread.is_alive() and self._queue.empty():
                    raise RuntimeError("the thread that reads ahead is gone") from None


def _read_ahead(
    iterator: Iterator[Any], queue: Queue[Any], stop: threading.Event, device: torch.device | None
) -> None:
    copies = None if device is None else torch.cuda.Stream(device)
    try:
        last: tuple[str, Any, Any] = ("end", None, None)
        try:
            for item in iterator:
                staged = ("item", item, None) if copies is None else _staged(item, copies)
                if not _put(queue, staged, stop):
                    return
                del item, staged
        except BaseException as error:
            last = ("error", error, None)
        _put(queue, last, stop)
    finally:
        if (close := getattr(iterator, "close", None)) is not None:
            close()


def _staged(item: Any, copies: "torch.cuda.Stream") -> tuple[str, Any, Any]:
    if not isinstance(item, Tensor) or item.device.type != "cpu":
        return "item", item, None
    with torch.cuda.stream(copies):
        moved = item.pin_memory().to(copies.device, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record(copies)
    return "item", moved, ready


def _put(queue: Queue[Any], entry: tuple[str, Any, Any], stop: threading.Event) -> bool:
    while not stop.is_set():
        try:
            queue.put(entry, timeout=_WAIT)
        except Full:
            continue
        return not stop.is_set()
    return False


def _stop(thread: threading.Thread, queue: Queue[Any], stop: threading.Event) -> None:
    stop.set()
    while True:
        try:
            queue.get_nowait()
        except Empty:
            break
    if thread is not threading.current_thread() and thread.is_alive():
        thread.join(_JOIN)
