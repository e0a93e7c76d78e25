"""Learning a text, and forgetting one: trainers that need transformers only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Trainer, TrainingArguments

from palimpsest.tune.config import TuneConfig
from palimpsest.tune.data import TuneData
from palimpsest.tune.losses import BETA
from palimpsest.tune.objectives.arguments import arguments, on_one_device
from palimpsest.tune.rows import IGNORED, TextRow
from palimpsest.tune.training import tuned_class

RETAIN = "retain_"
"""Begins the names of what of a batch belongs to the text that must stay."""


class Padding:
    """Puts texts into a batch, padded on the right.

    Args:
        pad_id: Token on the padding, which no token sees and no loss counts.
    """

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        """A batch of rows, or of pairs of a row to forget and a row to retain."""
        if isinstance(rows[0], TextRow):
            return self._pad(rows, "")
        return self._pad([row[0] for row in rows], "") | self._pad([row[1] for row in rows], RETAIN)

    def _pad(self, rows: Sequence[TextRow], prefix: str) -> dict[str, Tensor]:
        width = max(len(row.input_ids) for row in rows)
        ids = torch.full((len(rows), width), self.pad_id)
        labels = torch.full((len(rows), width), IGNORED)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for place, row in enumerate(rows):
            length = len(row.input_ids)
            ids[place, :length] = torch.tensor(row.input_ids)
            labels[place, :length] = torch.tensor(row.labels)
            mask[place, :length] = 1
        return {f"{prefix}input_ids": ids, f"{prefix}attention_mask": mask, f"{prefix}labels": labels}


class Beside(torch.utils.data.Dataset):
    """Rows to forget, each with a row to retain; the shorter list begins again."""

    def __init__(self, forget: Sequence[TextRow], retain: Sequence[TextRow]) -> None:
        self.forget, self.retain = forget, retain

    def __len__(self) -> int:
        """As many as the longer list has."""
        return max(len(self.forget), len(self.retain))

    def __getitem__(self, index: int) -> tuple[TextRow, TextRow]:
        """A row of each."""
        return self.forget[index % len(self.forget)], self.retain[index % len(self.retain)]


class Unlearner(Trainer):
    """-2/β mean log σ(-β (log p - log p_ref)) on the text to forget, plus a weight times the loss of that to retain.

    The reference is the base: the adapter switched off.

    Source: Zhang et al., Negative Preference Optimization (https://arxiv.org/abs/2404.05868), equation 3.
    """

    loss_is_scaled_for_ga = False

    def compute_loss(
        self: Any, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a batch of `Beside`."""
        del num_items_in_batch
        options = self.tuning.objective
        beta = BETA["unlearn"] if options.beta is None else float(options.beta)
        forget, retain = (_part(inputs, prefix) for prefix in ("", RETAIN))
        logp = -self.nats(model, forget).sum(1)
        with torch.no_grad(), self.accelerator.unwrap_model(model).disable_adapter():
            reference = -self.nats(model, forget).sum(1)
        npo = 2.0 / beta * F.softplus(beta * (logp - reference)).mean()
        kept = self.nats(model, retain).sum() / (retain["labels"][:, 1:] != IGNORED).sum()
        loss = npo + float(options.retain_weight) * kept
        return (loss, {"loss": loss}) if return_outputs else loss

    def nats(self: Any, model: Any, batch: dict[str, Any]) -> Float[Tensor, "batch next"]:
        """-log p of each labelled token but the first, 0 at the others."""
        labels: Int[Tensor, "batch seq"] = batch["labels"]
        with self.answering(labels != IGNORED):
            logits = model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
            ).logits
        flat = F.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(),
            labels[:, 1:].flatten(),
            ignore_index=IGNORED,
            reduction="none",
        )
        return flat.view(len(labels), -1)

    def prediction_step(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The loss of a held-out batch."""
        del args, kwargs
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None


def sft(config: TuneConfig, model: Any, tokenizer: Any, data: TuneData, folder: Path) -> Any:
    """Predict the labelled tokens of a text: their mean cross-entropy."""
    return _make(Trainer, config, model, tokenizer, folder, data.train, data.heldout)


def unlearn(config: TuneConfig, model: Any, tokenizer: Any, data: TuneData, folder: Path) -> Any:
    """Forget a text and retain another; see `Unlearner`."""
    train, heldout = Beside(data.train, data.retain), Beside(data.heldout, data.retain_heldout)
    return _make(Unlearner, config, model, tokenizer, folder, train, heldout)


def _make(
    trainer: type, config: TuneConfig, model: Any, tokenizer: Any, folder: Path, train: Any, heldout: Any
) -> Any:
    known = (one for one in (tokenizer.pad_token_id, tokenizer.eos_token_id) if one is not None)
    return tuned_class(trainer)(
        model=model,
        args=on_one_device(TrainingArguments(**arguments(config, model, folder)), model),
        data_collator=Padding(next(known, 0)),
        train_dataset=train,
        eval_dataset=heldout,
        tuning=config,
    )


def _part(inputs: Any, prefix: str) -> dict[str, Any]:
    return {name: inputs[f"{prefix}{name}"] for name in ("input_ids", "attention_mask", "labels")}
