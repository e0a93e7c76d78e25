"""A small corpus of documents of very different lengths."""

from __future__ import annotations

import json
from pathlib import Path

LENGTHS = (60, 7, 33, 1, 90, 18, 150, 4, 41, 75)
WORDS = [
    "the",
    "river",
    "runs",
    "past",
    "a",
    "mill",
    "and",
    "12",
    "sacks",
    "of",
    "flour",
    "weigh",
    "30",
    "stone",
]


def write_words(path: Path) -> Path:
    """Ten documents as JSONL, one with two special tokens in its midst; returns the path."""
    with path.open("w", encoding="utf-8") as file:
        for index, length in enumerate(LENGTHS):
            body = " ".join(WORDS[(index + 3 * place) % len(WORDS)] for place in range(length))
            file.write(json.dumps({"text": body + (" </s> and <s> more" if index == 2 else "")}) + "\n")
    return path
