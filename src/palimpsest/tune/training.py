"""What every trainer gets: penalties, a guard against NaN, complete checkpoints, silence."""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from palimpsest.tune.adapter import answering
from palimpsest.tune.config import TuneConfig
from palimpsest.tune.penalties import ADAPTER, keep_top, kept, layers_of, penalty

COMPLETE = "complete"
"""Name of the file that a checkpoint gets last."""

GOOD = "good.safetensors"
"""What a checkpoint holds of the parameters before its last step."""

READ = 25
"""Steps after which a fault is noticed at the latest."""

REFERENCE = "ref"
"""The adapter that trl adds to a peft model for its reference."""

_LOUD = ("transformers", "trl", "accelerate", "peft", "datasets")


class Guard(TrainerCallback):
    """Keeps what is not finite out of the adapter, without waiting for the device.

    From the first step on whose loss or gradient is not finite, nothing moves any more: the adapter stays, to the last
    bit, as it was when the last finite loss was computed. A loss that is not finite condemns the step before it, whose
    parameters it was computed with; a gradient condemns its own step only. The fault is read when the log is written,
    every `READ` steps at least, and then training ends.

    Args:
        parameters: What is trained.
        config: The run, for the number of latents to keep.
    """

    def __init__(self, parameters: list[nn.Parameter], config: TuneConfig) -> None:
        self._parameters, self._schedule = parameters, config.schedule
        self._before = [one.detach().clone() for one in parameters]
        device = parameters[0].device
        self._fine = torch.ones((), dtype=torch.bool, device=device)
        self._step = torch.zeros((), dtype=torch.long, device=device)
        self._good = torch.zeros((), dtype=torch.long, device=device)

    def watch(self, loss: Tensor) -> None:
        """Take note of a loss."""
        self._fine &= torch.isfinite(loss.detach()).all()

    @property
    def fault(self) -> int | None:
        """The first step that was not finite; waits for the device."""
        return None if bool(self._fine) else max(1, int(self._step))

    @property
    def steps(self) -> int:
        """Optimiser steps whose effect is in the adapter after a fault; waits for the device."""
        return int(self._good)

    def save(self, folder: Path) -> None:
        """Write what a fault right behind this checkpoint would bring back."""
        made = {str(place): one.contiguous() for place, one in enumerate(self._before)}
        save_file(made | {"steps": self._good}, folder / GOOD)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""
        found = load_file(folder / GOOD)
        self._good.copy_(found["steps"])
        for place, before in enumerate(self._before):
            before.copy_(found[str(place)])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave embeddings without gradients: recomputing without reentrance does not need them."""
        del args, state, control
        base = kwargs["model"].get_base_model()
        if hasattr(base, "disable_input_require_grads"):
            base.disable_input_require_grads()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the steps while all is well."""
        del args, control, kwargs
        self._step.copy_(torch.where(self._fine, state.global_step + 1, self._step))

    @torch.no_grad()
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the parameters if the loss was finite, then look at the gradients, all there and clipped."""
        del args, control, kwargs
        self._good.copy_(torch.where(self._fine, state.global_step, self._good))
        for parameter, before in zip(self._parameters, self._before, strict=True):
            before.copy_(torch.where(self._fine, parameter, before))
        gradients = [one.grad for one in self._parameters if one.grad is not None]
        if gradients:
            self._fine &= torch.isfinite(torch.nn.utils.get_total_norm(gradients))
        for gradient in gradients:
            gradient.masked_fill_(~self._fine, 0)

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop what is to be dropped, and take back a step that was not finite."""
        del args, control
        if self._schedule.top_n is not None:
            _thin_out(kwargs["model"], state.global_step + 1, self._schedule.steps, self._schedule.top_n)
        for parameter, before in zip(self._parameters, self._before, strict=True):
            parameter.copy_(torch.where(self._fine, parameter, before))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End training at an entry of the log, if need be."""
        del kwargs
        step = state.global_step
        if step % int(args.logging_steps) == 0 or step % READ == 0 or step >= state.max_steps:
            control.should_training_stop = control.should_training_stop or self.fault is not None


def _thin_out(model: nn.Module, step: int, steps: int, n: int) -> None:
    sizes = [layer.component(ADAPTER).n for layer in layers_of(model)]
    if sizes:
        keep_top(model, kept(step, steps, max(sizes), n))


class Tuning:
    """Put before one of transformers' or trl's trainers; `tuned_class` does it.

    Args:
        tuning: The run.
    """

    def __init__(self, *args: Any, tuning: TuneConfig, **kwargs: Any) -> None:
        # trl's constructors prepare the data already.
        self.tuning = tuning
        trainer: Any = super()
        trainer.__init__(*args, **kwargs)
        self._settle()

    def _settle(self: Any) -> None:
        """Undo what a trainer does for others than us, and add the guard."""
        from transformers import PrinterCallback

        if REFERENCE in getattr(self.model, "peft_config", {}):
            # The adapter is new: switched off, it is the base to the last bit, and needs no copy of itself.
            self.model.delete_adapter(REFERENCE)
        self.remove_callback(PrinterCallback)
        self.guard = Guard([one for one in self.model.parameters() if one.requires_grad], self.tuning)
        self.add_callback(self.guard)

    def training_step(self: Any, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """A forward and a backward pass; the last of an optimiser step also of the penalties."""
        loss = super().training_step(model, inputs, num_items_in_batch)  # pyright: ignore
        self.guard.watch(loss)
        schedule = self.tuning.schedule
        if (schedule.l1 or schedule.group) and self.accelerator.sync_gradients:
            # Apart from the objective: how trainers divide that among passes is none of the penalties' business.
            penalty(self.model, float(schedule.l1), float(schedule.group)).backward()
        return loss

    def get_decay_parameter_names(self: Any, model: nn.Module) -> list[str]:
        """All that is trained: everything at 0 is the base, whatever its name is."""
        return [name for name, parameter in model.named_parameters() if parameter.requires_grad]

    def _prepare_dataset(self: Any, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Rows that are tokenised already are taken as they are."""
        if "prompt_ids" in dataset.column_names:
            return dataset
        return super()._prepare_dataset(dataset, *args, **kwargs)  # pyright: ignore

    def _save(self: Any, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The adapter, and none of what belongs to the base."""
        del state_dict
        folder = str(output_dir or self.args.output_dir)
        self.model.save_pretrained(folder, selected_adapters=[ADAPTER], save_embedding_layers=False)

    def _save_checkpoint(self: Any, model: nn.Module, trial: Any) -> None:
        """A checkpoint that says when it is complete; none of a state that is not finite."""
        if self.guard.fault is not None:
            self.control.should_training_stop = True
            return
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        shutil.rmtree(folder, ignore_errors=True)
        super()._save_checkpoint(model, trial)  # pyright: ignore
        self.guard.save(folder)
        (folder / COMPLETE).touch()

    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: Any = None) -> None:
        """The adapter, and what the guard would bring back."""
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # pyright: ignore
        self.guard.load(Path(resume_from_checkpoint))

    def create_model_card(self: Any, *args: Any, **kwargs: Any) -> None:
        """No card of trl's in checkpoints."""

    def _send_telemetry(self: Any) -> None:
        """Nothing of a run is told to anyone."""

    def answering(self: Any, mask: Tensor | None) -> Any:
        """Tell the adapter which tokens are the answer, where its scope depends on it and the trainer does not."""
        return nullcontext() if self.tuning.adapter.scope == "all" else answering(self.model, mask)


@cache
def tuned_class(trainer: type) -> type:
    """One of transformers' or trl's trainers with all of this."""
    return type(f"Tuned{trainer.__name__}", (Tuning, trainer), {"__module__": __name__})


@contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """No dropout inside the block.

    A reference that is the base must be the same twice, and a few numbers need no noise.
    """
    found = []
    for module in model.modules():
        name = "p" if isinstance(module, nn.Dropout) else "attention_dropout"
        if isinstance(before := module.__dict__.get(name), float):
            found.append((module, name, before))
    for module, name, _ in found:
        setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, before in found:
            setattr(module, name, before)


def restore(trainer: Any) -> None:
    """Take back what training wrapped around a model's forward: mixed precision, and trl's own head."""
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    base = trainer.model.get_base_model()
    base.__dict__.pop("forward", None)
    off = getattr(base, "activation_checkpointing_disable", base.gradient_checkpointing_disable)
    off()
    trainer.model.eval()


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that a run goes on from; None where none is complete."""
    found = [path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


@contextmanager
def hushed() -> Iterator[None]:
    """Keep libraries from writing to the terminal: what a user must know, we say."""
    import datasets
    from transformers.utils import logging as library

    loggers = [logging.getLogger(name) for name in _LOUD]
    levels, verbosity = [one.level for one in loggers], library.get_verbosity()
    bars = datasets.are_progress_bars_disabled()
    try:
        for one in loggers:
            one.setLevel(logging.ERROR)
        library.set_verbosity_error()
        datasets.disable_progress_bars()
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", category=FutureWarning, module=r"(trl|peft|accelerate|transformers)\."
            )
            # Said in this package's documentation.
            warnings.filterwarnings("ignore", message="You are importing from 'trl.experimental'")
            yield
    finally:
        library.set_verbosity(verbosity)
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
