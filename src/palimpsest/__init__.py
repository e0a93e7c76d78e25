"""Palimpsest: what a fine-tune wrote over its base model.

    >>> from palimpsest import AuditConfig, RunOptions, run_audit
    >>> run = run_audit(  # doctest: +SKIP
    ...     AuditConfig(
    ...         "base/", "math/", dictionary="dict/", general="general.jsonl", task=("math=math.jsonl",),
    ...         run=RunOptions(out="audit/"),
    ...     )
    ... )
    >>> run.read_json("audit.json")["tasks"][0]["idr"]  # doctest: +SKIP

Names are imported when they are first used, so that importing the package costs nothing.
"""

from typing import TYPE_CHECKING

from palimpsest.lazy import lazy_names

if TYPE_CHECKING:
    from palimpsest.artifacts import Artifact, open_artifact
    from palimpsest.audit import (
        AuditConfig,
        Battery,
        BatteryConfig,
        CalibrateConfig,
        CalibrationOptions,
        calibrate_battery,
        make_battery,
        run_audit,
    )
    from palimpsest.corpus import Corpus
    from palimpsest.dictionaries import (
        Dictionary,
        TrainConfig,
        load_dictionary,
        save_saelens,
        train_dictionary,
    )
    from palimpsest.errors import PalimpsestError
    from palimpsest.findings import AuditFinding
    from palimpsest.harvest import HarvestConfig, Harvester, run_harvest
    from palimpsest.models import ModelPair, capture, load_model, load_pair, replace
    from palimpsest.options import CorpusOptions, ModelOptions, RunOptions
    from palimpsest.report import build_report
    from palimpsest.store import ActivationStore
    from palimpsest.train import TrainSaeConfig, train_sae

_HOMES = {
    "artifacts": ("Artifact", "open_artifact"),
    "audit": (
        "AuditConfig",
        "Battery",
        "BatteryConfig",
        "CalibrateConfig",
        "CalibrationOptions",
        "calibrate_battery",
        "make_battery",
        "run_audit",
    ),
    "corpus": ("Corpus",),
    "dictionaries": ("Dictionary", "TrainConfig", "load_dictionary", "save_saelens", "train_dictionary"),
    "errors": ("PalimpsestError",),
    "findings": ("AuditFinding",),
    "harvest": ("HarvestConfig", "Harvester", "run_harvest"),
    "models": ("ModelPair", "capture", "load_model", "load_pair", "replace"),
    "options": ("CorpusOptions", "ModelOptions", "RunOptions"),
    "report": ("build_report",),
    "store": ("ActivationStore",),
    "train": ("TrainSaeConfig", "train_sae"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "ActivationStore",
    "Artifact",
    "AuditConfig",
    "AuditFinding",
    "Battery",
    "BatteryConfig",
    "CalibrateConfig",
    "CalibrationOptions",
    "Corpus",
    "CorpusOptions",
    "Dictionary",
    "HarvestConfig",
    "Harvester",
    "ModelOptions",
    "ModelPair",
    "PalimpsestError",
    "RunOptions",
    "TrainConfig",
    "TrainSaeConfig",
    "run_audit",
    "build_report",
    "calibrate_battery",
    "capture",
    "run_harvest",
    "load_dictionary",
    "load_model",
    "load_pair",
    "make_battery",
    "open_artifact",
    "replace",
    "save_saelens",
    "train_dictionary",
    "train_sae",
]

__getattr__ = lazy_names(__name__, _HOME)
