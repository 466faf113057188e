"""What became of a model, on one page: pictures, tables and their data."""

from quantize.report.collect import collect
from quantize.report.html import render, write, write_page, write_report
from quantize.report.model import Report, as_json

__all__ = ["Report", "as_json", "collect", "render", "write", "write_page", "write_report"]
