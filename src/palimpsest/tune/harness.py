"""Tasks of lm-evaluation-harness on a base and on what was tuned, through the harness's own API."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

from palimpsest.errors import ConfigError
from palimpsest.tune.scoring import settled

LOUD = ("lm_eval", "lm-eval", "datasets", "evaluate")


def run_lm_eval(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    limit: int | None = None,
    path: str | None = None,
    *,
    base: bool = False,
    batch_size: int = 8,
) -> dict[str, dict[str, float]]:
    """Metrics of each task, as `simple_evaluate` of the harness computes them.

    Args:
        model: A transformers or a peft model.
        tokenizer: Its tokenizer.
        tasks: Names of tasks or groups.
        limit: Examples of each task; all by default.
        path: Folder with further task files (YAML).
        base: With the adapter switched off.
        batch_size: Of the harness.

    Returns:
        Metrics by task, `acc`, `acc_stderr` and so on; of a filter that is not `none` as `exact_match,strict`.

    Raises:
        ConfigError: The harness is not installed, there is no such task or folder, or a task cannot be run.
    """
    manager = _manager(tuple(tasks), path)
    return _run(model, tokenizer, tasks, limit, manager, base=base, batch_size=batch_size)


def compare_lm_eval(
    model: Any, tokenizer: Any, tasks: Sequence[str], limit: int | None = None, path: str | None = None
) -> dict[str, dict[str, dict[str, float]]]:
    """The same tasks on base and tuned model: `{"base": …, "tuned": …}`, as `run_lm_eval` gives each."""
    manager = _manager(tuple(tasks), path)
    return {
        side: _run(model, tokenizer, tasks, limit, manager, base=side == "base", batch_size=8)
        for side in ("base", "tuned")
    }


@lru_cache(maxsize=1)
def _manager(tasks: tuple[str, ...], path: str | None) -> Any:
    """What finds the tasks; the harness's own, which take long to list, only where they are asked for."""
    _need("lm_eval")
    if path is not None and not Path(path).is_dir():
        raise ConfigError("--lm-eval-path is no folder", found=path)
    from lm_eval.tasks import TaskManager

    with _quiet():
        if path is not None:
            manager = TaskManager(include_path=path, include_defaults=False)
            if all(name in manager.all_tasks for name in tasks):
                return manager
        manager = TaskManager(include_path=path)
    if missing := [name for name in tasks if name not in manager.all_tasks]:
        raise ConfigError(
            "There is no such task of lm-evaluation-harness",
            found=", ".join(missing),
            fix="See `lm_eval ls tasks`, or name a folder of task files with --lm-eval-path",
        )
    return manager


def _run(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    limit: int | None,
    manager: Any,
    *,
    base: bool,
    batch_size: int,
) -> dict[str, dict[str, float]]:
    harness = _need("lm_eval")
    from lm_eval.models.huggingface import HFLM

    off = model.disable_adapter() if base and hasattr(model, "disable_adapter") else nullcontext()
    with _quiet(), settled(model), off:
        try:
            wrap: Any = HFLM
            wrapped = wrap(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
            found = harness.simple_evaluate(
                model=wrapped,
                tasks=list(tasks),
                limit=limit,
                task_manager=manager,
                log_samples=False,
                bootstrap_iters=1000,
            )
        except (OSError, ValueError, KeyError, ImportError, RuntimeError, TypeError) as error:
            raise ConfigError(
                f"lm-evaluation-harness cannot run {', '.join(tasks)}",
                found=" ".join(str(error).split())[:400],
            ) from error
    return {task: _metrics(one) for task, one in found["results"].items()}


def _metrics(found: dict[str, Any]) -> dict[str, float]:
    """Numbers only; the filter is named where it is one."""
    named = {
        key.removesuffix(",none"): value for key, value in found.items() if key not in ("alias", "sample_len")
    }
    return {
        key: float(value)
        for key, value in named.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Warnings of the harness and of what it loads only where something is wrong."""
    levels = {name: logging.getLogger(name).level for name in LOUD}
    for name in LOUD:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _need(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise ConfigError(
            "--lm-eval needs lm-evaluation-harness, which is not installed",
            fix="pip install 'palimpsest-lm[lm-eval]'",
        ) from error
