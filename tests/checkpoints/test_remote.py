"""Models in a store, through fsspec: memory://, file://, and a store that fails midway."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.torch import load_file, save_file

import lightning_merge as lm
from lightning_merge.checkpoints import open_weights, statistics_file
from lightning_merge.checkpoints.paths import is_url, local_path, url_of
from lightning_merge.checkpoints.remote import fetch
from lightning_merge.checkpoints.statistics_files import save_statistics
from lightning_merge.methods import Fisher, TaskArithmetic, WeightAverage
from lightning_merge.utilities.errors import MergeError
from tests.toys import base_weights


class Failing(MemoryFileSystem):
    """A store in memory in which a named operation fails, after it has done a part of its work."""

    protocol = "failing"
    cachable = False
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]
    fails = ""

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("failing://", "memory://"))

    def put_file(self, lpath, rpath, **kwargs):
        if self.fails == "put":
            self.pipe_file(rpath, Path(lpath).read_bytes()[:10])
            raise ConnectionError("the line went dead")
        if self.fails == "half":  # and says nothing
            self.pipe_file(rpath, Path(lpath).read_bytes()[:10])
        else:
            super().put_file(lpath, rpath, **kwargs)

    def pipe_file(self, path, value, **kwargs):
        if self.fails == "rights":
            raise PermissionError("AccessDenied")
        super().pipe_file(path, value, **kwargs)

    def mv(self, path1, path2, **kwargs):
        if self.fails == "mv":
            self.copy(
                self.find(path1)[0], f"{path2}/{self.find(path1)[0].rpartition('/')[2]}" if self.isdir(path1) else path2
            )
            raise ConnectionError("the line went dead")
        super().mv(path1, path2, **kwargs)


@pytest.fixture(autouse=True)
def store(monkeypatch):
    fsspec.register_implementation("failing", Failing, clobber=True)
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    Failing.store.clear()
    Failing.pseudo_dirs[:] = [""]
    monkeypatch.setattr(Failing, "fails", "")
    return MemoryFileSystem()


def expert(step: float) -> dict[str, torch.Tensor]:
    return {name: tensor + step if tensor.is_floating_point() else tensor for name, tensor in base_weights().items()}


def put(url: str, content: bytes) -> None:
    with fsspec.open(url, "wb") as file:
        file.write(content)


def put_weights(url: str, weights: dict[str, torch.Tensor]) -> None:
    save_file(weights, "passing.safetensors")
    put(url, Path("passing.safetensors").read_bytes())


def names(store: MemoryFileSystem) -> list[str]:
    return sorted(store.find("/"))


def test_files_are_read_and_written_where_their_urls_say(store):
    put_weights("memory://in/base.safetensors", base_weights())
    put_weights("memory://in/a.safetensors", expert(0.5))
    merged = lm.merge(
        "memory://in/base.safetensors", ["memory://in/a.safetensors"], WeightAverage(), output="memory://out/m.ckpt"
    )
    assert names(store) == ["/in/a.safetensors", "/in/base.safetensors", "/out/m.ckpt"]
    assert merged.manifest["base"]["path"] == "memory://in/base.safetensors"
    assert merged.manifest["experts"]["memory://in/a.safetensors"]["path"] == "memory://in/a.safetensors"
    with fsspec.open("memory://out/m.ckpt", "rb") as file:
        state = torch.load(file, weights_only=True)["state_dict"]
    for name, tensor in expert(0.5).items():
        torch.testing.assert_close(state[name], tensor)
        assert torch.equal(merged.weights[name], state[name])
    assert not list(Path().rglob("memory*"))  # no folder of that name


def test_a_folder_in_a_store_is_merged_like_one_here(store):
    for step, where in enumerate(("base", "a")):
        put_weights(f"memory://{where}/model-0.safetensors", {k: v + step for k, v in list(base_weights().items())[:2]})
        put_weights(f"memory://{where}/model-1.safetensors", {k: v + step for k, v in list(base_weights().items())[2:]})
        index = {k: f"model-{i > 1:d}.safetensors" for i, k in enumerate(base_weights())}
        put(f"memory://{where}/model.safetensors.index.json", json.dumps({"weight_map": index}).encode())
        put(f"memory://{where}/config.json", b'{"model_type": "bert"}')
        put(f"memory://{where}/huge.onnx", b"1" * 1000)
    lm.merge("memory://base", ["memory://a/"], WeightAverage(), output="memory://out/merged")
    assert [name for name in names(store) if name.startswith("/out")] == [
        "/out/merged/README.md", "/out/merged/config.json", "/out/merged/model.safetensors"
    ]  # fmt: skip
    assert set(open_weights("memory://out/merged")) == set(base_weights())
    assert not fetch("memory://base").joinpath("huge.onnx").exists()
    by_index = open_weights("memory://base/model.safetensors.index.json")
    assert torch.equal(by_index["mlp.weight"], base_weights()["mlp.weight"])
    with pytest.raises(MergeError, match=r"memory://out/merged cannot be written: there is something already"):
        lm.merge("memory://base", ["memory://a"], WeightAverage(), output="memory://out/merged")


def test_what_was_changed_in_the_store_is_fetched_again():
    put_weights("memory://x.safetensors", base_weights())
    first = open_weights("memory://x.safetensors")
    inode = local_path("memory://x.safetensors").stat().st_ino
    open_weights("memory://x.safetensors")
    assert local_path("memory://x.safetensors").stat().st_ino == inode  # it was fetched once
    put_weights("memory://x.safetensors", expert(1.0))
    second = open_weights("memory://x.safetensors")
    assert torch.equal(second["mlp.weight"], expert(1.0)["mlp.weight"])
    with pytest.raises(MergeError, match="was changed"):
        first["mlp.weight"]


def test_statistics_lie_beside_their_checkpoint_in_the_store(store):
    put_weights("memory://base.safetensors", base_weights())
    for i in (1, 2):
        put_weights(f"memory://runs/{i}.safetensors", expert(float(i)))
        weights = open_weights(f"memory://runs/{i}.safetensors")
        fisher = {f"fisher.{name}": torch.ones_like(tensor) for name, tensor in weights.items()}
        save_statistics(statistics_file(weights), fisher, weights, {})
    assert "/runs/2.statistics.safetensors" in names(store)
    merged = lm.merge("memory://base.safetensors", [f"memory://runs/{i}.safetensors" for i in (1, 2)], Fisher())
    noted = merged.manifest["statistics"]["memory://runs/1.safetensors"]["path"]
    assert noted == "memory://runs/1.statistics.safetensors"
    torch.testing.assert_close(merged.weights["mlp.weight"], expert(1.5)["mlp.weight"])


def test_task_vectors_and_adapters_in_a_store(store):
    put_weights("memory://base.safetensors", base_weights())
    put_weights("memory://a.safetensors", expert(1.0))
    url = "memory://v/a.task_vector.safetensors"
    lm.save_task_vector(url, "memory://base.safetensors", "memory://a.safetensors")
    merged = lm.merge("memory://base.safetensors", [url], TaskArithmetic(scale=1.0))
    torch.testing.assert_close(merged.weights["mlp.weight"], expert(1.0)["mlp.weight"])
    m, n = base_weights()["mlp.weight"].shape
    factors = {"lora_A.weight": torch.ones(1, n), "lora_B.weight": torch.ones(m, 1)}
    put_weights("memory://l/adapter_model.safetensors", {f"base_model.model.mlp.{k}": v for k, v in factors.items()})
    put("memory://l/adapter_config.json", b'{"peft_type": "LORA", "r": 1, "lora_alpha": 2}')
    merged = lm.merge("memory://base.safetensors", {"l": "memory://l"}, TaskArithmetic(scale=1.0))
    torch.testing.assert_close(merged.weights["mlp.weight"], base_weights()["mlp.weight"] + 2)


@pytest.mark.parametrize("fails", ["put", "half", "mv"])
@pytest.mark.parametrize("output", ["failing://out/m.safetensors", "failing://out/m"])
def test_what_fails_midway_changes_nothing(monkeypatch, fails, output):
    put_weights("memory://base/model.safetensors", base_weights())
    put("memory://base/config.json", b"{}")
    put("failing://out/m.safetensors", b"what stood there")
    before = names(Failing())
    monkeypatch.setattr(Failing, "fails", fails)
    with pytest.raises(
        MergeError, match=r"Could not write .*m(\.safetensors)?: the store said: .*; nothing was changed"
    ):
        lm.merge("memory://base", {"a": expert(1.0)}, WeightAverage(), output=output)
    assert names(Failing()) == before


def test_a_store_without_rights_is_found_before_any_work(monkeypatch):
    monkeypatch.setattr(Failing, "fails", "rights")
    monkeypatch.setattr("lightning_merge.merging.merge.inspect_inputs", None)  # the work
    with pytest.raises(
        MergeError, match=r"failing://out/m.ckpt cannot be written: .*AccessDenied; check the URL, your"
    ):
        lm.merge(base_weights(), {"a": expert(1.0)}, WeightAverage(), output="failing://out/m.ckpt")
    assert not names(Failing())


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("memory://gone.ckpt", "There is no file or folder memory://gone.ckpt; check the URL"),
        ("nosuch://a/b.ckpt", r"nosuch://a/b\.ckpt is in no kind of store"),
        ("memory://a/../b.ckpt", "without '..'"),
        ("dropbox://a/b.ckpt", r"dropbox://a/b\.ckpt\S* cannot be read: .*install"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(url, says):
    for source in (url, {"e": url}):
        with pytest.raises(MergeError, match=says):
            lm.merge(base_weights(), source if isinstance(source, dict) else [source], WeightAverage())


def test_what_a_store_cannot_do_is_said_before_any_work():
    save_file(base_weights(), "base.safetensors")
    with pytest.raises(MergeError, match=r"memory://m.ckpt is complete before it is uploaded and cannot be resumed"):
        lm.merge("base.safetensors", ["base.safetensors"], WeightAverage(), output="memory://m.ckpt", resume=True)


def test_a_file_url_is_a_path_of_this_machine(tmp_path):
    save_file(base_weights(), "base.safetensors")
    lm.merge(
        f"file://{tmp_path}/base.safetensors",
        {"a": expert(1.0)},
        WeightAverage(),
        output=f"file://{tmp_path}/m.safetensors",
    )
    torch.testing.assert_close(load_file("m.safetensors")["mlp.weight"], expert(1.0)["mlp.weight"])


def test_urls_that_became_paths_and_paths_that_look_like_urls(store):
    assert is_url(Path("memory://a/b"))
    assert url_of(local_path(Path("memory://a/b"))) == "memory://a/b"
    assert not is_url("a/memory.ckpt")
    assert not is_url("run:/x.ckpt")  # no store is called so: a folder whose name ends in a colon
    assert not is_url(Path("/a/b"))
    assert url_of(Path("/a/b")) is None


@pytest.mark.parametrize(
    ("name", "says"), [("x" * 300 + ".ckpt", "too long"), ("x" * 240 + ".pt", "too long"), ("a\0b.ckpt", "a zero byte")]
)
def test_names_that_no_file_can_have(name, says):
    models = base_weights(), {"a": expert(1.0)}
    with pytest.raises(MergeError, match=says):
        lm.merge(*models, WeightAverage(), output=name)
    if "\0" in name or len(name) > 255:
        with pytest.raises(MergeError, match=says):
            lm.merge(models[0], [name], WeightAverage())
    with pytest.raises(MergeError, match=says):
        lm.merge(*models, WeightAverage()).save(name)
