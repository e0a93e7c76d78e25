"""What every latent fires on, collected in one pass over the text."""

from typing import TYPE_CHECKING

from palimpsest.interpret.examples.config import ExamplesConfig
from palimpsest.lazy import lazy_names

if TYPE_CHECKING:
    from palimpsest.interpret.examples.run import run_examples

__all__ = ["ExamplesConfig", "run_examples"]

__getattr__ = lazy_names(__name__, {"run_examples": "run"})
