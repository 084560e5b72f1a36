"""What tests of several verbs start from and look at."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest

from lightning_merge.checkpoints import reading
from tests.conftest import isolated
from tests.trainer.commands import fit


@pytest.fixture(scope="session")
def fitted(tmp_path_factory) -> Path:
    """The run folders of a base and of two experts that start from it, fitted once."""
    folder = tmp_path_factory.mktemp("fitted")
    with isolated(folder):
        fit("upright")
        for domain in ("rotated", "noisy"):
            fit(domain, "--model.weights=experts/upright")
    return folder / "experts"


@pytest.fixture
def experts(fitted) -> dict[str, str]:
    """A copy of the runs that a test may write to; the base is ``experts/upright``."""
    shutil.copytree(fitted, "experts")
    return {domain: f"experts/{domain}" for domain in ("rotated", "noisy")}


@pytest.fixture
def opened(monkeypatch):
    """How often each file was opened."""
    counts: Counter[str] = Counter()
    open_file = reading._from_file

    def count(name, path, part=None):
        counts[path.name] += 1
        return open_file(name, path, part)

    monkeypatch.setattr(reading, "_from_file", count)
    return counts
