"""Files that take their place at once, with the rights of what stood there."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch

from lightning_merge.checkpoints import replacing, save_weights, write_text
from lightning_merge.checkpoints.atomic import exchange_names
from lightning_merge.checkpoints.private_folder import make_private
from lightning_merge.utilities.errors import MergeError

posix = pytest.mark.skipif(os.name != "posix", reason="modes and links of POSIX")


def mode(path: str) -> int:
    return stat.S_IMODE(Path(path).stat().st_mode)


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


def test_linux_exchanges_two_names_in_one_step():
    for name in ("new", "old"):
        Path(name).mkdir()
        Path(name, "file").write_text(name)
    if not exchange_names(Path("new"), Path("old")):
        pytest.skip("this system has no renameat2")
    assert (Path("old/file").read_text(), Path("new/file").read_text()) == ("new", "old")


@posix
def test_a_new_file_gets_the_mode_that_the_umask_allows(umask):
    write_text(Path("notes.md"), "new")
    for suffix in ("ckpt", "pt", "safetensors"):
        save_weights(f"w.{suffix}", {"a": torch.ones(2)})
        assert mode(f"w.{suffix}") == 0o640
    assert mode("notes.md") == 0o640


@posix
@pytest.mark.parametrize("before", [0o600, 0o664, 0o444])
def test_the_mode_of_a_replaced_file_is_kept(before):
    for name in ("notes.md", "w.pt", "w.safetensors"):
        Path(name).write_text("old")
        Path(name).chmod(before)
    write_text(Path("notes.md"), "new")
    save_weights("w.pt", {"a": torch.ones(2)})
    save_weights("w.safetensors", {"a": torch.ones(2)})
    assert [mode(name) for name in ("notes.md", "w.pt", "w.safetensors")] == [before] * 3
    assert Path("notes.md").read_text() == "new"


@posix
def test_while_it_is_written_nobody_else_can_reach_it_or_foresee_its_name():
    names = []
    for _ in range(2):
        with replacing(Path("a.txt")) as file:
            file.write_text("x")
            assert mode(str(file.parent)) == 0o700
            names.append(file.parent.name)
    assert names[0] != names[1]
    assert os.listdir() == ["a.txt"]


def test_what_a_killed_process_has_left_goes_away_and_what_only_looks_like_it_stays():
    left = make_private(Path("a.txt"))
    (left / "a.txt").write_text("half")
    Path(".a.txt.0123456789abcdef.part").mkdir()
    Path(".a.txt.0123456789abcdef.part/thesis.tex").write_text("precious")
    other = make_private(Path("other.txt"))
    write_text(Path("a.txt"), "whole")
    assert sorted(os.listdir()) == sorted([".a.txt.0123456789abcdef.part", other.name, "a.txt"])
    assert Path(".a.txt.0123456789abcdef.part/thesis.tex").read_text() == "precious"


@posix
def test_a_planted_folder_is_not_entered_through_a_link():
    Path("mine").mkdir()
    Path("mine/begun").touch()
    Path("mine/file").write_text("precious")
    Path(".a.txt.0123456789abcdef.part").symlink_to("mine")
    write_text(Path("a.txt"), "new")
    assert Path("mine/file").read_text() == "precious"


@posix
@pytest.mark.parametrize("plant", [Path.symlink_to, Path.hardlink_to])
def test_a_planted_lock_is_refused_by_name_and_left_as_it_is(plant):
    Path("precious").write_text("content")
    plant(Path(".a.txt.lock"), Path("precious"))
    with pytest.raises(MergeError, match=r"\.a\.txt\.lock, the lock of a\.txt, is .*remove it"):
        write_text(Path("a.txt"), "new")
    assert Path("precious").read_text() == "content"
    Path(".a.txt.lock").unlink()
    write_text(Path("a.txt"), "new")
    assert sorted(os.listdir()) == ["a.txt", "precious"]


def test_a_file_that_happens_to_have_the_name_of_the_lock_stays():
    Path(".a.txt.lock").write_text("of another program")
    write_text(Path("a.txt"), "new")
    assert Path(".a.txt.lock").read_text() == "of another program"


def test_a_lock_that_a_killed_process_has_left_is_in_nobody_s_way():
    Path(".a.txt.lock").touch()
    write_text(Path("a.txt"), "new")
    assert os.listdir() == ["a.txt"]
