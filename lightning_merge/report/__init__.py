"""The output that people look at: tables, plots, a report in one HTML file, a model card."""

from lightning_merge.report.html import render, write_page
from lightning_merge.report.page import Listing, Page, Picture, Section
from lightning_merge.utilities.grid import Cell, Grid

__all__ = ["Cell", "Grid", "Listing", "Page", "Picture", "Section", "render", "write_page"]
