"""A model that is written while it is computed: never half of it, whatever happens."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lightning_merge as lm
from lightning_merge.checkpoints import PartFile, save_weights
from lightning_merge.checkpoints.private_folder import make_private
from lightning_merge.methods import SCORE, MergeMethod, TaskArithmetic, WeightAverage
from tests.toys import base_weights, expert_weights

OUTPUTS = ["merged.safetensors", "merged.ckpt", "merged.pt", "merged"]


@pytest.fixture
def files() -> tuple[str, list[str]]:
    """A base and two experts as files; the base is a folder with a configuration."""
    return make_files()


def make_files() -> tuple[str, list[str]]:
    base = base_weights()
    base |= {f"blocks.{i}.weight": torch.randn(16, 16) for i in range(12)}
    base["decoder.weight"] = base["head.weight"]
    save_weights("base/model.safetensors", base)
    Path("base/config.json").write_text("{}")
    for i in range(2):
        expert = expert_weights(base, i)
        expert["decoder.weight"] = expert["head.weight"]
        save_weights(f"{i}.safetensors", expert)
    return "base", ["0.safetensors", "1.safetensors"]


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def left_behind() -> list[str]:
    return [name for name in os.listdir() if name.startswith(".")]


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("workers", [1, 3])
def test_what_is_written_is_what_stays_in_memory(files, output, workers):
    base, experts = files
    memory = lm.merge(base, experts, SCORE()).weights
    merged = lm.merge(base, experts, SCORE(), output=output, workers=workers, shard_size=3000)
    assert same(dict(merged.weights), memory)
    assert merged.weights.tied == {"decoder.weight": "head.weight"}
    if output != "merged.pt":  # which has no place for it
        assert merged.weights.header["merge"]["method"] == SCORE().describe()
    assert left_behind() == []
    again = lm.merge(base, experts, SCORE()).save("again" + output)
    assert same(dict(lm.open_weights(again)), memory)


def test_safetensors_reads_what_was_written(files):
    merged = lm.merge(*files, SCORE(), output="merged.safetensors")
    stored = load_file("merged.safetensors")
    assert stored.keys() == merged.weights.keys() - {"decoder.weight"}
    assert all(torch.equal(stored[name], merged.weights[name]) for name in stored)


def test_a_folder_is_divided_into_shards_with_an_index(files):
    merged = lm.merge(*files, SCORE(), output="merged", shard_size=3000)
    index = json.loads(Path("merged/model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in Path("merged").glob("*.safetensors"))
    assert len(shards) == 7
    assert shards[0] == "model-00001-of-00007.safetensors"
    assert index["weight_map"].keys() == merged.weights.keys() - {"decoder.weight"}
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for name, tensor in merged.weights.items() if name != "decoder.weight"
    )
    for shard in shards:
        assert all(index["weight_map"][name] == shard for name in load_file(f"merged/{shard}"))
    assert sorted(os.listdir("merged")) == sorted([*shards, "README.md", "config.json", "model.safetensors.index.json"])


@pytest.mark.parametrize("output", OUTPUTS)
class TestFailures:
    @pytest.fixture
    def old(self, files, output):
        return dict(lm.merge(*files, WeightAverage(), output=output).weights)

    def test_a_full_disk(self, files, output, old, monkeypatch):
        write = os.pwrite

        def full(handle, content, position):
            if position > 6000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(handle, content, position)

        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(lm.MergeError, match=r"Could not write .*merged.*: No space left on device; nothing was"):
            lm.merge(*files, SCORE(), output=output)
        assert same(dict(lm.open_weights(output)), old)
        assert left_behind() == []

    def test_a_disk_that_is_too_small_is_noticed_before_any_work(self, files, output, old, monkeypatch):
        class Never(MergeMethod):
            def update(self, deltas, context):
                raise AssertionError("work began")

        def full(handle, position, size):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "posix_fallocate", full)
        with pytest.raises(lm.MergeError, match="No space left on device"):
            lm.merge(*files, Never(), output=output)
        assert same(dict(lm.open_weights(output)), old)
        assert left_behind() == []

    def test_a_method_that_fails(self, files, output, old):
        class Fails(MergeMethod):
            def update(self, deltas, context):
                raise RuntimeError("no")

        with pytest.raises(RuntimeError, match="no"):
            lm.merge(*files, Fails(), output=output)
        assert same(dict(lm.open_weights(output)), old)
        assert left_behind() == []

    def test_an_input_that_changes_meanwhile(self, files, output, old):
        class Changes(TaskArithmetic):
            def update(self, deltas, context):
                os.utime("1.safetensors", ns=(1, 1))
                return super().update(deltas, context)

        with pytest.raises(lm.MergeError, match=r"1\.safetensors was changed while it was read"):
            lm.merge(*files, Changes(), output=output)
        assert same(dict(lm.open_weights(output)), old)
        assert left_behind() == []

    def test_another_merge_into_the_same_output(self, files, output):
        class Meanwhile(TaskArithmetic):
            def update(self, deltas, context):
                with pytest.raises(lm.MergeError, match="Another merge is writing"):
                    lm.merge(*files, TaskArithmetic(), output=output)
                return super().update(deltas, context)

        merged = lm.merge(*files, Meanwhile(), output=output)
        assert same(dict(merged.weights), lm.merge(*files, TaskArithmetic()).weights)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_target_that_may_not_be_written_to(files):
    Path("there").mkdir(mode=0o500)
    with pytest.raises(lm.MergeError, match="there is no folder that can be written to"):
        lm.merge(*files, SCORE(), output="there/merged.safetensors")


def _merge_for_ever(output: str, resume: bool) -> None:
    """Write one of two models again and again, until somebody puts an end to it."""
    torch.set_num_threads(1)
    while True:
        for method in (WeightAverage(), TaskArithmetic(scale=0.7)):
            lm.merge("base", ["0.safetensors", "1.safetensors"], method, output=output, resume=resume, workers=2)


@pytest.mark.parametrize("output", ["merged.safetensors", "merged.ckpt", "merged"])
@pytest.mark.parametrize("resume", [False, True])
def test_killed_at_any_moment_there_is_the_old_model_or_the_new_one(files, output, resume):
    """54 kills in all; a first one must not come before there is anything."""
    models = [lm.merge(*files, method).weights for method in (WeightAverage(), TaskArithmetic(scale=0.7))]
    lm.merge(*files, WeightAverage(), output=output)
    draw = random.Random(output)
    context = multiprocessing.get_context("fork")
    killed = 0
    for _ in range(9):
        process = context.Process(target=_merge_for_ever, args=(output, resume))
        process.start()
        time.sleep(draw.uniform(0.0, 0.25))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        found = dict(lm.open_weights(output))
        assert any(same(found, model) for model in models)
    assert killed == 9
    lm.merge(*files, SCORE(), output=output)  # what was left behind is in nobody's way, and goes away
    assert left_behind() == []


@pytest.fixture
def written(monkeypatch) -> list[str]:
    """The names of the tensors that are written."""
    names: list[str] = []
    write = PartFile.write

    def noting(part: PartFile, name: str, tensor: torch.Tensor) -> None:
        names.append(name)
        write(part, name, tensor)

    monkeypatch.setattr(PartFile, "write", noting)
    return names


class TestResume:
    class Stops(TaskArithmetic):
        """Gives up at the last block, the first time."""

        def update(self, deltas, context):
            if context.name == "blocks.7.weight" and not Path("again").exists():
                raise KeyboardInterrupt
            return super().update(deltas, context)

        def describe(self):
            return TaskArithmetic().describe()

    @pytest.mark.parametrize("output", OUTPUTS)
    def test_goes_on_with_what_is_missing(self, files, output, written):
        with pytest.raises(KeyboardInterrupt):
            lm.merge(*files, self.Stops(), output=output, resume=True, workers=1, shard_size=3000)
        assert not Path(output).exists()
        written.clear()
        Path("again").touch()
        merged = lm.merge(*files, self.Stops(), output=output, resume=True, shard_size=3000)
        assert 0 < len(written) < len(merged.inventory.stored)
        assert "blocks.7.weight" in written
        assert same(dict(merged.weights), lm.merge(*files, TaskArithmetic()).weights)
        assert left_behind() == []

    def test_what_was_damaged_meanwhile_is_computed_again(self, files):
        with pytest.raises(KeyboardInterrupt):
            lm.merge(*files, self.Stops(), output="m.safetensors", resume=True, workers=1)
        (part,) = Path().glob(".m.safetensors.*.part/model.safetensors")
        content = bytearray(part.read_bytes())
        content[-200:] = bytes(200)
        start = 8 + int.from_bytes(content[:8], "little")
        content[start : start + 4] = b"\xff" * 4
        part.write_bytes(content)
        Path("again").touch()
        merged = lm.merge(*files, self.Stops(), output="m.safetensors", resume=True)
        assert same(dict(merged.weights), lm.merge(*files, TaskArithmetic()).weights)

    @pytest.mark.parametrize("change", ["method", "input"])
    def test_another_merge_starts_anew(self, files, change, written):
        with pytest.raises(KeyboardInterrupt):
            lm.merge(*files, self.Stops(), output="m.safetensors", resume=True, workers=1)
        method = TaskArithmetic(scale=0.1) if change == "method" else TaskArithmetic()
        if change == "input":
            save_weights("1.safetensors", expert_weights(dict(lm.open_weights("base")), 5))
        written.clear()
        merged = lm.merge(*files, method, output="m.safetensors", resume=True)
        assert len(written) == len(merged.inventory.stored)
        assert same(dict(merged.weights), lm.merge(*files, method).weights)

    def test_needs_files_and_an_output(self, files):
        base, experts = files
        with pytest.raises(lm.MergeError, match="give output, too"):
            lm.merge(base, experts, SCORE(), resume=True)
        with pytest.raises(lm.MergeError, match="base is in memory"):
            lm.merge(dict(lm.open_weights(base)), experts, SCORE(), resume=True, output="m.pt")


def test_without_positioned_writes_threads_take_turns(files, monkeypatch):
    monkeypatch.delattr(os, "pwrite")
    merged = lm.merge(*files, SCORE(), output="merged.safetensors", workers=4)
    assert same(dict(merged.weights), lm.merge(*files, SCORE()).weights)


class TestPlaces:
    def test_a_symbolic_link_to_a_folder_stays_one(self, files):
        Path("store/real").mkdir(parents=True)
        Path("merged").symlink_to("store/real")
        for method in (WeightAverage(), SCORE()):
            merged = lm.merge(*files, method, output="merged")
        assert Path("merged").is_symlink()
        assert same(dict(merged.weights), lm.merge(*files, SCORE()).weights)
        assert os.listdir("store") == ["real"]

    def test_a_symbolic_link_to_a_file_stays_one(self, files):
        Path("store").mkdir()
        save_weights("store/real.ckpt", base_weights())
        Path("merged.ckpt").symlink_to("store/real.ckpt")
        merged = lm.merge(*files, SCORE(), output="merged.ckpt")
        assert Path("merged.ckpt").is_symlink()
        assert same(dict(merged.weights), dict(lm.open_weights("store/real.ckpt")))

    @pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
    def test_the_name_that_was_given_decides_the_format_and_not_where_a_link_leads(self, files, suffix):
        Path("store").mkdir()
        other = "real.ckpt" if suffix == ".safetensors" else "blob"
        Path("store", other).write_bytes(b"old")
        Path(f"merged{suffix}").symlink_to(f"store/{other}")
        merged = lm.merge(*files, SCORE())
        lm.merge(*files, SCORE(), output=f"merged{suffix}")
        for _ in range(2):
            assert Path(f"merged{suffix}").is_symlink()
            assert same(dict(lm.open_weights(f"merged{suffix}")), merged.weights)
            assert Path("store", other).read_bytes().startswith(b"PK") == (suffix == ".ckpt")
            assert merged.save(f"merged{suffix}") == Path(f"merged{suffix}").absolute()

    @pytest.mark.parametrize("output", ["merged.safetensors", "merged.ckpt", "merged"])
    @pytest.mark.parametrize("resume", [False, True])
    def test_what_somebody_has_planted_is_neither_written_nor_removed(self, files, output, resume):
        Path("precious").mkdir()
        Path("precious/model.safetensors").write_text("content")
        planted = []
        for name in ("part", "part.torch", "part.done0", "0123456789abcdef.part", "0000000000000000.part"):
            planted.append(Path(f".{output}.{name}"))
            planted[-1].symlink_to("precious/model.safetensors" if name.startswith("part") else "precious")
        planted[0].unlink()
        os.link("precious/model.safetensors", planted[0])
        folder = Path(f".{output}.fedcba9876543210.part")
        folder.mkdir()
        (folder / "model.safetensors").symlink_to("../precious/model.safetensors")
        merged = lm.merge(*files, SCORE(), output=output, resume=resume)
        assert same(dict(merged.weights), lm.merge(*files, SCORE()).weights)
        assert Path("precious/model.safetensors").read_text() == "content"
        assert all(os.path.lexists(path) for path in [*planted, folder / "model.safetensors"])
        assert sorted(left_behind()) == sorted(path.name for path in [*planted, folder])

    def test_what_is_half_written_is_nobody_else_s_to_enter(self, files):
        seen = set()

        class Looks(TaskArithmetic):
            def update(self, deltas, context):
                (folder,) = Path().glob(".m.ckpt.*.part")
                seen.add((folder.stat().st_mode & 0o777, len(folder.name)))
                return super().update(deltas, context)

        lm.merge(*files, Looks(), output="m.ckpt")
        assert seen == {(0o700, len(".m.ckpt.0123456789abcdef.part"))}

    @pytest.mark.parametrize("output", ["merged.safetensors", "merged.ckpt"])
    def test_a_replaced_file_keeps_its_mode_and_a_new_one_has_that_of_the_umask(self, files, output):
        before = os.umask(0o027)
        try:
            lm.merge(*files, SCORE(), output=output)
            assert Path(output).stat().st_mode & 0o777 == 0o640
            Path(output).chmod(0o604)
            lm.merge(*files, SCORE(), output=output)
            assert Path(output).stat().st_mode & 0o777 == 0o604
        finally:
            os.umask(before)

    def test_a_shard_of_an_input_is_not_replaced(self, files):
        lm.merge(*files, WeightAverage(), output="sharded", shard_size=3000)
        shard = "sharded/model-00001-of-00007.safetensors"
        with pytest.raises(lm.MergeError, match="is one of the models to merge"):
            lm.merge("sharded", files[1], SCORE(), output=shard)

    @pytest.mark.parametrize("resume", [False, True])
    def test_what_a_killed_merge_has_left_is_in_nobody_s_way(self, files, resume):
        part = make_private(Path("merged"))
        (part / "new").mkdir()
        (part / "new/model.safetensors.index.json").write_text("{}")
        (part / "model.safetensors.done7").write_text("[]")
        merged = lm.merge(*files, SCORE(), output="merged", resume=resume)
        assert sorted(os.listdir("merged")) == ["README.md", "config.json", "model.safetensors"]
        assert same(dict(merged.weights), lm.merge(*files, SCORE()).weights)

    def test_a_folder_that_was_moved_away_comes_back(self, files, monkeypatch):
        old = dict(lm.merge(*files, WeightAverage(), output="merged").weights)
        Path("merged").rename(make_private(Path("merged")) / "swapped")
        monkeypatch.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
        with pytest.raises(lm.MergeError, match="broken"):
            lm.merge(*files, SCORE(), output="merged")
        assert same(dict(lm.open_weights("merged")), old)

    def test_everything_is_on_the_disk_before_it_takes_its_place(self, files, monkeypatch):
        synced, fsync = [], os.fsync

        def noting(handle):
            synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
            fsync(handle)

        if not Path("/proc/self/fd").is_dir():
            pytest.skip("this system does not tell the names of open files")
        monkeypatch.setattr(os, "fsync", noting)
        lm.merge(*files, SCORE(), output="merged", shard_size=3000)
        assert {"config.json", "model.safetensors.index.json", "model-00007-of-00007.safetensors"} <= set(synced)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.uint16])
def test_types_that_only_a_file_of_torch_can_hold(files, dtype):
    base = dict(lm.open_weights(files[0])) | {"table": torch.ones(3, 2).to(dtype)}
    experts = [dict(lm.open_weights(file)) | {"table": base["table"]} for file in files[1]]
    merged = lm.merge(base, experts, SCORE(), output="m.ckpt", exclude=["table"])
    assert torch.equal(merged.weights["table"], base["table"])
    with pytest.raises(lm.MergeError, match=r"'table' is of type .*; end the output in \.ckpt"):
        lm.merge(base, experts, SCORE(), output="m.safetensors", exclude=["table"])


def test_a_file_system_without_locks(files, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def none(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)
    merged = lm.merge(*files, SCORE(), output="merged.safetensors")
    assert same(dict(merged.weights), lm.merge(*files, SCORE()).weights)


def test_statistics_in_memory_cannot_be_resumed_by(files):
    base = dict(lm.open_weights(files[0]))
    fisher = {f"fisher.{name}": tensor.abs() for name, tensor in base.items() if tensor.is_floating_point()}
    statistics = dict.fromkeys(files[1], fisher)
    arguments = {"statistics": statistics, "output": "m.safetensors", "resume": True}
    with pytest.raises(lm.MergeError, match=r"the statistics of 0\.safetensors is in memory; give a file"):
        lm.merge(*files, lm.methods.Fisher(), **arguments)
    assert len(lm.plan(*files, lm.methods.Fisher(), **arguments).problems) == 2


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ".pt"])
def test_the_bytes_do_not_depend_on_the_name_of_the_output(files, suffix):
    for name in ("one", "another"):
        lm.merge(*files, SCORE(), output=f"{name}{suffix}")
    assert Path(f"one{suffix}").read_bytes() == Path(f"another{suffix}").read_bytes()
