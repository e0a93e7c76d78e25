"""What a provider of labels and a judge of them are: two small protocols, and the data that they see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from palimpsest.errors import PalimpsestError
from palimpsest.latents import Example


class ProviderError(PalimpsestError):
    """A provider gave no answer.

    Attributes:
        fatal: Whether asking about another latent is pointless, as with a key that is refused.
    """

    def __init__(self, problem: str, *, found: object | None = None, fatal: bool = False) -> None:
        super().__init__(problem, found=found)
        self.fatal = fatal


@dataclass(frozen=True)
class Text:
    """A window of text of which one token is in question.

    Attributes:
        tokens: The window.
        peak: Which of its tokens.
    """

    tokens: tuple[str, ...]
    peak: int


@dataclass(frozen=True)
class Evidence:
    """What a label is made from.

    Attributes:
        latent: Its number.
        examples: Where it fires, the strongest first; none of them is judged later.
        promoted: Tokens that its decoder row makes likelier, the strongest first.
        tokens: Tokens on which it fires beyond their frequency, the strongest first.
        tokens_z: By how much: z of the log-odds.
    """

    latent: int
    examples: tuple[Example, ...]
    promoted: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    tokens_z: tuple[float, ...] = ()


@runtime_checkable
class Labeller(Protocol):
    """Says in a few words what a latent stands for; may be asked from several threads."""

    def label(self, evidence: Evidence) -> str | None:
        """A short label, or None when there is none to be had.

        Raises:
            ProviderError: No answer; later there may be one.
        """
        ...


@runtime_checkable
class Judge(Protocol):
    """Says which texts a label fits; the same question gets the same answer."""

    def judge(self, label: str, texts: Sequence[Text]) -> list[bool | None]:
        """For each text whether the label fits its marked token; None where nothing usable was said.

        Raises:
            ProviderError: No answer; later there may be one.
        """
        ...
