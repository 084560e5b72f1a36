"""Measure merged models: many candidates in one pass, and the table of domains that were left out."""

from lightning_merge.evaluation.candidates import evaluate_candidates
from lightning_merge.evaluation.held_out import evaluate_domain
from lightning_merge.evaluation.search import greedy_soup_on_validation, search_coefficients
from lightning_merge.evaluation.table import Table

__all__ = ["Table", "evaluate_candidates", "evaluate_domain", "greedy_soup_on_validation", "search_coefficients"]
