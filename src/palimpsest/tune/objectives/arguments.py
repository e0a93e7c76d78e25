"""What all trainers are told: schedule, precision, checkpoints, silence."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from palimpsest.tune.config import TuneConfig


def arguments(config: TuneConfig, model: Any, folder: Path) -> dict[str, Any]:
    """Arguments that transformers' `TrainingArguments` and those of trl share.

    The learning rate rises linearly over the warmup and falls linearly to 0.

    Args:
        config: The run.
        model: The model, for its device.
        folder: Where checkpoints go.
    """
    schedule = config.schedule
    device = next(model.parameters()).device
    save_every = schedule.save_every or max(1, math.ceil(schedule.steps / 4))
    # A seed of ours may be larger than numpy's can be.
    seed = config.run.seed % 2**32
    # The new name, where transformers has it: the old one is deprecated there.
    checkpointing = "activation" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient"
    return {
        "output_dir": str(folder),
        "max_steps": schedule.steps,
        "per_device_train_batch_size": schedule.batch_size,
        "per_device_eval_batch_size": schedule.batch_size,
        "gradient_accumulation_steps": schedule.accumulate,
        "learning_rate": config.lr,
        "lr_scheduler_type": "linear",
        "warmup_steps": int(schedule.warmup * schedule.steps),
        "weight_decay": float(schedule.weight_decay),
        "max_grad_norm": float(schedule.clip),
        "optim": "adamw_torch",
        "bf16": schedule.precision == "bfloat16",
        "fp16": False,
        f"{checkpointing}_checkpointing": schedule.gradient_checkpointing,
        f"{checkpointing}_checkpointing_kwargs": {"use_reentrant": False},
        "logging_strategy": "steps",
        "logging_steps": config.log.log_every,
        # The filter waits for the device at every step; the guard does not.
        "logging_nan_inf_filter": False,
        "eval_strategy": "steps" if schedule.eval_every else "no",
        "eval_steps": schedule.eval_every,
        "prediction_loss_only": True,
        "save_strategy": "steps",
        "save_steps": save_every,
        # A checkpoint that is cut short leaves the one before it.
        "save_total_limit": 2,
        "seed": seed,
        "data_seed": seed,
        "report_to": "none",
        "disable_tqdm": True,
        "log_level": "error",
        "remove_unused_columns": False,
        "dataloader_pin_memory": device.type == "cuda",
        "use_cpu": device.type == "cpu",
    }


def on_one_device(made: Any, model: Any) -> Any:
    """Training arguments that stay on the model's device, however many others can be seen.

    Args:
        made: `TrainingArguments`.
        model: The model.
    """
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if made.n_gpu > 1:
        made._n_gpu = 1
    return made
