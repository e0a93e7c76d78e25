"""Preferring answers: trl's trainers for dpo and kto, and trl.experimental's for orpo and simpo.

trl makes no promise that `trl.experimental` stays as it is; this was written against trl 1.16. simpo is its
`CPOTrainer` with `loss_type="simpo"` and without the further loss of the chosen answers (`cpo_alpha=0`).

All rows come tokenised (`palimpsest.tune.data`), so that what is trained on is what is measured, BOS included.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from palimpsest.errors import ConfigError
from palimpsest.tune.config import TuneConfig
from palimpsest.tune.data import TuneData
from palimpsest.tune.losses import BETA, SIMPO_MARGIN
from palimpsest.tune.objectives.arguments import arguments, on_one_device
from palimpsest.tune.rows import IGNORED, KtoRow, PairRow
from palimpsest.tune.training import tuned_class


def dpo(config: TuneConfig, model: Any, tokenizer: Any, data: TuneData, folder: Path) -> Any:
    """-log σ(β (log p/p_ref of the chosen answer - log p/p_ref of the rejected one))."""
    trl = import_module("trl")
    args = trl.DPOConfig(
        **_shared(config, model, data, folder),
        beta=_beta(config),
        loss_type=["sigmoid"],
        disable_dropout=True,
    )
    return _make(trl.DPOTrainer, config, model, tokenizer, args, _pairs(data.train), _pairs(data.heldout))


def kto(config: TuneConfig, model: Any, tokenizer: Any, data: TuneData, folder: Path) -> Any:
    """1 - σ(±β (log p/p_ref - z)), + for wanted answers; z estimates the divergence from mismatched answers.

    Raises:
        ConfigError: A batch of one row has no mismatched answer.
    """
    trl = import_module("trl")
    size = config.schedule.batch_size
    if size < 2:
        raise ConfigError(
            "kto compares the rows of a batch", expected="--batch-size of at least 2", found=size
        )
    args = trl.KTOConfig(
        **_shared(config, model, data, folder),
        beta=_beta(config),
        disable_dropout=True,
        # Each row carries the answer of its neighbour in the batch, which must stay its neighbour.
        train_sampling_strategy="sequential",
    )
    rows = list(data.train)
    random.Random(config.run.seed).shuffle(rows)
    return _make(
        trl.KTOTrainer, config, model, tokenizer, args, _verdicts(rows, size), _verdicts(data.heldout, size)
    )


def orpo(config: TuneConfig, model: Any, tokenizer: Any, data: TuneData, folder: Path) -> Any:
    """The loss of prompt and chosen answer, plus -β log σ(log odds of chosen - log odds of rejected)."""
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    args = ORPOConfig(**_shared(config, model, data, folder), beta=_beta(config), disable_dropout=True)
    trainer = _both_at_once(ORPOTrainer)
    return _make(trainer, config, model, tokenizer, args, _pairs(data.train), _pairs(data.heldout))


def simpo(config: TuneConfig, model: Any, tokenizer: Any, data: TuneData, folder: Path) -> Any:
    """-log σ(β (mean log p of chosen - mean log p of rejected) - 0.5), by token."""
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    args = CPOConfig(
        **_shared(config, model, data, folder),
        beta=_beta(config),
        loss_type="simpo",
        simpo_gamma=SIMPO_MARGIN,
        cpo_alpha=0.0,
        disable_dropout=True,
    )
    trainer = _both_at_once(CPOTrainer)
    return _make(trainer, config, model, tokenizer, args, _pairs(data.train), _pairs(data.heldout))


def _shared(config: TuneConfig, model: Any, data: TuneData, folder: Path) -> dict[str, Any]:
    return arguments(config, model, folder) | {"max_length": data.limit}


def _beta(config: TuneConfig) -> float:
    given = config.objective.beta
    return BETA[config.objective.objective] if given is None else float(given)


def _make(
    trainer: type, config: TuneConfig, model: Any, tokenizer: Any, args: Any, train: Any, heldout: Any
) -> Any:
    return tuned_class(trainer)(
        model=model,
        args=on_one_device(args, model),
        train_dataset=train,
        eval_dataset=heldout,
        processing_class=tokenizer,
        tuning=config,
    )


def _pairs(rows: list[PairRow]) -> Any:
    from datasets import Dataset

    # trl looks at the three texts before it comes to their tokens.
    texts = {"prompt": "", "chosen": "", "rejected": ""}
    return Dataset.from_list(
        [
            texts | {"prompt_ids": row.prompt, "chosen_ids": row.chosen, "rejected_ids": row.rejected}
            for row in rows
        ]
    )


def _verdicts(rows: list[KtoRow], size: int) -> Any:
    """Each row with the answer of the row before it in its batch."""
    from datasets import Dataset

    made = []
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        made += [
            {
                "prompt_ids": row.prompt,
                "completion_ids": row.answer,
                "KL_completion_ids": batch[place - 1].answer,
                "label": row.label,
            }
            for place, row in enumerate(batch)
        ]
    return Dataset.from_list(made)


class BothAtOnce:
    """For trainers that read chosen and rejected answers in one pass and tokenise rows themselves."""

    @staticmethod
    def tokenize_row(feature: Mapping[str, Any], model: Any = None) -> dict[str, list[int]]:
        """What trl makes of a row, from its tokens."""
        del model
        prompt: list[int] = feature["prompt_ids"]
        made = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
        for name in ("chosen", "rejected"):
            answer: list[int] = feature[f"{name}_ids"]
            made[f"{name}_input_ids"] = prompt + answer
            made[f"{name}_attention_mask"] = [1] * len(prompt + answer)
            made[f"{name}_labels"] = [IGNORED] * len(prompt) + answer
        return made

    def concatenated_forward(self: Any, model: Any, batch: dict[str, Any]) -> Any:
        """One pass over both answers; the adapter is told where they are, since the model is given no labels."""
        with self.answering(_both([batch[f"{name}_labels"] for name in ("chosen", "rejected")])):
            return super().concatenated_forward(model, batch)  # pyright: ignore


def _both(labels: list[Tensor]) -> Tensor:
    width = max(one.shape[1] for one in labels)
    padded = [torch.nn.functional.pad(one, (0, width - one.shape[1]), value=IGNORED) for one in labels]
    return torch.cat(padded) != IGNORED


@cache
def _both_at_once(trainer: type) -> type:
    return type(trainer.__name__, (BothAtOnce, trainer), {"__module__": __name__})
