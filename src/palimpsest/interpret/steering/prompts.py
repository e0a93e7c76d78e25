"""Prompts from the command line and from a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from palimpsest.errors import ConfigError


def read_prompts(given: Sequence[str], path: Path | None) -> list[str]:
    """All prompts in their order, those of a file last.

    Args:
        given: As they are.
        path: One prompt per line; a `.jsonl` file holds rows with a `prompt`. Empty lines are no prompts.

    Raises:
        ConfigError: The file cannot be read, holds no prompt, or a row has none.
    """
    if path is None:
        return list(given)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Cannot read the prompts in {path}", found=error) from error
    if path.suffix == ".jsonl":
        found = [_prompt(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    else:
        found = [line for line in lines if line.strip()]
    if not found:
        raise ConfigError(f"{path} holds no prompts", expected="one per line, or JSONL rows with a `prompt`")
    return [*given, *found]


def _prompt(line: str, origin: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{origin} is not JSON", found=error) from error
    prompt = row.get("prompt") if isinstance(row, dict) else None
    if not isinstance(prompt, str):
        raise ConfigError(f"{origin} has no prompt", expected='a row such as {"prompt": "The river"}')
    return prompt


__all__ = ["read_prompts"]
