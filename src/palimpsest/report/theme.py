"""One set of colours for the page, the charts and the PNGs: base is blue, tuned is orange, everywhere."""

from collections.abc import Callable
from typing import Any

LIGHT = {
    "surface": "#ffffff",
    "raised": "#f6f7f9",
    "ink": "#1b1f24",
    "muted": "#57606a",
    "line": "#d5dae0",
    "base": "#0a66a8",
    "tuned": "#bd4508",
    "base-wash": "#d9ebfa",
    "tuned-wash": "#feece0",
    "warn": "#7a5200",
    "warn-wash": "#fff4d6",
    "series-0": "#3d444d",
    "series-1": "#117a55",
    "series-2": "#9b3a86",
    "series-3": "#857000",
    "series-4": "#6b4e3d",
}
DARK = {
    "surface": "#14171b",
    "raised": "#1c2026",
    "ink": "#e8ebef",
    "muted": "#a2abb6",
    "line": "#39414b",
    "base": "#6cb6f5",
    "tuned": "#f79a57",
    "base-wash": "#16364f",
    "tuned-wash": "#53301a",
    "warn": "#f2cc6b",
    "warn-wash": "#3a2f12",
    "series-0": "#c9d1d9",
    "series-1": "#4cc79a",
    "series-2": "#e08ccb",
    "series-3": "#e3cf57",
    "series-4": "#c9a58b",
}
SERIES = 5
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


def css_variables(colours: dict[str, str]) -> str:
    """Custom properties for a style sheet, such as `--base:#0a66a8;`."""
    return "".join(f"--{name}:{value};" for name, value in colours.items())


def css_colour(name: str) -> str:
    """A colour that follows the page's theme by itself, on screen and on paper."""
    return f"var(--{name})"


def vega_config(colour: Callable[[str], str], font: str = FONT) -> dict[str, Any]:
    """Vega-Lite configuration.

    Args:
        colour: Turns a colour's name into a value: `css_colour` for the page, a look-up in `LIGHT` for PNGs.
        font: Font family of all text.
    """
    category = [colour(f"series-{i}") for i in range(SERIES)]
    return {
        "background": "transparent" if colour is css_colour else colour("surface"),
        "font": font,
        "view": {"stroke": None},
        "range": {"category": category},
        "axis": {
            "labelColor": colour("muted"),
            "titleColor": colour("muted"),
            "labelFontSize": 12,
            "titleFontSize": 12,
            "titleFontWeight": "normal",
            "gridColor": colour("line"),
            "domainColor": colour("line"),
            "tickColor": colour("line"),
            "gridOpacity": 0.7,
            "labelLimit": 120,
        },
        "legend": {
            "labelColor": colour("ink"),
            "titleColor": colour("muted"),
            "titleFontWeight": "normal",
            "labelFontSize": 12,
            "symbolStrokeWidth": 2.5,
            "symbolSize": 300,
            "labelLimit": 150,
        },
        "title": {"color": colour("ink"), "fontSize": 13, "anchor": "start", "fontWeight": 600},
        "style": {
            "estimate": {"color": colour("ink")},
            "interval": {"color": colour("ink")},
            "zero": {"color": colour("muted")},
            "undetectable": {"color": colour("muted")},
            "primary": {"color": colour("muted")},
            "primary-label": {"color": colour("muted"), "fontSize": 11},
            "weight": {"color": colour("tuned")},
            "band": {"color": colour("muted")},
            "suspect": {"color": colour("tuned")},
            "base": {"color": colour("base")},
            "tuned": {"color": colour("tuned")},
            "faint": {"color": colour("line")},
            "label": {"color": colour("ink"), "fontSize": 11},
            "label-quiet": {"color": colour("muted"), "fontSize": 11},
            **{f"series-{i}": {"color": category[i]} for i in range(SERIES)},
        },
    }
