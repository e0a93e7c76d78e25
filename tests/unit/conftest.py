"""Runs that several tests of the report merge."""

from __future__ import annotations

from pathlib import Path

import pytest

import audit_fixture as fixture
from latents_fixture import make_examples, make_labels
from palimpsest.report.parts import Run
from report_runs import all_runs


@pytest.fixture(scope="module")
def audits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("audits")
    parts = fixture.make_curve(), fixture.make_latents(6)
    judged = fixture.make_audit(calibrated=True)
    return {
        "plain": fixture.write_audit(root / "plain", fixture.make_audit(), *parts),
        "judged": fixture.write_audit(root / "judged", judged, *parts),
        "again": fixture.write_audit(root / "again", judged, *parts),
        "hostile": fixture.write_audit(root / "hostile", *fixture.make_hostile(calibrated=True)),
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    return all_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("examples")
    return {
        "examples": make_examples(root / "examples", 120, 12),
        "labels": make_labels(root / "labels", [0, 1, 2]),
    }
