"""When a step is over, and when there were enough of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor


class Clock:
    """An iterator over batches, in order and from the start again, that takes the time at every pull.

    A contestant that pulls its next batch after a step is timed by its pulls; one that may pull ahead calls
    `mark` after every step instead. The clock stops the run: after `steps` timed steps, or, once there are
    `least` of them, after `seconds`.
    """

    def __init__(
        self,
        x: Tensor,
        batch: int,
        *,
        warm: int = 0,
        steps: int = 8,
        least: int = 2,
        seconds: float = 2.0,
        wait: Callable[[], None] = lambda: None,
        marked: bool = False,
    ) -> None:
        self.batches = x.split(batch)
        self.batch, self.warm, self.steps, self.least, self.seconds = batch, warm, steps, least, seconds
        self.wait, self.marked = wait, marked
        self.times: list[float] = []
        self.tokens: list[int] = []
        self.pulled = 0

    def mark(self, tokens: int | None = None) -> None:
        """A step is over, or several: `tokens` are those so far. Where pulls are the marks, also before the first."""
        self.wait()
        self.tokens.append(self.pulled * self.batch if tokens is None else tokens)
        self.times.append(time.perf_counter())

    @property
    def done(self) -> bool:
        timed = len(self.times) - 1 - self.warm
        if timed >= self.steps:
            return True
        return timed >= self.least and self.times[-1] - self.times[self.warm] >= self.seconds

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        if not self.marked:
            self.mark()
        if self.done:
            raise StopIteration
        self.pulled += 1
        return self.batches[(self.pulled - 1) % len(self.batches)]

    def rate(self) -> dict[str, Any]:
        """Tokens per second of the timed steps, and how many there were."""
        times, tokens = self.times[self.warm :], self.tokens[self.warm :]
        if len(times) < 2:
            raise RuntimeError(f"only {len(self.times)} steps were seen, {self.warm} of them for warming up")
        steps = [(b - a) / self.batch for a, b in zip(tokens, tokens[1:], strict=False)]
        spent = [b - a for a, b in zip(times, times[1:], strict=False)]
        return {
            "tokens_per_second": (tokens[-1] - tokens[0]) / (times[-1] - times[0]),
            "steps": sum(steps),
            "step_s": [s / n for s, n in zip(spent, steps, strict=True)],
        }
