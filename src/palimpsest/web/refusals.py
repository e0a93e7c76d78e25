"""What the app answers instead of a page: each says what was asked for, and why it is not given."""

from __future__ import annotations

from palimpsest.errors import PalimpsestError


class PageError(PalimpsestError):
    """A request that gets a page with an explanation instead of what it asked for.

    Attributes:
        status: Of the answer.
    """

    status = 400


class NoPageError(PageError):
    """There is no such page, run or latent."""

    status = 404


class GoneError(PageError):
    """It was here and is no longer: a run was deleted, replaced or damaged while it was shown."""

    status = 410


class BusyError(PageError):
    """The one model has more to do than it takes."""

    status = 503


class TooLongError(PageError):
    """More was sent than the app reads."""

    status = 413
