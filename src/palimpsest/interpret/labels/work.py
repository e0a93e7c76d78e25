"""Questions to a provider that may be slow, busy or dead: some at once, and none any more when it is of no use."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from palimpsest.interpret.labels.protocol import ProviderError
from palimpsest.log import log

MOST_FAILURES = 3
"""Questions in a row that may fail before a provider is left alone."""
PATIENCE = 0.5
"""Seconds between looks at the clock."""


class Trouble:
    """What went wrong with a provider so far.

    Args:
        budget: Seconds after which nothing more is asked; None for no limit.
    """

    def __init__(self, budget: float | int | None = None) -> None:
        self.stopped = False
        self.reason: str | None = None
        self._row, self._lock = 0, threading.Lock()
        self._ends = None if budget is None else time.monotonic() + budget

    def over(self) -> bool:
        """Whether nothing more is to be asked."""
        if not self.stopped and self._ends is not None and time.monotonic() > self._ends:
            self.stopped, self.reason = True, "The time of --budget is over."
        return self.stopped

    def again(self) -> Trouble:
        """For the next provider: the same time to the end, no failure yet."""
        fresh = Trouble()
        fresh._ends = self._ends
        return fresh

    def note(self, error: ProviderError | None) -> None:
        """Take in how a question ended; None for an answer."""
        with self._lock:
            self._row = 0 if error is None else self._row + 1
            if error is not None:
                self.reason = str(error)
                log.info("%s", error)
                self.stopped = self.stopped or error.fatal or self._row >= MOST_FAILURES


def answers(
    items: Sequence[int], task: Callable[[int], Any], trouble: Trouble, concurrency: int = 1
) -> Iterator[tuple[int, Any]]:
    """Put a question about each item; yields item and answer as they come, in this thread.

    Items whose question fails are left out, and so are all further ones once `trouble` says that it is over: what is
    still under way then is not waited for.

    Args:
        items: What is asked about.
        task: Asks; raises ProviderError where there is no answer.
        trouble: Counts the failures.
        concurrency: Questions at once.
    """
    if concurrency == 1 or len(items) < 2:
        yield from _one_by_one(items, task, trouble)
        return
    left: queue.SimpleQueue[int] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, Any, BaseException | None]] = queue.SimpleQueue()
    for item in items:
        left.put(item)
    stop = threading.Event()

    def work() -> None:
        while not (stop.is_set() or trouble.over()):
            try:
                item = left.get_nowait()
            except queue.Empty:
                return
            try:
                answer = task(item)
            except BaseException as error:
                if isinstance(error, ProviderError):
                    trouble.note(error)
                done.put((item, None, error))
            else:
                trouble.note(None)
                done.put((item, answer, None))

    # Daemons: an interrupted command must not wait for a server that does not answer.
    for _ in range(min(concurrency, len(items))):
        threading.Thread(target=work, daemon=True).start()
    try:
        waiting = len(items)
        while waiting:
            over = trouble.over()
            try:
                item, answer, error = done.get(block=not over, timeout=PATIENCE)
            except queue.Empty:
                if over:
                    return
                continue
            waiting -= 1
            if error is None:
                yield item, answer
            elif not isinstance(error, ProviderError):
                raise error
    finally:
        stop.set()


def _one_by_one(
    items: Sequence[int], task: Callable[[int], Any], trouble: Trouble
) -> Iterator[tuple[int, Any]]:
    for item in items:
        if trouble.over():
            return
        try:
            answer = task(item)
        except ProviderError as error:
            trouble.note(error)
            continue
        trouble.note(None)
        yield item, answer
