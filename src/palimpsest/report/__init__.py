"""The report: one self-contained page of one run or of many. Reads artifacts only; imports no torch."""

from palimpsest.report.build import build_report
from palimpsest.report.charts import chart_png
from palimpsest.report.page import render

__all__ = ["build_report", "chart_png", "render"]
