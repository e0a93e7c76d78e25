"""The calibration: does a fine-tune change a corpus beyond what any innocent fine-tune of its drift changes.

`panel` holds what was measured through the suspect and its nulls, `statistic` the calibrated figures, `intervals`
their bootstrap, `grid` the maximum over sites and k, `verdicts` kinds and multiplicity, `sentences` the words and
`finding` puts them together. Numbers only: no models, no torch.
"""

from palimpsest.audit.calibration.finding import calibrate
from palimpsest.audit.calibration.panel import Level, Panel
from palimpsest.audit.calibration.statistic import nulls_needed
from palimpsest.audit.calibration.verdicts import kind_of, verdict_of

__all__ = ["Level", "Panel", "calibrate", "kind_of", "nulls_needed", "verdict_of"]
