"""Models, loaded on first use and asked by one job at a time, so that a browser never waits in silence."""

from __future__ import annotations

import itertools
import queue
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from palimpsest.errors import PalimpsestError
from palimpsest.log import log
from palimpsest.web.config import ServeConfig
from palimpsest.web.refusals import BusyError, NoPageError

MOST_WAITING = 6
PATIENCE = 10.0
"""Seconds that the end of the app waits for the worker, which is at most one token or one file behind."""
KEPT = 12
"""Jobs whose answers can be looked at again; that of a long text takes several megabytes."""

State = Literal["waiting", "loading", "running", "done", "failed", "cancelled"]
OVER: tuple[State, ...] = ("done", "failed", "cancelled")


@dataclass(frozen=True)
class Place:
    """Which dictionary and models a job wants: those of an examples run, or those named on the command line.

    Attributes:
        id: Of the examples run; empty for those of the command line.
        name: What a reader calls it.
        folder: The examples run; None for those of the command line.
    """

    id: str
    name: str
    folder: Path | None = None


@runtime_checkable
class Tools(Protocol):
    """What a job may do with loaded models."""

    sides: Sequence[str]

    def read(self, text: str, top: int, latents: Sequence[int]) -> Mapping[str, Any]:
        """The fields of a `TextReading`: the strongest latents of every token; those asked for under `followed`."""
        ...

    def write(
        self,
        prompt: str,
        side: str,
        changes: Sequence[str],
        on_token: Callable[[str], object],
        **decoding: Any,
    ) -> str:
        """What a model writes after a prompt while latents are changed."""
        ...


Opener = Callable[[Place], Tools]


class CancelledError(Exception):
    """The reader wants no answer any more."""


@dataclass(eq=False)
class Job:
    """One piece of work and how far it is.

    Attributes:
        id: Stands in addresses.
        kind: Which page shows it.
        place: Which models it wants.
        asked: What was asked, to be shown again.
        state: How far it is.
        note: What is being done, in a few words.
        texts: What has been written, by the name of who writes.
        result: When it is done.
        error: Why it failed.
    """

    id: str
    kind: str
    place: Place
    asked: Mapping[str, Any]
    state: State = "waiting"
    note: str = ""
    texts: dict[str, str] = field(default_factory=dict)
    result: Any = None
    error: str = ""
    started: float = 0.0
    seconds: float = 0.0
    stop: threading.Event = field(default_factory=threading.Event, repr=False)

    @property
    def over(self) -> bool:
        """Whether nothing more will happen."""
        return self.state in OVER

    def check(self) -> None:
        """Go on only if someone still waits.

        Raises:
            CancelledError: Nobody does.
        """
        if self.stop.is_set():
            raise CancelledError


Work = Callable[[Job, Tools], Any]


class Bench:
    """A queue with one worker; the models of one place are in memory at a time.

    Args:
        opener: Loads models; takes long.
    """

    def __init__(self, opener: Opener) -> None:
        self._opener = opener
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._queue: queue.Queue[tuple[Job, Work] | None] = queue.Queue()
        self._lock = threading.Lock()
        self._worker: threading.Thread | None = None
        self._closed = False
        self._open: tuple[str, Tools] | None = None
        self._names = (f"{n}-{secrets.token_urlsafe(6)}" for n in itertools.count(1))

    def submit(self, kind: str, place: Place, asked: Mapping[str, Any], work: Work) -> Job:
        """Put a job at the end of the queue.

        Raises:
            BusyError: Too many wait already.
        """
        with self._lock:
            if self._closed:
                raise BusyError("The app is ending")
            waiting = sum(not job.over for job in self._jobs.values())
            if waiting >= MOST_WAITING:
                raise BusyError(
                    "The models are busy", found=f"{waiting} jobs wait", fix="Wait for them, or cancel them"
                )
            job = Job(next(self._names), kind, place, asked)
            self._jobs[job.id] = job
            over = [one.id for one in self._jobs.values() if one.over]
            for old in over[: max(0, len(self._jobs) - KEPT)]:
                del self._jobs[old]
            if self._worker is None:
                self._worker = threading.Thread(target=self._run, name="palimpsest-bench", daemon=True)
                self._worker.start()
        self._queue.put((job, work))
        return job

    def job(self, id: str) -> Job:
        """A job by its id.

        Raises:
            NoPageError: There is none, or it was long ago.
        """
        with self._lock:
            if id in self._jobs:
                return self._jobs[id]
        raise NoPageError(f"The last {KEPT} answers are kept, and this is none of them", fix="Ask again")

    def before(self, job: Job) -> int:
        """How many jobs are done before this one begins."""
        with self._lock:
            unfinished = [one for one in self._jobs.values() if not one.over]
        return unfinished.index(job) if job in unfinished else 0

    def cancel(self, job: Job) -> None:
        """Stop a job before its next token; one that waits is over at once, and its place in the queue is free."""
        with self._lock:
            job.stop.set()
            if job.state == "waiting":
                job.state = "cancelled"

    def loaded(self) -> str | None:
        """The id of the place whose models are in memory; None where there are none."""
        return None if self._open is None else self._open[0]

    def close(self) -> None:
        """Stop every job, and wait a moment for the worker: torch aborts when Python ends around its thread."""
        with self._lock:
            for job in self._jobs.values():
                job.stop.set()
            worker, self._closed = self._worker, True
        self._queue.put(None)
        if worker is not None:
            worker.join(PATIENCE)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            self._do(*item)
            # Nothing of a job stays here: it would keep its models in memory while others are loaded.
            del item

    def _do(self, job: Job, work: Work) -> None:
        job.started = time.monotonic()
        try:
            with self._lock:
                job.check()
                job.state = "loading"
            tools = self._tools(job)
            job.check()
            job.state, job.note = "running", ""
            job.result = work(job, tools)
            job.state = "done"
        except CancelledError:
            job.state = "cancelled"
        except PalimpsestError as error:
            job.error, job.state = str(error), "failed"
        except BaseException as error:
            # Libraries written in Rust panic with what is no Exception; without its thread no job would ever end.
            log.exception("A job of the app failed")
            job.error = _plainly(error)
            job.state = "failed"
        finally:
            job.seconds = time.monotonic() - job.started

    def _tools(self, job: Job) -> Tools:
        if self._open is not None and self._open[0] == job.place.id:
            return self._open[1]
        job.note = "Loading the models; they stay in memory for the next question."
        # The others go first: two sets may not fit.
        self._open = None
        tools = self._opener(job.place)
        self._open = (job.place.id, tools)
        return tools


def _plainly(error: BaseException) -> str:
    """What may be told of an error that nobody foresaw."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "There is not enough memory for this. Shorten the text, or serve with --dtype bfloat16."
    return f"Something went wrong ({type(error).__name__}); the log of palimpsest serve says more."


class Loaded:
    """The real tools: a dictionary on its models.

    Args:
        subject: From `interpret.subject`.
    """

    def __init__(self, subject: Any) -> None:
        from palimpsest.interpret.steering.steerer import Steerer

        self._subject = subject
        self._steerer: Any = None
        self._steerer_of = Steerer
        self.sides: Sequence[str] = subject.sides

    def read(self, text: str, top: int, latents: Sequence[int]) -> Mapping[str, Any]:
        """See `Tools`."""
        from palimpsest.interpret.text_reading import read_text

        found = read_text(self._subject, text, top=top)
        names = ("tokens", "value", "base", "tuned", "loss_base", "loss_tuned", "cut")
        reading = {name: getattr(found, name) for name in names}
        if latents:
            followed = read_text(self._subject, text, latents=list(latents), losses=False)
            reading["followed"] = {name: getattr(followed, name) for name in ("value", "base", "tuned")}
        return reading

    def write(
        self,
        prompt: str,
        side: str,
        changes: Sequence[str],
        on_token: Callable[[str], object],
        **decoding: Any,
    ) -> str:
        """See `Tools`."""
        if self._steerer is None:
            self._steerer = self._steerer_of(self._subject)
        return self._steerer.generate(prompt, side, changes, on_token=on_token, **decoding)


def opener(config: ServeConfig) -> Opener:
    """What loads the models that the command line allows."""
    from palimpsest.options import ModelOptions

    def opened(place: Place) -> Tools:
        from palimpsest.interpret.subject import open_subject, subject_of

        # Without flags of their own the models of an examples run are loaded as it loaded them.
        given = None if config.models == ModelOptions() else config.models
        if place.folder is not None:
            return Loaded(subject_of(place.folder, given, config.base, config.tuned))
        assert config.base is not None and config.dictionary is not None
        return Loaded(open_subject(config.base, config.tuned, config.dictionary, None, config.models))

    return opened
