"""Pair × corpus × sites → activations: streamed (`stream`), or kept in a store (`run`)."""

from typing import TYPE_CHECKING, Any

from palimpsest.harvest.config import HarvestConfig

if TYPE_CHECKING:
    from palimpsest.harvest.run import run_harvest
    from palimpsest.harvest.stream import Harvester, PairedTokens, activations

_HOMES = {"run_harvest": "run", "Harvester": "stream", "PairedTokens": "stream", "activations": "stream"}

__all__ = ["HarvestConfig", "Harvester", "PairedTokens", "activations", "run_harvest"]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _HOMES:
        return getattr(import_module(f"palimpsest.harvest.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
