"""Reading files piece by piece, and noticing that they change."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lightning_merge.checkpoints import files, open_weights
from lightning_merge.checkpoints.files import InputFile
from lightning_merge.utilities.errors import MergeError
from tests.conftest import ROOT
from tests.toys import base_weights

SAVE = {"a.safetensors": save_file, "a.pt": torch.save}


def sha256(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def shards(count: int) -> dict[str, str]:
    index = {}
    for i, name in enumerate(base_weights()):
        index[name] = f"model-{i % count}.safetensors"
    for shard in set(index.values()):
        save_file({name: base_weights()[name] for name in index if index[name] == shard}, shard)
    Path("model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return index


class TestInputFile:
    def test_reads_what_is_there_in_as_many_calls_as_it_takes(self, monkeypatch):
        content = bytes(range(200))
        Path("a").write_bytes(content)

        class Short:
            """A file that gives at most seven bytes at a time, as a file gives at most 2 GiB."""

            def __init__(self, *args, **kwargs):
                self._file = open(*args, **kwargs)  # noqa: SIM115, closed by the block that it is used in

            def __enter__(self):
                return self

            def __exit__(self, *_):
                self._file.close()

            def __getattr__(self, name):
                return getattr(self._file, name)

            def readinto(self, buffer):
                return self._file.readinto(buffer[:7])

        monkeypatch.setattr(files, "open", Short, raising=False)
        assert InputFile("a").read(13, 150).tolist() == list(content[13:163])

    @pytest.mark.parametrize(("begin", "size"), [(8, 3), (11, 1), (-1, 2), (0, -1), (0, 1 << 60)])
    def test_bytes_that_are_not_there(self, begin, size):
        Path("a").write_bytes(b"0123456789")
        with pytest.raises(MergeError, match="a is damaged"):
            InputFile("a").read(begin, size)

    def test_a_file_without_the_right_to_read(self, monkeypatch):
        Path("a").write_bytes(b"0123456789")
        file = InputFile("a")

        def refuse(*_args, **_kwargs):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(files, "open", refuse, raising=False)
        with pytest.raises(MergeError, match="a cannot be read: Permission denied"):
            file.read(0, 1)

    def test_it_is_found_after_a_change_of_the_working_directory(self, monkeypatch):
        Path("a").write_bytes(b"0123456789")
        file = InputFile("a")
        Path("sub").mkdir()
        monkeypatch.chdir("sub")
        assert file.read(2, 1).item() == ord("2")


def cut() -> None:
    for name in SAVE:
        if Path(name).exists():
            os.truncate(name, os.path.getsize(name) // 2)


def replace() -> None:
    for name, save in SAVE.items():
        if Path(name).exists():
            save(base_weights(seed=1), f"new-{name}")
            os.replace(f"new-{name}", name)


def remove() -> None:
    for name in SAVE:
        Path(name).unlink(missing_ok=True)


def touch() -> None:
    for name in SAVE:
        if Path(name).exists():
            os.utime(name, ns=(1, 1))


@pytest.mark.parametrize("name", list(SAVE))
@pytest.mark.parametrize("change", [cut, replace, remove, touch])
def test_a_file_that_changes_after_it_was_opened_is_named(name, change):
    SAVE[name](base_weights(), name)
    opened = open_weights(name)
    opened.check_unchanged()
    change()
    for read in (opened.check_unchanged, opened.fingerprint, lambda: opened["head.weight"], lambda: dict(opened)):
        with pytest.raises(MergeError, match=re.escape(name)):
            read()


def test_a_file_that_is_cut_while_it_is_read_is_named(monkeypatch):
    save_file(base_weights(), "a.safetensors")
    opened = open_weights("a.safetensors")
    os.truncate("a.safetensors", os.path.getsize("a.safetensors") - 8)
    monkeypatch.setattr(InputFile, "_compare", lambda *_: None)  # the change came after the comparison
    with pytest.raises(MergeError, match=r"a\.safetensors ended 8 bytes early"):
        dict(opened)


class TestFingerprint:
    @pytest.mark.parametrize("name", list(SAVE))
    def test_of_one_file(self, name):
        SAVE[name](base_weights(), name)
        opened = open_weights(name)
        assert opened.files == (Path(name),)
        assert opened.fingerprint() == sha256(name)

    def test_of_shards(self):
        names = {"model.safetensors.index.json", *shards(3).values()}
        opened = open_weights(".")
        assert {file.name for file in opened.files} == names
        assert opened.fingerprint() == {name: sha256(name) for name in names}
        os.utime("model-1.safetensors", ns=(1, 1))
        with pytest.raises(MergeError, match=r"model-1\.safetensors was changed"):
            opened.check_unchanged()

    def test_of_memory(self):
        opened = open_weights(base_weights())
        assert opened.files == ()
        assert opened.fingerprint() is None
        opened.check_unchanged()

    def test_a_file_is_hashed_once_until_it_changes(self, monkeypatch):
        save_file(base_weights(), "a.safetensors")
        made = []
        new = hashlib.sha256
        monkeypatch.setattr(files.hashlib, "sha256", lambda *args: made.append(1) or new(*args))
        first = open_weights("a.safetensors").fingerprint()
        assert open_weights("a.safetensors").fingerprint() == first
        assert len(made) == 1
        save_file(base_weights(seed=1), "b.safetensors")
        os.replace("b.safetensors", "a.safetensors")
        assert open_weights("a.safetensors").fingerprint() != first
        assert len(made) == 2


@pytest.mark.parametrize("name", list(SAVE))
def test_many_threads_read_the_same(name):
    weights = {f"w{i}": torch.randn(50, 60) for i in range(40)}
    SAVE[name](weights, name)
    opened = open_weights(name)
    with ThreadPoolExecutor(8) as threads:
        for key, tensor in zip(list(weights) * 5, threads.map(opened.__getitem__, list(weights) * 5), strict=True):
            assert torch.equal(tensor, weights[key])


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists what is mapped")
@pytest.mark.parametrize("name", list(SAVE))
def test_no_file_stays_mapped_or_open(name):
    SAVE[name](base_weights(), name)
    opened = open_weights(name)
    kept = dict(opened)
    assert kept
    assert str(Path(name).resolve()) not in Path("/proc/self/maps").read_text()
    assert str(Path(name).resolve()) not in {os.path.realpath(file) for file in Path("/proc/self/fd").iterdir()}


_READ = """
import sys
from pathlib import Path
from lightning_merge.checkpoints import open_weights

def peak():
    return next(int(l.split()[1]) for l in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in l)

open_weights(sys.argv[1])["w"].clone()  # all that is imported on the way
before = peak()
weights = open_weights(sys.argv[2])
total = sum(float(weights[name].sum()) for name in weights)
print((peak() - before) * 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the peak")
@pytest.mark.parametrize("name", list(SAVE))
def test_reading_a_file_takes_the_memory_of_its_tensors_and_not_of_the_file(name):
    SAVE[name]({"w": torch.ones(1)}, f"small-{name}")
    SAVE[name]({f"w{i}": torch.full((1 << 20,), i, dtype=torch.float32) for i in range(50)}, name)  # 50 x 4 MiB
    command = [sys.executable, "-c", _READ, f"small-{name}", name]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert int(done.stdout) < 50 << 20
