"""What tests of several verbs look at."""

from __future__ import annotations

from collections import Counter

import pytest

from lightning_merge.checkpoints import reading


@pytest.fixture
def opened(monkeypatch):
    """How often each file was opened."""
    counts: Counter[str] = Counter()
    open_file = reading._from_file

    def count(name, path):
        counts[path.name] += 1
        return open_file(name, path)

    monkeypatch.setattr(reading, "_from_file", count)
    return counts
