"""Reading weights: one mapping, whatever the file."""

from __future__ import annotations

import json
import os
import pickle
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lightning_merge.checkpoints import open_weights, save_weights
from lightning_merge.utilities.errors import MergeError
from tests.toys import base_weights


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[k], other[k]) and one[k].dtype == other[k].dtype for k in one
    )


@pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt", "a.pt", "a.pth", "a.bin"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_come_back_as_they_were(name, dtype):
    weights = base_weights(dtype)
    save_weights(name, weights)
    opened = open_weights(name)
    assert same(dict(opened), weights)
    assert all(opened.meta[k].shape == weights[k].shape and opened.meta[k].dtype == weights[k].dtype for k in weights)


@pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt"])
def test_tied_weights_stay_tied(name):
    weights = base_weights()
    weights["decoder.weight"] = weights["head.weight"]
    save_weights(name, weights)
    opened = open_weights(name)
    assert opened.tied == {"decoder.weight": "head.weight"}
    assert torch.equal(opened["decoder.weight"], weights["head.weight"])


def test_a_state_dict_s_tensors_are_not_copied():
    weights = base_weights()
    assert open_weights(weights)["mlp.weight"].data_ptr() == weights["mlp.weight"].data_ptr()


def test_names_lose_what_torch_compile_adds():
    assert list(open_weights({"model._orig_mod.w": torch.ones(1)})) == ["model.w"]


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "memory"])
def test_names_that_become_the_same_are_refused(name):
    weights = {"_orig_mod.w": torch.ones(1), "w": torch.zeros(1)}
    {"a.safetensors": save_file, "a.pt": torch.save, "memory": lambda *_: None}[name](weights, name)
    with pytest.raises(MergeError, match=r"'_orig_mod\.w' and 'w', which are the same parameter"):
        open_weights(weights if name == "memory" else name)


def test_lightning_checkpoint_keeps_hyper_parameters_and_manifest():
    save_weights("a.ckpt", base_weights(), hyper_parameters={"lr": 0.1}, manifest={"seed": 1})
    assert open_weights("a.ckpt").header == {"hyper_parameters": {"lr": 0.1}, "merge": {"seed": 1}}
    save_weights("a.safetensors", base_weights(), manifest={"seed": 1})
    assert open_weights("a.safetensors").header == {"merge": {"seed": 1}}


class TestFolders:
    def test_the_only_weight_file_is_found(self):
        Path("run/checkpoints").mkdir(parents=True)
        save_weights("run/checkpoints/expert.ckpt", base_weights())
        assert same(dict(open_weights("run")), base_weights())

    def test_several_weight_files_are_named(self):
        for name in ("one", "two"):
            save_weights(f"run/{name}.safetensors", base_weights())
        with pytest.raises(MergeError, match=r"one\.safetensors, two\.safetensors"):
            open_weights("run")

    def test_shards(self):
        weights = base_weights()
        names = list(weights)
        index = {}
        for i, part in enumerate((names[:4], names[4:])):
            save_file({name: weights[name] for name in part}, f"model-{i}.safetensors")
            index |= dict.fromkeys(part, f"model-{i}.safetensors")
        Path("model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        assert same(dict(open_weights(".")), weights)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({"weight_map": {"w": "../evil.safetensors"}}, "outside its own folder"),
            ({"weight_map": {"w": "/etc/passwd"}}, "outside its own folder"),
            ({"weight_map": {"absent": "model.safetensors"}}, "do not hold"),
            ({"weight_map": {"w": "gone.safetensors"}}, "no file gone.safetensors"),
            ({"weight_map": {"w": ".."}}, "outside its own folder"),
            ({"weight_map": {"w": "sub"}}, "There is no file sub"),
            ({"weight_map": {"w": "notes.txt"}}, "notes.txt is empty"),
            ({"weight_map": {"w": 3}}, r"weight_map\['w'\] is 3 where text belongs"),
            ({"weight_map": ["w"]}, "weight_map is a list of 1 values where an object"),
            ({"weight_map": {}}, "weight_map is an object of 0 values where an object with a file for every tensor"),
            ({"map": {}}, "no index"),
            ([], "no index"),
        ],
    )
    def test_an_index_that_cannot_be_trusted(self, content, message):
        save_file({"w": torch.ones(1)}, "model.safetensors")
        Path("sub").mkdir()
        save_file({"w": torch.ones(1)}, "sub/model.safetensors")
        Path("notes.txt").write_text("")
        Path("model.safetensors.index.json").write_text(json.dumps(content))
        with pytest.raises(MergeError, match=message):
            open_weights(".")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (b'{"weight_map": {"w": "a.safetensors", "w": "b.safetensors"}}', "the key 'w' stands there twice"),
            (b'{"weight_map": ' + b"[" * 100_000, "nested too deeply|no index"),
            (b"\xff", "no index"),
            (b"", "no index"),
        ],
    )
    def test_an_index_that_cannot_be_read(self, text, message):
        Path("model.safetensors.index.json").write_bytes(text)
        with pytest.raises(MergeError, match=rf"model\.safetensors\.index\.json.*({message})"):
            open_weights(".")

    def test_a_key_in_two_shards(self):
        save_file({"v": torch.ones(1), "w": torch.ones(1)}, "a.safetensors")
        save_file({"w": torch.zeros(1)}, "b.safetensors")
        index = {"v": "a.safetensors", "w": "b.safetensors"}
        Path("model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        with pytest.raises(MergeError, match=r"'w' is in a\.safetensors and in b\.safetensors"):
            open_weights(".")

    def test_shards_of_a_cache_that_consists_of_links(self):
        Path("blobs").mkdir()
        Path("snapshots").mkdir()
        save_file({"w": torch.ones(1)}, "blobs/123")
        Path("blobs/456").write_text(json.dumps({"weight_map": {"w": "model-1.safetensors"}}))
        Path("snapshots/model-1.safetensors").symlink_to("../blobs/123")
        Path("snapshots/model.safetensors.index.json").symlink_to("../blobs/456")
        assert torch.equal(open_weights("snapshots")["w"], torch.ones(1))

    def test_shards_of_torch_files_know_what_is_tied(self):
        w = torch.randn(3)
        torch.save({"a": w, "b": w}, "model-1.bin")
        torch.save({"c": w}, "model-2.bin")
        index = {"a": "model-1.bin", "b": "model-1.bin", "c": "model-2.bin"}
        Path("pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
        opened = open_weights(".")
        assert same(dict(opened), {"a": w, "b": w, "c": w})
        assert opened.tied == {"b": "a"}

    def test_more_shards_than_files_may_be_open(self):
        index = {}
        for i in range(60):
            save_file({f"w{i}": torch.full((2,), i)}, f"model-{i}.safetensors")
            index[f"w{i}"] = f"model-{i}.safetensors"
        Path("model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
        try:
            opened = open_weights(".")
            values = [opened[f"w{i}"][0].item() for i in range(60)]
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert values == list(range(60))


class _Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_a_pickle_that_runs_code_is_refused():
    torch.save({"state_dict": {"w": torch.ones(1)}, "x": _Evil()}, "evil.ckpt")
    with pytest.raises(MergeError, match="refused"):
        open_weights("evil.ckpt")
    Path("plain.pt").write_bytes(pickle.dumps(_Evil()))
    with pytest.raises(MergeError, match=r"plain\.pt"):
        open_weights("plain.pt")
    assert not Path("executed").exists()


@pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt", "a.pt"])
@pytest.mark.parametrize("keep", [0, 5, 300])
def test_a_file_cut_short_is_named(name, keep):
    save_weights(name, base_weights())
    Path(name).write_bytes(Path(name).read_bytes()[:keep])
    with pytest.raises(MergeError, match=name):
        dict(open_weights(name))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: open_weights("nowhere.ckpt"), "no file or folder nowhere.ckpt"),
        (lambda: torch.save([1, 2], "list.pt") or open_weights("list.pt"), "holds a list"),
        (lambda: torch.save({"model": 1}, "odd.pt") or open_weights("odd.pt"), "its keys are 'model'"),
        (lambda: Path("a.txt").write_text("x") and open_weights("a.txt"), "no weight file that is known"),
        (lambda: Path("empty").mkdir() or open_weights("empty"), "holds no weight file"),
        (lambda: open_weights({}), "holds no tensors"),
        (lambda: open_weights({0: torch.ones(1)}), "has the key 0"),
        (lambda: open_weights({"w": torch.eye(2).to_sparse()}), "'w' in the state dict is sparse"),
    ],
)
def test_what_cannot_work_is_said_in_a_sentence(make, message):
    with pytest.raises(MergeError, match=message):
        make()
