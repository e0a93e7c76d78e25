"""What training data comes down to: token ids. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

IGNORED = -100
"""Label of a token that is not learned."""


@dataclass(frozen=True, slots=True)
class TextRow:
    """A text.

    Attributes:
        input_ids: Its tokens.
        labels: As long; the token itself where it is learned, else -100. The first has no prediction.
    """

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True, slots=True)
class PairRow:
    """A prompt with a preferred and a refused answer; none of the three is empty.

    Attributes:
        prompt: Its tokens, with the BOS where the model has one.
        chosen: Tokens of the preferred answer, with the end-of-text token where training adds one.
        rejected: Tokens of the refused answer.
    """

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


@dataclass(frozen=True, slots=True)
class KtoRow:
    """A prompt with one answer and a verdict on it.

    Attributes:
        prompt: Its tokens.
        answer: Tokens of the answer.
        label: Whether the answer is wanted.
    """

    prompt: list[int]
    answer: list[int]
    label: bool


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A prompt that the model answers itself.

    Attributes:
        prompt: Its tokens.
        text: The prompt as the reward function reads it.
        columns: What else the row holds, which the reward function may ask for.
    """

    prompt: list[int]
    text: object
    columns: dict[str, object]


def evenly(rows: Sequence[T], most: int) -> list[T]:
    """At most so many rows, evenly spaced over all of them and in their order."""
    n = min(most, len(rows))
    return [rows[(2 * place + 1) * len(rows) // (2 * n)] for place in range(n)]


Row = TextRow | PairRow | KtoRow | PromptRow
