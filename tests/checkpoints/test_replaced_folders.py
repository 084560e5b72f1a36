"""A folder is replaced only if a merge has written all that is in it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch

import lightning_merge as lm
from lightning_merge.checkpoints import replaced_folders, save_weights
from lightning_merge.checkpoints.private_folder import make_private
from lightning_merge.checkpoints.replaced_folders import discard, list_files, put_folder_in_place, restore
from lightning_merge.methods import TaskArithmetic, WeightAverage
from lightning_merge.utilities.errors import MergeError


@pytest.fixture
def models() -> tuple[str, list[str]]:
    base = {"a.weight": torch.randn(4, 3), "b.weight": torch.randn(5, 5)}
    save_weights("base/model.safetensors", base)
    Path("base/config.json").write_text("{}")
    Path("base/LICENSE").write_text("free")
    save_weights("expert.safetensors", {name: tensor + 1 for name, tensor in base.items()})
    return "base", ["expert.safetensors"]


@pytest.fixture
def _no_work(monkeypatch):
    monkeypatch.setattr(TaskArithmetic, "survey", lambda *_: pytest.fail("it began to work"))


def everything(folder: str) -> dict[str, bytes | str]:
    """All that is in a folder, at every depth."""
    found: dict[str, bytes | str] = {}
    for path in sorted(Path(folder).rglob("*")):
        found[str(path)] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else ""
    return found


def instead_of_the_licence(plant):
    def put(folder: Path) -> None:
        (folder / "LICENSE").unlink()
        plant(folder / "LICENSE")

    return put


STRANGERS = {
    "notes.txt": lambda folder: (folder / "notes.txt").write_text("mine"),
    "other.safetensors": lambda folder: save_weights(folder / "other.safetensors", {"a": torch.ones(1)}),
    ".env": lambda folder: (folder / ".env").write_text("secret"),
    ".git": lambda folder: (folder / ".git").mkdir(),
    "data": lambda folder: (folder / "data").symlink_to("/"),
    ".README.md.0123456789abcdef.part": lambda folder: (folder / ".README.md.0123456789abcdef.part/mine").mkdir(
        parents=True
    ),
    ".README.md.lock": lambda folder: (folder / ".README.md.lock").write_text("no lock"),
    "LICENSE": instead_of_the_licence(Path.mkdir),
    "LICENSE ": instead_of_the_licence(lambda path: path.symlink_to("config.json")),
    "LICENSE  ": instead_of_the_licence(lambda path: path.hardlink_to("expert.safetensors")),
}


@pytest.mark.parametrize("name", STRANGERS)
@pytest.mark.usefixtures("_no_work")
def test_whatever_else_is_in_a_merged_folder_is_named_before_any_work(models, name):
    lm.merge(*models, WeightAverage(), output="out")
    STRANGERS[name](Path("out"))
    before = everything("out")
    with pytest.raises(MergeError, match=rf"The folder out holds {name.strip()}: .*Give another name, or empty the"):
        lm.merge(*models, TaskArithmetic(), output="out")
    with pytest.raises(MergeError, match=f"out holds {name.strip()}: "):
        lm.merge(*models, WeightAverage()).save("out")
    assert any(name.strip() in problem for problem in lm.plan(*models, TaskArithmetic(), output="out").problems)
    assert everything("out") == before


@pytest.mark.usefixtures("_no_work")
def test_a_folder_with_a_merged_file_and_other_things_is_not_ours(models):
    lm.merge(*models, WeightAverage(), output="work/merged.safetensors")
    lm.merge(*models, WeightAverage(), output="work/merged.ckpt")
    Path("work/src").mkdir()
    Path("work/src/train.py").write_text("print()")
    before = everything("work")
    with pytest.raises(MergeError, match=r"work holds merged\.ckpt, merged\.safetensors, src: "):
        lm.merge(*models, TaskArithmetic(), output="work")
    assert everything("work") == before


def test_a_model_that_was_copied_from_a_merged_folder_makes_no_other_folder_ours(models):
    lm.merge(*models, WeightAverage(), output="out")
    Path("work").mkdir()
    Path("out/model.safetensors").rename("work/renamed.safetensors")
    Path("work/LICENSE").write_text("mine")
    with pytest.raises(MergeError, match=r"work holds LICENSE, renamed\.safetensors"):
        lm.merge(*models, TaskArithmetic(), output="work")


def test_all_that_a_merge_writes_may_be_replaced(models):
    for shard_size in (60, 10**9, 60):
        merged = lm.merge(*models, TaskArithmetic(), output="out", shard_size=shard_size)
        assert all(torch.equal(lm.open_weights("out")[name], weight) for name, weight in merged.weights.items())
    assert len(list(Path("out").glob("*.safetensors"))) == 2
    assert sorted(os.listdir()) == ["base", "expert.safetensors", "out"]


def test_what_was_left_in_a_merged_folder_by_a_killed_process_is_in_nobody_s_way(models):
    lm.merge(*models, WeightAverage(), output="out")
    (make_private(Path("out/README.md")) / "README.md").write_text("half")
    Path("out/.README.md.lock").touch()
    lm.merge(*models, WeightAverage(), output="out")
    assert sorted(os.listdir("out")) == ["LICENSE", "README.md", "config.json", "model.safetensors"]


def test_what_appears_while_a_merge_runs_is_named_when_it_is_done(models):
    lm.merge(*models, WeightAverage(), output="out")
    before = everything("out")

    class Meanwhile(TaskArithmetic):
        def update(self, deltas, context):
            Path("out/notes.txt").write_text("mine")
            return super().update(deltas, context)

    with pytest.raises(MergeError, match=r"out holds notes\.txt"):
        lm.merge(*models, Meanwhile(), output="out")
    assert everything("out") == before | {"out/notes.txt": b"mine"}
    assert sorted(os.listdir()) == ["base", "expert.safetensors", "out"]


@pytest.mark.parametrize("in_one_step", [True, False])
def test_what_appears_at_the_last_moment_is_kept(models, in_one_step, monkeypatch):
    lm.merge(*models, WeightAverage(), output="out")

    def late(private, path):
        Path("out/notes.txt").write_text("mine")
        Path("out/figures").mkdir()
        Path("out/figures/one.png").write_text("picture")
        put_folder_in_place(private, path)

    monkeypatch.setattr("lightning_merge.checkpoints.streaming.put_folder_in_place", late)
    if not in_one_step:
        monkeypatch.setattr(replaced_folders, "exchange_names", lambda one, other: False)
    merged = lm.merge(*models, TaskArithmetic(), output="out")
    assert torch.equal(lm.open_weights("out")["a.weight"], merged.weights["a.weight"])
    assert Path("out/notes.txt").read_text() == "mine"
    assert Path("out/figures/one.png").read_text() == "picture"
    assert sorted(os.listdir()) == ["base", "expert.safetensors", "out"]


def folder(path: Path, **files: str) -> Path:
    path.mkdir()
    for name, text in files.items():
        (path / name).write_text(text)
    save_weights_with_list(path, [*files, "w.safetensors"])
    return path


def save_weights_with_list(path: Path, names: list[str]) -> None:
    from lightning_merge.checkpoints import save_tensors

    save_tensors(path / "w.safetensors", {"a": torch.ones(1)}, list_files(names))


class TestInPlace:
    @pytest.fixture(params=[True, False], ids=["in one step", "in two steps"])
    def private(self, request, monkeypatch) -> Path:
        if not request.param:
            monkeypatch.setattr(replaced_folders, "exchange_names", lambda one, other: False)
        private = make_private(Path("out"))
        folder(private / "new", file="new")
        return private

    def test_a_folder_takes_the_place_of_another(self, private):
        folder(Path("out"), file="old", more="old")
        put_folder_in_place(private, Path("out"))
        discard(private, Path("out"))
        assert everything("out").keys() == {"out/file", "out/w.safetensors"}
        assert Path("out/file").read_text() == "new"
        assert os.listdir() == ["out"]

    def test_a_killed_process_leaves_what_the_next_one_clears_away(self, private):
        folder(Path("out"), file="old")
        put_folder_in_place(private, Path("out"))
        (private / "swapped/file2").write_text("mine")
        (private / "swapped/file").unlink()
        (private / "swapped/file").mkdir()
        discard(private, Path("out"))
        assert Path("out/file2").read_text() == "mine"
        assert [path.is_dir() for path in sorted(Path("out").glob("file*"))] == [False, True, False]
        assert os.listdir() == ["out"]

    def test_mode_of_the_folder_and_its_files_is_kept(self, private):
        folder(Path("out"), file="old").chmod(0o750)
        Path("out/file").chmod(0o600)
        put_folder_in_place(private, Path("out"))
        assert stat.S_IMODE(Path("out").stat().st_mode) == 0o750
        assert stat.S_IMODE(Path("out/file").stat().st_mode) == 0o600

    def test_without_a_folder_to_go_to_nothing_is_lost(self, private):
        folder(Path("out"), file="old")
        put_folder_in_place(private, Path("out"))
        (private / "swapped/notes").write_text("mine")
        Path("out").rename("elsewhere")
        discard(private, Path("out"))
        assert (private / "swapped/notes").read_text() == "mine"
        restore([private], Path("out"))
        assert Path("out/notes").read_text() == "mine"


def test_the_old_folder_comes_back_where_the_new_one_cannot_be_moved(monkeypatch):
    private, rename = make_private(Path("out")), Path.rename
    folder(private / "new", file="new")
    folder(Path("out"), file="old")

    def fail(path, target):
        if path.name == "new" and target == Path("out"):
            raise OSError("disk is gone")
        return rename(path, target)

    monkeypatch.setattr(replaced_folders, "exchange_names", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="disk is gone"):
        put_folder_in_place(private, Path("out"))
    assert Path("out/file").read_text() == "old"
    assert (private / "new/file").read_text() == "new"
