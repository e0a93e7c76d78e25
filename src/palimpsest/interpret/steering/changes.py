"""What steering does to a latent: `123:scale=4`, `17:ablate`, `5:add=3`, `9:clamp=10`. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from palimpsest.errors import ConfigError

Mode = Literal["add", "scale", "clamp", "ablate"]
MODES: tuple[Mode, ...] = get_args(Mode)
LARGEST = 1e38
"""What activations are computed in, float32, ends there."""
FORM = "LATENT:add=V, LATENT:scale=V, LATENT:clamp=V or LATENT:ablate, as in 123:scale=4"

_WRITTEN = re.compile(r"\s*([0-9]{1,18})\s*:\s*([A-Za-z]+)\s*(?:=\s*(\S+))?\s*")


@dataclass(frozen=True)
class Change:
    """One change of one latent, whose activation on a token is z.

    Attributes:
        latent: Which.
        mode: add: z + value at every edited token, whether the latent fires there or not; scale: value · z, which
            does nothing where it is silent; clamp: z becomes value at every edited token; ablate: z becomes 0.
        value: In units of activations (a factor for scale); None for ablate.
    """

    latent: int
    mode: Mode
    value: int | float | None = None

    def __post_init__(self) -> None:
        """Refuse what is no change.

        Raises:
            ConfigError: It is none.
        """
        whole = isinstance(self.latent, int) and not isinstance(self.latent, bool)
        if not whole or self.latent < 0:
            raise ConfigError("A latent is a whole number from 0 on", expected=FORM, found=self.latent)
        if self.mode not in MODES:
            raise ConfigError(f"There is no change '{self.mode}'", expected=", ".join(MODES))
        if self.mode == "ablate":
            if self.value is not None:
                raise ConfigError(
                    f"ablate takes no value (latent {self.latent})",
                    expected=f"{self.latent}:ablate",
                    found=self.value,
                    fix=f"To set the latent to a value, write {self.latent}:clamp={self.value}",
                )
        elif isinstance(self.value, bool) or not isinstance(self.value, int | float):
            raise ConfigError(
                f"{self.mode} needs a value (latent {self.latent})", expected=FORM, found=self.value
            )
        elif not abs(self.value) <= LARGEST:
            raise ConfigError(
                f"The value of latent {self.latent} is no number that a model could add",
                expected=f"a number from -{LARGEST:g} to {LARGEST:g}",
                found=f"{self.value}"[:80] if isinstance(self.value, float) else "a whole number beyond that",
            )

    @classmethod
    def parse(cls, text: str) -> Change:
        """The change that a text such as `123:scale=4` stands for.

        Raises:
            ConfigError: It stands for none.
        """
        match = _WRITTEN.fullmatch(text)
        if match is None:
            raise ConfigError(f"'{text}' is no change of a latent", expected=FORM)
        latent, mode, value = match.groups()
        names: dict[str, Mode] = {one: one for one in MODES}
        known = names.get(mode.lower())
        if known is None:
            raise ConfigError(f"There is no change '{mode}'", expected=FORM, found=text)
        try:
            number = None if value is None else float(value)
        except ValueError as error:
            raise ConfigError(f"'{value}' in '{text}' is no number", expected=FORM) from error
        return cls(int(latent), known, number)

    def __str__(self) -> str:
        """As `parse` reads it."""
        value = "" if self.value is None else f"={self.value:.12g}"
        return f"{self.latent}:{self.mode}{value}"

    def at(self, strength: int | float) -> Change:
        """The same change at another strength, 1 being its own.

        add v → v·s, scale v → 1 + (v - 1)·s, ablate → scale 1 - s, clamp v → v·s. Strength 0 changes nothing, except
        for clamp, which then sets the latent to 0.
        """
        if strength == 1:
            return self
        if self.mode == "ablate":
            return Change(self.latent, "scale", 1 - strength)
        assert self.value is not None
        if self.mode == "scale":
            return Change(self.latent, "scale", 1 + (self.value - 1) * strength)
        return Change(self.latent, self.mode, self.value * strength)

    def on(self, latent: int) -> Change:
        """The same change of another latent."""
        return Change(latent, self.mode, self.value)

    @property
    def factor(self) -> float:
        """What z is multiplied with, before `constant` is added."""
        if self.mode == "scale":
            assert self.value is not None
            return float(self.value)
        return 1.0 if self.mode == "add" else 0.0

    @property
    def constant(self) -> float:
        """What is added at every edited token."""
        return float(self.value or 0) if self.mode in ("add", "clamp") else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"latent": self.latent, "mode": self.mode, "value": self.value}


def read_changes(
    changes: Change | str | Iterable[Change | str], n_latents: int | None = None
) -> tuple[Change, ...]:
    """Changes as given, parsed where they are text, and checked against each other.

    Args:
        changes: One or several.
        n_latents: How many latents the dictionary has, where it is known.

    Raises:
        ConfigError: One is none, two speak of one latent, or there is no such latent.
    """
    several: Sequence[Change | str] = [changes] if isinstance(changes, Change | str) else list(changes)
    found = tuple(Change.parse(one) if isinstance(one, str) else one for one in several)
    latents = [one.latent for one in found]
    twice = next((one for one in latents if latents.count(one) > 1), None)
    if twice is not None:
        clashing = ", ".join(str(one) for one in found if one.latent == twice)
        raise ConfigError(
            f"Latent {twice} is changed twice",
            expected="one change for each latent",
            found=clashing,
            fix="A clamp sets z whatever it was; an add and a scale of one latent need two nested contexts",
        )
    if n_latents is not None and (beyond := [one for one in latents if one >= n_latents]):
        raise ConfigError(
            f"The dictionary has no latent {beyond[0]}", expected=f"0 to {n_latents - 1}", found=beyond[0]
        )
    return found


__all__ = ["FORM", "MODES", "Change", "Mode", "read_changes"]
