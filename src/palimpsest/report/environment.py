"""One template set for the report and the app: how text is escaped, and which styles and scripts a page has."""

import base64
import hashlib
import json
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from palimpsest.report.display import NOT_MEASURED, visible
from palimpsest.report.theme import DARK, FONT, LIGHT, css_variables

TEMPLATES = Path(__file__).parent / "templates"
LONGEST = 1000
"""Longest text that is printed whole: longer ones are accidents or attacks."""

STYLES = ("page.css", "tables.css", "verdicts.css", "data.css", "sections.css", "latent.css")
"""Style sheets in the order in which they are read; those of a page are some of them."""

SCRIPTS = ("shell.js", "tabs.js", "tables.js", "latents.js", "charts.js")
"""Scripts in the order in which they run, each on its own; `charts.js` needs the chart library, see `charts`."""


def environment(*extra_template_folders: str | Path) -> Environment:
    """The templates, escaping everything that is put into them.

    Args:
        extra_template_folders: Searched before the report's own, so that pages of theirs can extend `shell.html.j2`.
    """
    made = Environment(
        loader=ChoiceLoader([FileSystemLoader(one) for one in (*extra_template_folders, TEMPLATES)]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    made.filters["inert_json"] = inert_json
    made.filters["whole"] = _whole
    return made


@lru_cache(maxsize=1)
def report_environment() -> Environment:
    """The report's own templates."""
    return environment()


def _finalize(value: Any) -> Any:
    """Every expression of every template passes here before it is escaped: nothing stays invisible."""
    if isinstance(value, Markup):
        return value
    return NOT_MEASURED if value is None else visible(value, LONGEST)


def _whole(value: Any) -> Any:
    """Text that must not be cut, such as the command; still visible and escaped."""
    return value if value is None else escape(visible(value))


def inert_json(value: Any) -> Markup:
    """JSON that cannot end its script element: `<`, `>`, `&` and all non-ASCII characters are escaped."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for char in "<>&":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return Markup(text)


def asset(name: str) -> str:
    """The source of a script or style sheet of `templates/`."""
    return (TEMPLATES / name).read_text("utf-8")


def style_sheet(names: Iterable[str] = STYLES) -> Markup:
    """The colours of both themes and some style sheets, as one sheet."""
    light, dark = css_variables(LIGHT), css_variables(DARK)
    variables = (
        f":root{{color-scheme:light dark;--font:{FONT};{light}}}\n"
        f"@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"
    )
    return Markup(variables + "\n".join(asset(name) for name in names))


def inline_script(source: str) -> dict[str, Markup]:
    """A script that may stand inside a page, and the hash that lets it run there under the page's policy."""
    inner = "\n" + source.replace("</script", "<\\/script").replace("<!--", "<\\!--").strip() + "\n"
    return {"source": Markup(inner), "hash": Markup(f"'sha256-{_digest(inner)}'")}


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def offline_policy(scripts: Iterable[dict[str, Markup]]) -> Markup:
    """The policy of a page that needs nothing but itself: these scripts run, nothing else does or is fetched."""
    hashes = " ".join(script["hash"] for script in scripts)
    return Markup(
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
        f"script-src {hashes}; base-uri 'none'; form-action 'none'"
    )
