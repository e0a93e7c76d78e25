"""The audit: which domains a fine-tune changed, how much, in which latents, and whether that is more than innocent.

`overlap` compares top-k lists, `sums` folds a stream of paired tokens, `estimate` makes intervals, `latent_table` and
`results` write findings, `run` is the stage. `battery` fixes text and caches its base side, `nulls` trains innocent
fine-tunes, `calibration` holds a suspect against them, `verdict` joins the two. Importing this package costs no torch.
"""

from typing import TYPE_CHECKING

from palimpsest.audit.battery.config import BatteryConfig
from palimpsest.audit.config import AuditConfig, CalibrationOptions
from palimpsest.audit.nulls.config import CalibrateConfig
from palimpsest.lazy import lazy_names

if TYPE_CHECKING:
    from palimpsest.audit.battery.folder import Battery
    from palimpsest.audit.battery.make import make_battery
    from palimpsest.audit.nulls.calibrate import calibrate_battery
    from palimpsest.audit.run import run_audit

__all__ = [
    "AuditConfig",
    "Battery",
    "BatteryConfig",
    "CalibrateConfig",
    "CalibrationOptions",
    "calibrate_battery",
    "make_battery",
    "run_audit",
]

__getattr__ = lazy_names(
    __name__,
    {
        "Battery": "battery.folder",
        "calibrate_battery": "nulls.calibrate",
        "make_battery": "battery.make",
        "run_audit": "run",
    },
)
