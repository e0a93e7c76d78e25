"""A chart of the page as a specification that the page draws, and as PNG and SVG pictures made without a browser."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import vl_convert

from palimpsest.report.parts import Chart
from palimpsest.report.theme import LIGHT, css_colour, vega_config

Spec = dict[str, Any]
WIDTH = 720
"""Of a picture's plot, in CSS pixels."""
_FONT = "sans-serif"


@lru_cache(maxsize=1)
def vega_script() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script without outside dependencies (about 0.9 MB)."""
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")


def page_config() -> Spec:
    """The charts' configuration on the page, where colours follow the page's theme."""
    return vega_config(css_colour)


def page_spec(chart: Chart) -> Spec:
    """The chart for the page: as wide as its place, coloured by the page."""
    spec = _sized(chart, "container")
    # Altair's default theme names colours and a schema address; the page brings its own.
    return {key: part for key, part in spec.items() if key not in ("config", "$schema")}


def chart_pictures(chart: Chart, scale: float = 2.0) -> dict[str, bytes]:
    """The chart on white, by file ending: `png` and `svg`.

    Args:
        chart: What is drawn.
        scale: Pixels of the PNG per CSS pixel.
    """
    spec = _sized(chart, WIDTH if chart.wide else WIDTH * 2 // 3)
    spec["config"] = {**vega_config(LIGHT.__getitem__, _FONT), "padding": 12}
    spec["title"] = {"text": chart.title, "offset": 12}
    png = vl_convert.vegalite_to_png(spec, scale=scale, allowed_base_urls=[])
    return {"png": png, "svg": vl_convert.vegalite_to_svg(spec, allowed_base_urls=[]).encode()}


def _sized(chart: Chart, width: int | str) -> Spec:
    # Charts of several plots have sizes of their own.
    single = type(chart.chart).__name__ in ("Chart", "LayerChart")
    drawn = chart.chart.properties(width=width, height=chart.height) if single else chart.chart
    return drawn.to_dict(validate=False)
