"""Artifact folders: what stages write, read and meet through. Imports no torch."""

from palimpsest.artifacts.claim import check_claim
from palimpsest.artifacts.disk import file_sha256
from palimpsest.artifacts.reading import SCHEMA, Artifact, input_entry, open_artifact
from palimpsest.artifacts.writing import RunFolder

__all__ = ["SCHEMA", "Artifact", "RunFolder", "check_claim", "file_sha256", "input_entry", "open_artifact"]
