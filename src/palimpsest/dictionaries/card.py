"""A dictionary and its codes in a notebook: what they are, never their weights or values."""

from __future__ import annotations

from typing import Any

from palimpsest.dictionaries.codes import Codes
from palimpsest.dictionaries.dictionary import Dictionary
from palimpsest.display.notebook import Card, Table

ORIGIN = ("model", "base", "tuned", "revision", "tokens", "neuronpedia", "repo")
FIGURES = ("metrics", "evaluation")
KINDS = {"diff": "Diff-SAE", "pair": "Crosscoder"}


def dictionary_card(dictionary: Dictionary) -> Card:
    """Its shape, where it comes from, and the figures that its metadata keep."""
    about = dictionary.describe()
    metadata = about.pop("metadata")
    figures = [
        (f"{name.replace('_', ' ')}{', held out' if group == 'evaluation' else ''}", value)
        for group in FIGURES
        for name, value in _pairs(metadata.get(group))
    ]
    return Card(
        KINDS.get(dictionary.view, "Sparse autoencoder"),
        f"of {dictionary.site}" if dictionary.site else "",
        facts={
            "latents": about.pop("n_latents"),
            **{name.replace("_", " "): value for name, value in about.items()},
            "on": str(dictionary.device),
            **{name: metadata.get(name) for name in ORIGIN},
        },
        tables=[Table(("figure", "value"), figures, "What its metadata say of it", folded=len(figures) > 8)],
        lists={
            "More metadata": [
                f"{name}: {value}"
                for name, value in metadata.items()
                if name not in (*ORIGIN, *FIGURES, "site") and value is not None
            ]
        },
    )


def _pairs(value: Any) -> list[tuple[str, Any]]:
    return list(value.items()) if isinstance(value, dict) else []


def codes_card(codes: Codes) -> Card:
    """Their shape; counting what is positive would read all of them."""
    entries = codes.values.shape[0]
    return Card(
        "Sparse codes",
        facts={
            "tokens": codes.tokens,
            "latents": codes.n_latents,
            "entries": entries,
            "entries per token": codes.width if codes.width is not None else entries / max(codes.tokens, 1),
            "dtype": str(codes.values.dtype).removeprefix("torch."),
            "on": str(codes.values.device),
            "input normalised": codes.norm is not None,
        },
    )
