"""The strongest latents while training, as a table for a terminal."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from math import isfinite
from typing import Any, NamedTuple

BARS = "▁▂▃▄▅▆▇█"
HISTORY = 24
"""Values that a sparkline shows."""

SHOWN = 12
"""Latents in the table."""


class Mover(NamedTuple):
    """One latent in an entry of the log."""

    site: str
    latent: int
    value: float
    gradient: float | None
    firings: int | None


class MoverTable:
    """Keeps the last values of the strongest latents and draws them."""

    def __init__(self) -> None:
        self._history: dict[tuple[str, int], deque[float]] = {}
        self._movers: list[Mover] = []
        self._step = 0

    def update(self, step: int, movers: Sequence[Mover]) -> None:
        """Take an entry, strongest first; latents that left the table are forgotten."""
        self._step, self._movers = step, list(movers[:SHOWN])
        before, self._history = self._history, {}
        for mover in self._movers:
            values = before.get((mover.site, mover.latent), deque(maxlen=HISTORY))
            values.append(mover.value)
            self._history[mover.site, mover.latent] = values

    def render(self) -> Any:
        """The table as something that rich shows."""
        from rich.table import Table

        table = Table(title=f"latents that moved most, step {self._step}", title_justify="left", box=None)
        for name in ("latent", "site", "value", "gradient", "firings", "last values"):
            left = name in ("site", "last values")
            table.add_column(name, justify="left" if left else "right", no_wrap=True)
        for mover in self._movers:
            table.add_row(
                str(mover.latent),
                mover.site,
                f"{mover.value:+.4f}",
                "-" if mover.gradient is None else f"{mover.gradient:+.1e}",
                "-" if mover.firings is None else f"{mover.firings:,}",
                sparkline(list(self._history[mover.site, mover.latent])),
            )
        return table


def sparkline(values: Sequence[float]) -> str:
    """Values as bars between their lowest and highest, 0 included; a value that is none is an x."""
    known = [value for value in values if isfinite(value)]
    low, high = min(0.0, *known, 0.0), max(0.0, *known, 0.0)
    step = (high - low) / len(BARS) or 1.0
    return "".join(
        BARS[min(len(BARS) - 1, int((value - low) / step))] if isfinite(value) else "x" for value in values
    )
