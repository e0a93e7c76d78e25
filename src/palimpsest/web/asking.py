"""What a browser asks for, read with limits; and what a page answers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl

from palimpsest.web.refusals import PageError, TooLongError

MOST_FIELDS = 200
LONGEST_BODY = 256 * 1024
LONGEST_QUERY = 4_000
LONGEST_PATH = 400


@dataclass(frozen=True)
class Ask:
    """A request, after the door.

    Attributes:
        path: Where it went, without the query.
        places: Parts of the path by name.
        fields: Fields of the query, or of the form that was sent, in order.
        fragment: Whether the page's script wants only the part that changes.
    """

    path: str
    places: Mapping[str, str] = field(default_factory=dict)
    fields: tuple[tuple[str, str], ...] = ()
    fragment: bool = False

    def text(self, name: str, default: str = "", limit: int = 200) -> str:
        """A field as text; control characters other than line breaks are left out.

        Raises:
            TooLongError: It has more than `limit` characters.
        """
        value = next((text for key, text in self.fields if key == name), default)
        if len(value) > limit:
            raise TooLongError(
                f"The field '{name}' is too long",
                expected=f"at most {limit:,} characters",
                found=f"{len(value):,}",
            )
        # A browser sends line breaks of a form as two characters.
        return value.replace("\r\n", "\n").replace("\x00", "")

    def all(self, name: str) -> list[str]:
        """Every value of a field that may be given more than once."""
        return [text for key, text in self.fields if key == name]

    def number(
        self, name: str, default: float | None = None, *, low: float = -math.inf, high: float = math.inf
    ) -> float | None:
        """A field as a finite number; the default where it is empty.

        Raises:
            PageError: It is no number, or out of range.
        """
        text = self.text(name, limit=40).strip()
        if not text:
            return default
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not low <= value <= high:
            raise PageError(
                f"The field '{name}' holds no number that can be used here",
                expected=_range(low, high),
                found=text,
            )
        return value

    def whole(self, name: str, default: int, *, low: int = 0, high: int = 2**31 - 1) -> int:
        """A field as a whole number; the default where it is empty.

        Raises:
            PageError: It is no whole number, or out of range.
        """
        value = self.number(name, default, low=low, high=high)
        assert value is not None
        if value != int(value):
            raise PageError(f"The field '{name}' is no whole number", expected=_range(low, high), found=value)
        return int(value)

    def place(self, name: str) -> str:
        """A part of the path."""
        return self.places[name]

    def latent(self) -> int:
        """The latent that the path names.

        Raises:
            PageError: It is no number.
        """
        text = self.places["latent"]
        if not re.fullmatch(r"\d{1,9}", text):
            raise PageError("This address names no latent", expected="a whole number", found=text[:40])
        return int(text)


def read_fields(data: bytes) -> tuple[tuple[str, str], ...]:
    """Fields of a query or of a form as a browser encodes it.

    Raises:
        PageError: There are too many, or it is no such encoding.
    """
    try:
        found = parse_qsl(
            data.decode("ascii"), keep_blank_values=True, max_num_fields=MOST_FIELDS, errors="replace"
        )
    except ValueError as error:
        raise PageError(
            "The fields of this request cannot be read", expected=f"at most {MOST_FIELDS}", found=error
        ) from error
    return tuple(found)


@dataclass(frozen=True)
class Answer:
    """A page to draw, or an address to go on to.

    Attributes:
        template: Of the page or the fragment.
        context: What it is given.
        status: HTTP status.
        to: Address to go on to instead.
        charts: Whether the page draws charts, whose library writes styles of its own.
    """

    template: str = ""
    context: Mapping[str, Any] = field(default_factory=dict, repr=False)
    status: int = 200
    to: str = ""
    charts: bool = False


def _range(low: float, high: float) -> str:
    if math.isinf(low) and math.isinf(high):
        return "a finite number"
    return f"a number from {low:,g} to {high:,g}"
