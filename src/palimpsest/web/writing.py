"""What the jobs do: read a text, or let the models write side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from palimpsest.web.bench import Job, Tools, Work

LONGEST_TEXT = 20_000
LONGEST_PROMPT = 4_000
MOST_NEW_TOKENS = 400
MOST_CHANGES = 8
STRONGEST = 24
"""Latents of a token that are read: more than are shown, so that most of one model's are known of the other, too."""


@dataclass(frozen=True)
class Steering:
    """A question to the models.

    Attributes:
        prompt: What they continue.
        changes: Of latents, as in `123:scale=4`.
        side: Whose latents are changed.
        max_new_tokens: Tokens at most.
        temperature: 0 takes the likeliest.
        seed: Of the draws.
        chat: The prompt is a user's message.
    """

    prompt: str
    changes: tuple[str, ...]
    side: str
    max_new_tokens: int = 60
    temperature: float = 0.0
    seed: int = 0
    chat: bool = False


def reading(text: str, latents: Sequence[int]) -> Work:
    """Reads a text with both models."""

    def work(job: Job, tools: Tools) -> Any:
        job.note = "Reading the text."
        return tools.read(text, STRONGEST, latents)

    return work


def steering(asked: Steering) -> Work:
    """Lets base, tuned and steered model write, one after the other, token by token."""
    decoding = {name: getattr(asked, name) for name in ("max_new_tokens", "temperature", "seed", "chat")}

    def work(job: Job, tools: Tools) -> Any:
        turns: list[tuple[str, str, Sequence[str]]] = [(side, side, ()) for side in tools.sides]
        turns.append(("steered", asked.side, asked.changes))
        for name, side, changes in turns:
            job.note = f"The {name} model writes."
            job.texts[name] = ""
            job.texts[name] = tools.write(asked.prompt, side, changes, _noted(job, name), **decoding)
        return dict(job.texts)

    return work


def _noted(job: Job, name: str) -> Callable[[str], None]:
    def note(piece: str) -> None:
        job.check()
        job.texts[name] += piece

    return note


def command(model: str, dictionary: str, asked: Steering, tuned: str = "") -> str:
    """The same question on the command line; empty where nothing is changed, which that verb does not do."""
    if not asked.changes:
        return ""
    import shlex

    words = ["palimpsest", "steer", model, *([tuned] if tuned else []), "--dictionary", dictionary]
    # A prompt that begins with a dash would be taken for a flag.
    prompt = [f"--prompt={asked.prompt}"] if asked.prompt.startswith("-") else ["--prompt", asked.prompt]
    words += ["--side", asked.side, "--latent", *asked.changes, *prompt]
    words += ["--max-new-tokens", str(asked.max_new_tokens), "--seed", str(asked.seed)]
    words += ["--temperature", f"{asked.temperature:g}"] if asked.temperature else []
    words += ["--chat"] if asked.chat else []
    return shlex.join([*words, "--out", "steered"])
