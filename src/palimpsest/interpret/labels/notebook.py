"""Everything that a provider answered, written down at once, so that nothing is asked twice."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from palimpsest.interpret.labels.scoring import Score


class Notebook:
    """A file of JSON lines; a context manager. A line that an interruption cut short counts for nothing.

    Args:
        path: The file; what an earlier run wrote is read.

    Attributes:
        labels: Label by latent; None where the provider has none.
        scores: Score by latent.
        controls: Score by control, latent and the latent whose label it was given.
    """

    def __init__(self, path: Path) -> None:
        self.labels: dict[int, str | None] = {}
        self.scores: dict[int, Score] = {}
        self.controls: dict[tuple[int, int, int], float | None] = {}
        whole = bytearray()
        if path.exists():
            for line in path.read_bytes().splitlines(keepends=True):
                if line.endswith(b"\n") and self._take(line):
                    whole += line
        self._file = path.open("wb")
        self._file.write(whole)
        self._file.flush()

    def __enter__(self) -> Notebook:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def label(self, latent: int, label: str | None) -> None:
        """Write a label down."""
        self.labels[latent] = label
        self._write({"latent": latent, "label": label})

    def score(self, latent: int, score: Score) -> None:
        """Write a score down."""
        self.scores[latent] = score
        self._write({"latent": latent, "score": score.to_dict()})

    def control(self, place: tuple[int, int, int], value: float | None) -> None:
        """Write the score of a wrong label down."""
        self.controls[place] = value
        self._write({"control": list(place), "value": value})

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()

    def _take(self, line: bytes) -> bool:
        try:
            record = json.loads(line)
            if "control" in record:
                run, latent, other = record["control"]
                self.controls[run, latent, other] = record["value"]
            elif "score" in record:
                self.scores[record["latent"]] = Score(**record["score"])
            else:
                self.labels[record["latent"]] = record["label"]
        except (ValueError, KeyError, TypeError):
            return False
        return True
