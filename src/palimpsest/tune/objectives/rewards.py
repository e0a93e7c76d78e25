"""Earning a reward: trl's trainer for grpo, and the reward function that a user names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from palimpsest.errors import ConfigError
from palimpsest.tune.config import TuneConfig
from palimpsest.tune.data import TuneData
from palimpsest.tune.objectives.arguments import arguments, on_one_device
from palimpsest.tune.training import tuned_class

Reward = Callable[..., list[float | None]]


def grpo(config: TuneConfig, model: Any, tokenizer: Any, data: TuneData, folder: Path) -> Any:
    """Group-relative policy optimisation of a reward; `beta` (0) weighs the divergence from the base.

    Raises:
        ConfigError: The reward cannot be imported; batches do not hold whole groups of completions.
    """
    asked, schedule = config.objective, config.schedule
    batch = schedule.batch_size * schedule.accumulate
    if asked.generations < 2 or batch % asked.generations:
        raise ConfigError(
            "A step of grpo compares the completions of a prompt",
            expected="--generations of 2 or more, and --batch-size times --accumulate a multiple of it",
            found=f"{asked.generations} generations, {batch} completions in a step",
        )
    if len(data.train) < batch // asked.generations:
        raise ConfigError(
            "There are fewer prompts than one step reads",
            expected=f"at least {batch // asked.generations}",
            found=len(data.train),
            fix="Lower --batch-size",
        )
    shared: dict[str, Any] = arguments(config, model, folder) | {
        "per_device_eval_batch_size": asked.generations
    }
    trl = import_module("trl")
    args = trl.GRPOConfig(
        **shared,
        beta=float(asked.beta or 0.0),
        max_completion_length=asked.completion_length,
        num_generations=asked.generations,
        disable_dropout=True,
    )
    return tuned_class(_with_bos(trl.GRPOTrainer))(
        model=model,
        reward_funcs=[load_reward(str(asked.reward))],
        args=on_one_device(args, model),
        train_dataset=_prompts(data.train),
        eval_dataset=_prompts(data.heldout),
        processing_class=tokenizer,
        tuning=config,
    )


def load_reward(name: str) -> Reward:
    """The function of `module:function`; it is called with those of its arguments that it takes.

    Raises:
        ConfigError: It cannot be imported, is no function, raises, or does not give one number for each completion.
    """
    module, _, attribute = name.partition(":")
    try:
        function: Any = getattr(import_module(module), attribute)
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"The reward {name} cannot be imported",
            expected="module:function, on Python's path (PYTHONPATH)",
            found=f"{type(error).__name__}: {error}",
        ) from error
    if not callable(function):
        raise ConfigError(f"The reward {name} is no function", found=type(function).__name__)
    call: Callable[..., Any] = function
    taken = inspect.signature(function).parameters
    whole = any(one.kind is one.VAR_KEYWORD for one in taken.values())

    def reward(prompts: Sequence[Any], completions: Sequence[Any], **more: Any) -> list[float | None]:
        given = {"prompts": prompts, "completions": completions, **more}
        try:
            numbers = call(**{key: value for key, value in given.items() if whole or key in taken})
        except Exception as error:
            raise ConfigError(
                f"The reward {name} failed", found=f"{type(error).__name__}: {error}"
            ) from error
        try:
            made = [None if one is None else float(one) for one in numbers]
        except (TypeError, ValueError) as error:
            raise ConfigError(f"The reward {name} gives no numbers", found=error) from error
        if len(made) != len(completions):
            raise ConfigError(
                f"The reward {name} does not give one number for each completion",
                expected=len(completions),
                found=len(made),
            )
        return made

    reward.__name__ = attribute
    return reward


def _prompts(rows: Sequence[Any]) -> Any:
    from datasets import Dataset

    return Dataset.from_list([row.columns | {"prompt": row.text} for row in rows])


@cache
def _with_bos(trainer: type) -> type:
    """A trainer whose prompts begin as everywhere here: with the BOS, where the tokenizer has one."""

    def _tokenize_prompts(self: Any, prompts: list[Any]) -> Any:
        ids, *rest = trainer._tokenize_prompts(self, prompts)  # pyright: ignore
        bos = self.processing_class.bos_token_id
        if bos is not None and self.tuning.corpora.prepend_bos is not False:
            ids = [one if one[:1] == [bos] else [bos, *one] for one in ids]
        return (ids, *rest)

    return type(
        trainer.__name__, (trainer,), {"__module__": __name__, "_tokenize_prompts": _tokenize_prompts}
    )
