"""Merged reports for browser tests: runs to make one of, and a page that remembers what it complained about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import audit_fixture as fixture
from latents_fixture import make_examples, make_labels
from report_runs import diff_data, diff_latents, make_run, poisoned

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]


def merged_paths(root: Path, hostile: bool = False) -> list[Path]:
    """Folders of an audit, a diff, examples and labels, which speak of the same latents but for the audit."""
    audit = fixture.make_hostile(calibrated=True) if hostile else (
        fixture.make_audit(calibrated=True), fixture.make_curve(), fixture.make_latents(8)
    )  # fmt: skip
    diff = {**diff_data(), "dictionary": {"path": "dictionary", "sha256": "0" * 64}}
    data = {**poisoned(diff), "latents": "latents.parquet"} if hostile else diff
    made = make_run(root / "diff", "diff", data, "diff.json", {"latents.parquet": diff_latents()})
    return [
        fixture.write_audit(root / "audit", *audit),
        made.path,
        make_examples(root / "examples", 80, 10, hostile=hostile),
        make_labels(root / "labels", list(range(8)), hostile=hostile),
    ]


class Opened:
    """A page of an offline browser, with everything that it complained about or asked for."""

    def __init__(
        self, browser: Any, path: Path, width: int = 1440, scheme: str = "light", where: str = ""
    ) -> None:
        context = browser.new_context(
            offline=True, color_scheme=scheme, viewport={"width": width, "height": 900}
        )
        self.page = context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri() + where)
        self.page.wait_for_selector("[data-chart]:not(.drawn)", state="detached")

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.page.context.close()
