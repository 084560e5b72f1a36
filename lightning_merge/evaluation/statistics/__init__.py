"""Collect the statistics of experts' data."""
