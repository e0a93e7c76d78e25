"""Sections and sources by hand, and what tests look for on a page."""

from __future__ import annotations

import re
from typing import Any

import audit_fixture as fixture
from palimpsest.report.page import Source
from palimpsest.report.parts import Section
from palimpsest.report.reproduce import Recipe

HIDDEN = re.compile("[\u202a-\u202e\u2066-\u2069\u200b-\u200f\u2028\u2029\x00-\x08\x0b-\x1f\x7f]")


def anchors(html: str) -> tuple[list[str], list[str]]:
    page = fixture.Page(html)
    ids = [value for _, name, value in page.attributes if name == "id"]
    links = [value[1:] for _, name, value in page.attributes if name == "href" and value.startswith("#")]
    return ids, links


def section(**changes: Any) -> Section:
    return Section(**{"id": "one", "title": "One", "order": "evidence", "run": "run", **changes})


def source(name: str = "run", stage: str = "diff") -> Source:
    return Source(
        name, stage, ("base/", "tuned/"), "resid_post.1", Recipe(name, stage, "palimpsest diff", [])
    )
