"""What every test may rely on: a folder of its own, one thread, and no trace of the tests before it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parent.parent


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two processes share the whole suite out; tests that are named run in this one, which starts sooner."""
    return 2 if config.args == config.getini("testpaths") else 0


@contextmanager
def isolated(folder: Path) -> Iterator[None]:
    """Run in a folder and undo what Lightning leaves in the environment and in the process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.argv", ["lightning-merge"])
        before = dict(os.environ)
        torch.manual_seed(0)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            os.environ.clear()
            os.environ.update(before)
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def _isolated(tmp_path: Path) -> Iterator[None]:
    """Every test has an empty folder; a fixture that several tests share has ``isolated`` to itself."""
    with isolated(tmp_path):
        yield
