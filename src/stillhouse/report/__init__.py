"""The run's account for people: one offline HTML page with numbers, charts and texts."""

from stillhouse.report.data import ReportData, ScratchCost, StageCost
from stillhouse.report.write import render_report, write_report

__all__ = ["ReportData", "ScratchCost", "StageCost", "render_report", "write_report"]
