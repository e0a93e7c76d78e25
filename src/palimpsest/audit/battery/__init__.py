"""The battery: the fixed, named corpora that a base is audited with, and everything read from that base once.

`make` writes it, `folder` reads it, `presets` name published text, `check` proves that it still fits.
"""

from typing import TYPE_CHECKING

from palimpsest.audit.battery.config import BatteryConfig
from palimpsest.lazy import lazy_names

if TYPE_CHECKING:
    from palimpsest.audit.battery.folder import Battery
    from palimpsest.audit.battery.make import make_battery

__all__ = ["Battery", "BatteryConfig", "make_battery"]

__getattr__ = lazy_names(__name__, {"Battery": "folder", "make_battery": "make"})
