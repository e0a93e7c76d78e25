"""What latents mean and do: examples, logit lens, labels with their scores, steering."""

from typing import TYPE_CHECKING

from palimpsest.lazy import lazy_names

if TYPE_CHECKING:
    from palimpsest.interpret.examples import ExamplesConfig, run_examples
    from palimpsest.interpret.labels.config import LabelConfig
    from palimpsest.interpret.labels.run import run_label
    from palimpsest.interpret.steering.changes import Change
    from palimpsest.interpret.steering.config import SteerConfig
    from palimpsest.interpret.steering.run import run_steer
    from palimpsest.interpret.steering.steerer import Steerer
    from palimpsest.interpret.subject import open_subject
    from palimpsest.interpret.text_reading import read_text

_HOME = {
    "Change": "steering.changes",
    "ExamplesConfig": "examples",
    "LabelConfig": "labels.config",
    "SteerConfig": "steering.config",
    "Steerer": "steering.steerer",
    "open_subject": "subject",
    "read_text": "text_reading",
    "run_examples": "examples",
    "run_label": "labels.run",
    "run_steer": "steering.run",
}

__all__ = [
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
]

__getattr__ = lazy_names(__name__, _HOME)
