"""Diagnostics of merged models: functions that return numbers."""
