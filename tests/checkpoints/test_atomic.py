"""Folders that take the place of others at once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lightning_merge.checkpoints import atomic, swap


def folder(name: str, content: str) -> Path:
    path = Path(name)
    path.mkdir()
    (path / "file").write_text(content)
    return path


@pytest.mark.parametrize("in_one_step", [True, False])
def test_a_folder_takes_the_place_of_another(in_one_step, monkeypatch):
    if not in_one_step:
        monkeypatch.setattr(atomic, "_exchange_names", lambda one, other: False)
    swap(folder("new", "new"), folder("old", "old"))
    assert Path("old/file").read_text() == "new"
    assert os.listdir() == ["old"]


def test_linux_does_it_in_one_step():
    new, old = folder("new", "new"), folder("old", "old")
    if not atomic._exchange_names(new, old):
        pytest.skip("this system has no renameat2")
    assert (Path("old/file").read_text(), Path("new/file").read_text()) == ("new", "old")


def test_the_old_folder_comes_back_where_the_new_one_cannot_be_moved(monkeypatch):
    rename = Path.rename

    def fail(path, target):
        if path.name == "new":
            raise OSError("disk is gone")
        return rename(path, target)

    monkeypatch.setattr(atomic, "_exchange_names", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="disk is gone"):
        swap(folder("new", "new"), folder("old", "old"))
    assert Path("old/file").read_text() == "old"
    assert sorted(os.listdir()) == ["new", "old"]
