"""The benchmark of one process, which every engine is compared with."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_merge.evaluation.table import Table
from tests.conftest import isolated
from tests.evaluation.engines.toys import run


@pytest.fixture(scope="session")
def alone(tmp_path_factory) -> tuple[Path, Table]:
    """The folder that a benchmark without an engine has written, to be read only, and its table."""
    folder = tmp_path_factory.mktemp("alone")
    with isolated(folder):
        return folder / "out", run()
