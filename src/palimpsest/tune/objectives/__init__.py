"""The trainers: sft and unlearn on transformers' own, dpo, kto, grpo on trl's, orpo and simpo on trl.experimental's."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from palimpsest.errors import ConfigError
from palimpsest.tune.config import TuneConfig
from palimpsest.tune.data import TuneData

MAKERS = {
    "sft": "text",
    "unlearn": "text",
    "dpo": "preferences",
    "kto": "preferences",
    "orpo": "preferences",
    "simpo": "preferences",
    "grpo": "rewards",
}
"""The module of this package that makes an objective's trainer, by a function of the objective's name."""


def make_trainer(config: TuneConfig, model: Any, tokenizer: Any, data: TuneData, folder: Path) -> Any:
    """The trainer of a run, ready to `train()`.

    The reference of dpo, kto, grpo and unlearn is the model with its adapter switched off, which is the base to the
    last bit.

    Args:
        config: The run.
        model: A peft model with one new adapter.
        tokenizer: Of the model.
        data: Rows to learn from and to evaluate on.
        folder: Where checkpoints go.

    Raises:
        ConfigError: trl is not installed, or an option does not suit the objective.
    """
    objective = config.objective.objective
    home = MAKERS[objective]
    if home != "text":
        _need_trl(objective)
    make: Callable[..., Any] = getattr(import_module(f"{__name__}.{home}"), objective)
    return make(config, model, tokenizer, data, folder)


def _need_trl(objective: str) -> None:
    if find_spec("trl") is None:
        raise ConfigError(
            f"--objective {objective} needs trl, which is not installed",
            fix="pip install 'palimpsest-lm[trl]', or choose sft or unlearn",
        )


__all__ = ["MAKERS", "make_trainer"]
