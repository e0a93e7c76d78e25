"""Packages of others that are held against ours; what cannot be imported is skipped."""

from __future__ import annotations

import importlib
import sys
import types
import warnings

import pytest


def dictionary_learning(*modules: str) -> list[types.ModuleType]:
    """Modules of the package; its first line imports nnsight, which no dictionary needs."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if "nnsight" not in sys.modules:
            stub = types.ModuleType("nnsight")
            stub.LanguageModel = object
            patch.setitem(sys.modules, "nnsight", stub)
        try:
            return [importlib.import_module(f"dictionary_learning.{name}") for name in modules]
        except ImportError as error:
            pytest.skip(f"dictionary_learning cannot be imported: {error}")


def sae_lens() -> types.ModuleType:
    """The package."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module("sae_lens")
        except ImportError as error:
            pytest.skip(f"sae-lens cannot be imported: {error}")
