"""Reading and writing weights."""

from __future__ import annotations

import json
import os
import pickle
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lightning_merge.checkpoints import open_weights, replacing, save_weights
from lightning_merge.errors import MergeError
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
            ({"map": {}}, "no index"),
        ],
    )
    def test_an_index_that_cannot_be_trusted(self, content, message):
        save_file({"w": torch.ones(1)}, "model.safetensors")
        Path("model.safetensors.index.json").write_text(json.dumps(content))
        with pytest.raises(MergeError, match=message):
            open_weights(".")


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
        (lambda: torch.save({"model": 1}, "odd.pt") or open_weights("odd.pt"), "its keys are model"),
        (lambda: Path("a.txt").write_text("x") and open_weights("a.txt"), "no weight file that is known"),
        (lambda: Path("empty").mkdir() or open_weights("empty"), "holds no weight file"),
        (lambda: open_weights({}), "holds no tensors"),
        (lambda: save_weights("a.txt", {}), "Cannot tell how to write"),
    ],
)
def test_what_cannot_work_is_said_in_a_sentence(make, message):
    with pytest.raises(MergeError, match=message):
        make()


class TestReplacing:
    def test_a_failure_leaves_the_old_file_and_no_other(self):
        Path("a.pt").write_text("old")

        def fail() -> None:
            with replacing(Path("a.pt")) as file:
                file.write_text("half")
                raise RuntimeError("stop")

        with pytest.raises(RuntimeError, match="stop"):
            fail()
        assert Path("a.pt").read_text() == "old"
        assert os.listdir() == ["a.pt"]

    def test_a_target_that_is_a_folder_is_said(self):
        Path("a.safetensors").mkdir()
        with pytest.raises(MergeError, match=r"Cannot write a\.safetensors: it is a folder"):
            save_weights("a.safetensors", base_weights())
        assert os.listdir() == ["a.safetensors"]

    def test_a_target_below_a_file_is_said(self):
        Path("file").write_text("")
        with pytest.raises(MergeError, match=r"Cannot write file/a\.ckpt"):
            save_weights("file/a.ckpt", base_weights())

    def test_the_file_has_the_user_s_rights(self):
        mask = os.umask(0o022)
        try:
            save_weights("a.safetensors", base_weights())
        finally:
            os.umask(mask)
        assert stat.S_IMODE(os.stat("a.safetensors").st_mode) == 0o644
