"""Pair × corpus × sites → activations: streamed (`stream`), or kept in a store (`run`)."""

from typing import TYPE_CHECKING

from palimpsest.harvest.config import HarvestConfig
from palimpsest.lazy import lazy_names

if TYPE_CHECKING:
    from palimpsest.harvest.run import run_harvest
    from palimpsest.harvest.stream import Harvester, PairedTokens, activations
    from palimpsest.harvest.verify import check_store

__all__ = ["HarvestConfig", "Harvester", "PairedTokens", "activations", "check_store", "run_harvest"]

__getattr__ = lazy_names(
    __name__,
    {
        "run_harvest": "run",
        "Harvester": "stream",
        "PairedTokens": "stream",
        "activations": "stream",
        "check_store": "verify",
    },
)
