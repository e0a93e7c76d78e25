"""From an audit's folder to its `report.html`."""

from pathlib import Path

from palimpsest.artifacts import Artifact, open_artifact
from palimpsest.artifacts.disk import write_bytes
from palimpsest.errors import ArtifactError
from palimpsest.log import log
from palimpsest.report.page import render

REPORT = "report.html"


def build_report(run: str | Path, out: str | Path | None = None) -> Path:
    """Write the one-file report of an audit.

    Args:
        run: The audit's folder; it may still be unfinished as long as its results are written.
        out: Where the page goes: a file, or an existing folder. Default: `report.html` in the audit's folder.

    Returns:
        The path of the page.

    Raises:
        ArtifactError: The folder is no audit, was edited or lacks its results, or the page cannot be written.
    """
    artifact = open_artifact(run, stage="audit", allow_running=True)
    audit = artifact.read_json("audit.json")
    if not isinstance(audit, dict):
        raise ArtifactError(
            f"{artifact.path / 'audit.json'} is no audit", expected="an object", found=type(audit).__name__
        )
    curve = artifact.read_table(audit.get("curve") or "curve.parquet")
    latents = artifact.read_table(audit.get("latents") or "latents.parquet")
    page = render(audit, curve, latents, manifest=artifact.manifest).encode()
    path = _write(artifact, page, out)
    log.info("wrote %s (%.1f MB)", path, len(page) / 1e6)
    return path


def _write(artifact: Artifact, page: bytes, out: str | Path | None) -> Path:
    inside = artifact.path / REPORT
    target = inside if out is None else Path(out)
    if target.is_dir():
        target = target / REPORT
    if target.absolute() != inside.absolute() or artifact.status != "complete":
        write_bytes(target, page)
        return target
    if REPORT not in artifact.files:
        return artifact.attach(REPORT, page)
    if inside.read_bytes() != page:
        raise ArtifactError(
            f"{inside} is part of the finished run and is not replaced",
            fix="Pass --out to write the new page elsewhere",
        )
    return inside
