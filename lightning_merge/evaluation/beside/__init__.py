"""Evaluate other weights within the evaluation of a model, by its own steps, hooks and metrics."""
