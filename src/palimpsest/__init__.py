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
    from palimpsest.buffer import ShuffleBuffer
    from palimpsest.corpus import Corpus
    from palimpsest.dictionaries import (
        Dictionary,
        Objective,
        Partition,
        TrainConfig,
        convert_dictionary,
        load_dictionary,
        push_dictionary,
        read_header,
        save_saelens,
        train_dictionaries,
        train_dictionary,
    )
    from palimpsest.diff import Diff, DiffConfig, run_diff
    from palimpsest.errors import PalimpsestError
    from palimpsest.evaluate import EvaluateConfig, Evaluation, evaluate_dictionary, run_evaluate
    from palimpsest.findings import AuditFinding
    from palimpsest.harvest import HarvestConfig, Harvester, run_harvest
    from palimpsest.interpret import (
        Change,
        ExamplesConfig,
        LabelConfig,
        SteerConfig,
        Steerer,
        open_subject,
        read_text,
        run_examples,
        run_label,
        run_steer,
    )
    from palimpsest.latents import LatentIndex, Query
    from palimpsest.models import ModelPair, capture, load_model, load_pair, replace
    from palimpsest.options import CorpusOptions, ModelOptions, RunOptions
    from palimpsest.report import build_report
    from palimpsest.store import ActivationStore
    from palimpsest.train import (
        TrainingOptions,
        TrainPairConfig,
        TrainSaeConfig,
        train_pair,
        train_sae,
        train_variants,
    )
    from palimpsest.tune import (
        ExplainConfig,
        LatentConfig,
        TuneConfig,
        compare_adapters,
        export_adapter,
        run_explain,
        run_tune,
    )

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
    "buffer": ("ShuffleBuffer",),
    "corpus": ("Corpus",),
    "dictionaries": (
        "Dictionary",
        "Objective",
        "Partition",
        "TrainConfig",
        "convert_dictionary",
        "load_dictionary",
        "push_dictionary",
        "read_header",
        "save_saelens",
        "train_dictionaries",
        "train_dictionary",
    ),
    "diff": ("Diff", "DiffConfig", "run_diff"),
    "errors": ("PalimpsestError",),
    "evaluate": ("EvaluateConfig", "Evaluation", "evaluate_dictionary", "run_evaluate"),
    "findings": ("AuditFinding",),
    "harvest": ("HarvestConfig", "Harvester", "run_harvest"),
    "interpret": (
        "Change",
        "ExamplesConfig",
        "LabelConfig",
        "SteerConfig",
        "Steerer",
        "open_subject",
        "read_text",
        "run_examples",
        "run_label",
        "run_steer",
    ),
    "latents": ("LatentIndex", "Query"),
    "models": ("ModelPair", "capture", "load_model", "load_pair", "replace"),
    "options": ("CorpusOptions", "ModelOptions", "RunOptions"),
    "report": ("build_report",),
    "store": ("ActivationStore",),
    "train": (
        "TrainPairConfig",
        "TrainSaeConfig",
        "TrainingOptions",
        "train_pair",
        "train_sae",
        "train_variants",
    ),
    "tune": (
        "ExplainConfig",
        "LatentConfig",
        "TuneConfig",
        "compare_adapters",
        "export_adapter",
        "run_explain",
        "run_tune",
    ),
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
    "Change",
    "Corpus",
    "CorpusOptions",
    "Dictionary",
    "Diff",
    "DiffConfig",
    "EvaluateConfig",
    "Evaluation",
    "ExamplesConfig",
    "ExplainConfig",
    "HarvestConfig",
    "Harvester",
    "LabelConfig",
    "LatentConfig",
    "LatentIndex",
    "ModelOptions",
    "ModelPair",
    "Objective",
    "PalimpsestError",
    "Partition",
    "Query",
    "RunOptions",
    "ShuffleBuffer",
    "SteerConfig",
    "Steerer",
    "TrainConfig",
    "TrainPairConfig",
    "TrainSaeConfig",
    "TrainingOptions",
    "TuneConfig",
    "build_report",
    "calibrate_battery",
    "capture",
    "compare_adapters",
    "convert_dictionary",
    "evaluate_dictionary",
    "export_adapter",
    "load_dictionary",
    "load_model",
    "load_pair",
    "make_battery",
    "open_artifact",
    "open_subject",
    "push_dictionary",
    "read_header",
    "read_text",
    "replace",
    "run_audit",
    "run_diff",
    "run_evaluate",
    "run_examples",
    "run_explain",
    "run_harvest",
    "run_label",
    "run_steer",
    "run_tune",
    "save_saelens",
    "train_dictionaries",
    "train_dictionary",
    "train_pair",
    "train_sae",
    "train_variants",
]

__getattr__ = lazy_names(__name__, _HOME)
