"""One logger and one progress display; both stay out of the way when nobody watches a terminal."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress, Task
    from rich.text import Text

log = logging.getLogger("palimpsest")
log.addHandler(logging.NullHandler())

_state: dict[str, bool] = {"quiet": False}
_showing: list[Progress] = []


@cache
def console() -> Console:
    """Return the one rich console, which writes to stderr so that stdout stays free for results."""
    from rich.console import Console

    return Console(stderr=True)


def quiet(on: bool = True) -> None:
    """Turn progress displays off (or on again) for this process."""
    _state["quiet"] = on


def setup(verbosity: int = 0) -> None:
    """Send the log to stderr; the library itself never does this, the command line does.

    Args:
        verbosity: -1 errors only (and no progress), 0 warnings, 1 what is being done, 2 everything.
    """
    from rich.highlighter import NullHighlighter
    from rich.logging import RichHandler

    for handler in [h for h in log.handlers if isinstance(h, RichHandler)]:
        log.removeHandler(handler)
    handler = RichHandler(
        console=console(),
        show_time=verbosity >= 2,
        show_path=verbosity >= 2,
        markup=False,
        highlighter=NullHighlighter(),
    )
    handler.setFormatter(_InertFormatter("%(message)s"))
    log.addHandler(handler)
    levels = {-1: logging.ERROR, 0: logging.WARNING, 1: logging.INFO, 2: logging.DEBUG}
    log.setLevel(levels[max(-1, min(2, verbosity))])
    if verbosity < 0:
        quiet(True)


@contextmanager
def progress(
    description: str,
    total: float | None = None,
    unit: str = "tokens",
    above: Callable[[], RenderableType] | None = None,
) -> Iterator[Callable[..., None]]:
    """Show one line with the count, the rate and the time left while the block runs.

    Nothing is shown when stderr is no terminal, after `quiet(True)`, or when PALIMPSEST_QUIET is set.

    Args:
        description: What is being done, in a few words.
        total: How many units there will be; None when that is not known.
        unit: What is counted.
        above: Gives something to be shown above the line, such as a table; asked each time the line is drawn, and
            only where the line is the outermost.

    Yields:
        `advance(n=1, note="")`, to be called as units are done; a note replaces the last one at the end of the line.
    """
    if not _watched():
        yield _advance_nothing
        return
    # Rich draws one live display per console: an inner progress becomes a further line of the outer one.
    display = _showing[-1] if _showing else _display(above)
    owner = not _showing
    if owner:
        display.start()
        _showing.append(display)
    task = display.add_task(description, total=total, unit=unit, note="")

    def advance(n: float = 1, note: str = "") -> None:
        display.update(task, advance=n)
        if note:
            display.update(task, note=note)

    try:
        yield advance
    finally:
        if owner:
            _showing.remove(display)
            display.stop()
        else:
            display.remove_task(task)


def _watched() -> bool:
    silenced = _state["quiet"] or os.environ.get("PALIMPSEST_QUIET", "0") not in ("", "0")
    return not silenced and console().is_terminal


def _advance_nothing(n: float = 1, note: str = "") -> None:
    del n, note


def _display(above: Callable[[], RenderableType] | None) -> Progress:
    from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            from rich.text import Text

            speed = f"{_short(task.speed)}/s" if task.speed else "-/s"
            total = f"/{_short(task.total)}" if task.total is not None else ""
            return Text(f"{_short(task.completed)}{total} {task.fields['unit']}, {speed}")

    class Below(Progress):
        def get_renderables(self) -> Iterator[RenderableType]:
            if above is not None:
                yield above()
            yield from super().get_renderables()

    return Below(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        Rate(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}", markup=False),
        console=console(),
        transient=True,
    )


def _short(count: float) -> str:
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.1f}{suffix}"
    return f"{count:.0f}"


class _InertFormatter(logging.Formatter):
    """Corpus text can carry terminal escape codes; they are shown, not obeyed."""

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).replace("\x1b", "\\x1b")
