"""An audit as one HTML page that needs nothing but itself."""

import base64
import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from palimpsest.report import facts, tables, verdicts
from palimpsest.report.charts import chart_height, chart_specs, page_config, vega_script
from palimpsest.report.display import NOT_MEASURED, visible
from palimpsest.report.latent_panels import latent_panels
from palimpsest.report.null_charts import STRIPS, strip_text
from palimpsest.report.theme import DARK, FONT, LIGHT, css_variables

TEMPLATES = Path(__file__).parent / "templates"
LONGEST = 1000
"""Longest text that is printed whole: longer ones are accidents or attacks."""


def _finalize(value: Any) -> Any:
    """Every expression of every template passes here before it is escaped: nothing stays invisible."""
    if isinstance(value, Markup):
        return value
    return NOT_MEASURED if value is None else visible(value, LONGEST)


def _whole(value: Any) -> Any:
    """Text that must not be cut, such as the command; still visible and escaped."""
    return value if value is None else escape(visible(value))


@lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    environment.filters["inert_json"] = inert_json
    environment.filters["whole"] = _whole
    return environment


def inert_json(value: Any) -> Markup:
    """JSON that cannot end its script element: `<`, `>`, `&` and all non-ASCII characters are escaped."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for char in "<>&":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return Markup(text)


def _script(source: str) -> dict[str, Markup]:
    """A script that may stand inside a page, and the hash that lets it run there under the page's policy."""
    inner = "\n" + source.replace("</script", "<\\/script").replace("<!--", "<\\!--").strip() + "\n"
    digest = base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()
    return {"source": Markup(inner), "hash": Markup(f"'sha256-{digest}'")}


def _style(calibrated: bool) -> Markup:
    light, dark = css_variables(LIGHT), css_variables(DARK)
    variables = (
        f":root{{color-scheme:light dark;--font:{FONT};{light}}}\n"
        f"@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"
    )
    names = ["page.css", "tables.css", *(["verdicts.css"] if calibrated else [])]
    sheets = [(TEMPLATES / name).read_text("utf-8") for name in names]
    return Markup(variables + "\n".join(sheets))


def render(
    audit: dict[str, Any], curve: pa.Table, latents: pa.Table, *, manifest: dict[str, Any] | None = None
) -> str:
    """The whole page.

    Args:
        audit: The content of `audit.json`.
        curve: The table of `curve.parquet`.
        latents: The table of `latents.parquet`.
        manifest: The run's manifest, for the reproducibility notes; not needed.

    Returns:
        HTML of less than 5 MB with every script and style inside, whose own policy forbids any network use.
    """
    datasets = [(str(d.get("name")), str(d.get("role"))) for d in audit.get("datasets") or []]
    specs = chart_specs(audit, curve)
    calibrated = verdicts.calibration(audit)
    scripts = [_script(vega_script())] if specs else []
    scripts.append(_script((TEMPLATES / "page.js").read_text("utf-8")))
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            audit=dict.fromkeys(("summary", "site", "command", "layers_note")) | audit,
            pair=dict.fromkeys(("base", "tuned")) | (audit.get("pair") or {}),
            k=audit.get("k"),
            legacy=audit.get("mode") == "legacy",
            facts=facts.facts(audit),
            callouts=facts.callouts(audit),
            calibration=calibrated,
            strip_texts={
                name: strip_text(audit["calibration"], key)
                for name, (key, _) in STRIPS.items()
                if name in specs
            },
            tasks=tables.task_table(audit),
            datasets=tables.dataset_table(audit),
            curve=tables.curve_table(audit),
            controls=tables.control_table(audit),
            layers=tables.layer_table(audit),
            panels=latent_panels(latents, datasets),
            reproducibility=facts.reproducibility(audit, manifest or {}),
            specs=specs,
            heights={name: chart_height(name, audit) for name in specs},
            chart_data={"specs": specs, "config": page_config()},
            style=_style(calibrated is not None),
            scripts=scripts,
        )
    )
