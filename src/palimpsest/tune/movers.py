"""Which latents move while training: their values, gradients and firings, on disk, in the terminal and in trackers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback

from palimpsest.artifacts import RunFolder, disk
from palimpsest.log import progress
from palimpsest.trackers import open_trackers
from palimpsest.tune.adapter import LatentLayer, Seen
from palimpsest.tune.choices import MOVED
from palimpsest.tune.config import LogOptions
from palimpsest.tune.entries import Entries, Log
from palimpsest.tune.mover_table import Mover, MoverTable

CLOCK = "step"


class Movers(TrainerCallback):
    """Follows an adapter's latents through training; add it last, behind callbacks that change values.

    Each entry holds the values after a step, the gradients that the step was made with (of the whole accumulated batch,
    clipped as the optimiser saw them) and the tokens on which each latent fired since the last entry: edited ones, no
    padding, in passes that are trained on. Counting stays on the device; an entry is read in one piece per device.

    A context manager: leaving it takes the watchers off, stops the display and closes the files. `write` makes the
    table when training is over.

    Args:
        run: The run's folder.
        layers: Of the model that is trained; none for other adapters, of which only the trainer's reports are kept.
        options: How often, how many, and which trackers.
        steps: Optimiser steps of the run.
        config: What trackers are told.
        adapter: Its name in the model.
    """

    def __init__(
        self,
        run: RunFolder,
        layers: Sequence[LatentLayer],
        options: LogOptions,
        *,
        steps: int,
        config: Mapping[str, Any] | None = None,
        adapter: str = "default",
    ) -> None:
        self._run, self._options, self._adapter = run, options, adapter
        self._layers = [layer for layer in layers if adapter in layer.components]
        self._config, self._steps = dict(config or {}), steps
        self._watched = [_Watched(layer, adapter) for layer in self._layers]
        self._table = MoverTable()
        self._stack = ExitStack()
        self._entries: Entries | None = None
        self._log: Log | None = None
        self._gradients: list[Tensor | None] | None = None
        self._series: dict[str, float] = {}
        self._send: list[Any] = []
        self._advance: Any = None

    def __enter__(self) -> Movers:
        """Nothing is opened before training begins."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """See `close`."""
        self.close()

    def close(self) -> None:
        """Take the watchers off, stop the display, close files and trackers."""
        self._stack.close()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Open the files where the checkpoint left them, and begin to watch."""
        start = int(state.global_step)
        self._stack.close()
        self._entries, self._log = Entries(self._run, start), Log(self._run, start)
        self._stack.callback(self._log.close)
        open_now = open_trackers(self._options.track, self._run.path, self._config, CLOCK)
        self._send = [send for send, _ in open_now]
        for _send, close in open_now:
            self._stack.callback(close)
        for watched in self._watched:
            watched.start(_counters(self._run, start))
            self._stack.callback(watched.stop)
        above = self._table.render if self._layers else None
        self._advance = self._stack.enter_context(progress("training", self._steps, "steps", above))
        self._advance(start)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Keep the gradients of a step that will be an entry; afterwards they are zeroed."""
        if self._due(state.global_step + 1, state):
            self._gradients = [watched.component.gradients() for watched in self._watched]

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Make an entry where one is due, and put all on disk before a checkpoint."""
        self._advance(1)
        step = int(state.global_step)
        if self._layers and self._due(step, state):
            self._enter(step, everything=step >= state.max_steps or bool(control.should_training_stop))
        self._gradients = None
        if control.should_save:
            self._flush(step)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The same for a checkpoint that nobody announced."""
        self._flush(int(state.global_step))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Keep the trainer's report."""
        if self._log is None or not logs:
            return
        self._log.add(int(state.global_step), logs)
        if isinstance(loss := logs.get("loss"), float) and self._advance is not None:
            self._advance(0, note=f"loss {loss:.4g}")
        for send in self._send:
            send({**logs, **self._series, CLOCK: int(state.global_step)})

    def write(self, step: int) -> None:
        """Write `latents.parquet`, whose last entry holds every latent that moved.

        Args:
            step: Of the weights that are kept: entries behind it, whose weights were taken back, are left out.
        """
        if self._entries is None:
            self._entries = Entries(self._run, step)
        self._entries.rewind(step)
        last, held = self._entries.last()
        known = held if last == step else set()
        rows = [mover for mover in self._moved() if (mover.site, mover.latent) not in known]
        self._entries.write(step, _columns(rows))

    def moved(self) -> int:
        """How many latents are no longer as they were, by more than `MOVED`."""
        return sum(not abs(mover.value) <= MOVED for mover in self._moved())

    def _due(self, step: int, state: Any) -> bool:
        return step % self._options.log_every == 0 or step >= state.max_steps

    def _enter(self, step: int, *, everything: bool) -> None:
        assert self._entries is not None
        limit = None if self._options.log_latents == "all" else int(self._options.log_latents)
        gradients = self._gradients or [None] * len(self._watched)
        readings = [
            watched.reading(gradient, None if everything else limit)
            for watched, gradient in zip(self._watched, gradients, strict=True)
        ]
        rows = _strongest(readings, self._watched, limit)
        if everything and limit is not None:
            strong = {(mover.site, mover.latent) for mover in rows}
            every = _strongest(readings, self._watched, None)
            rows += [one for one in every if one.value and (one.site, one.latent) not in strong]
        self._entries.add(step, _columns(rows))
        self._table.update(step, rows)
        top = rows[: self._options.track_latents]
        self._series = {f"latents/{mover.site}/{mover.latent}": mover.value for mover in top}

    def _moved(self) -> list[Mover]:
        readings = [watched.reading(None, None, count=False) for watched in self._watched]
        return [mover for mover in _strongest(readings, self._watched, None) if mover.value]

    def _flush(self, step: int) -> None:
        if self._entries is not None:
            self._entries.flush(step)
            _keep_counters(self._run, step, {one.layer.site: one.counts() for one in self._watched})


class _Reading(NamedTuple):
    """Strongest latents of one layer: `[rows]` of latent, strength, value, gradient and firings, on the device."""

    table: Tensor
    gradient: bool
    firings: bool


class _Watched:
    """One layer with the counts of its latents."""

    def __init__(self, layer: LatentLayer, adapter: str) -> None:
        self.layer, self._adapter = layer, adapter
        self.component = layer.components[adapter]
        dictionary = layer.dictionary_of(adapter)
        norms = dictionary.W_dec.detach().float().flatten(1).norm(dim=1)
        self._norms = norms[self.component.latents]
        self._counts = torch.zeros(dictionary.n_latents, dtype=torch.long, device=norms.device)

    def start(self, counts: Mapping[str, Tensor]) -> None:
        """Begin to watch, with what was counted before the checkpoint."""
        self._counts.zero_()
        if (before := counts.get(self.layer.site)) is not None:
            self._counts += before.to(self._counts.device)
        self.layer.watchers.append(self._see)

    def stop(self) -> None:
        """Watch no longer."""
        if self._see in self.layer.watchers:
            self.layer.watchers.remove(self._see)

    def counts(self) -> Tensor:
        """What was counted since the last entry."""
        return self._counts.cpu().clone()

    def reading(self, gradient: Tensor | None, limit: int | None, *, count: bool = True) -> _Reading:
        """The strongest latents; with `count` the firings are read too, and begin again."""
        component, device = self.component, self._counts.device
        wide = torch.float32 if device.type == "mps" else torch.float64
        values = component.values().to(device, wide)
        strength = values.abs() * self._norms
        size = component.n if limit is None else min(limit, component.n)
        # Diverged values come first: NaN is what a reader must see.
        best = strength.nan_to_num(nan=torch.inf).topk(size).indices
        latents = component.latents.to(device)[best]
        empty = values.new_zeros(size)
        slopes = empty if gradient is None else gradient.to(values)[best]
        fires = self._counts[latents].to(wide) if count else empty
        if count:
            self._counts.zero_()
        table = torch.stack([latents.to(wide), strength[best], values[best], slopes, fires])
        return _Reading(table, gradient is not None, count and not component.constant)

    def _see(self, seen: Seen) -> None:
        # References, evaluations and generated answers run without gradients; nothing is learned from those passes.
        if seen.adapter != self._adapter or seen.codes is None or not torch.is_grad_enabled():
            return
        codes, keep, mask = seen.codes, seen.edited, self.layer.call.mask
        if mask is not None and mask.numel() == codes.tokens:
            real = mask.reshape(-1).to(codes.indices.device).bool()
            keep = real if keep is None else keep & real
        fired = codes.values.detach() > 0
        if keep is not None:
            fired = fired & keep.to(fired.device)[codes.rows()]
        self._counts.index_add_(0, codes.indices.long(), fired.long())


def _strongest(readings: Sequence[_Reading], watched: Sequence[_Watched], limit: int | None) -> list[Mover]:
    """The strongest latents of all layers; one transfer per device."""
    found: list[tuple[float, Mover]] = []
    devices: dict[torch.device, list[int]] = {}
    for place, reading in enumerate(readings):
        devices.setdefault(reading.table.device, []).append(place)
    for places in devices.values():
        whole = torch.cat([readings[place].table for place in places], dim=1).cpu()
        parts = whole.split([readings[place].table.shape[1] for place in places], dim=1)
        for place, part in zip(places, parts, strict=True):
            reading, site = readings[place], watched[place].layer.site
            for latent, strength, value, slope, fires in part.T.tolist():
                mover = Mover(
                    site,
                    int(latent),
                    value,
                    slope if reading.gradient else None,
                    int(fires) if reading.firings else None,
                )
                found.append((strength, mover))
    found.sort(key=lambda one: -one[0])
    return [mover for _, mover in found[:limit]]


def _columns(movers: Sequence[Mover]) -> dict[str, list[Any]]:
    return {name: [getattr(mover, name) for mover in movers] for name in Mover._fields}


def _counters_path(run: RunFolder) -> Path:
    return run.part("movers") / "counts"


def _keep_counters(run: RunFolder, step: int, counts: dict[str, Tensor]) -> None:
    folder = _counters_path(run)
    folder.mkdir(parents=True, exist_ok=True)
    if counts:
        with disk.replacing(folder / f"{step:09d}.safetensors") as temporary:
            save_file(counts, temporary)


def _counters(run: RunFolder, step: int) -> dict[str, Tensor]:
    path = _counters_path(run) / f"{step:09d}.safetensors"
    return load_file(path) if path.exists() else {}
