"""Evaluate merged models next to the model that is being evaluated."""
