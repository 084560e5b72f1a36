"""Files that are no weights, weights under odd names and keys, and advice of other libraries that must not be given."""

from __future__ import annotations

import os
import pickle
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lightning_merge as lm
from lightning_merge.checkpoints import open_weights
from lightning_merge.checkpoints.files import first_line
from lightning_merge.utilities.errors import MergeError

STATE = {"weight": torch.arange(4.0).reshape(2, 2), "bias": torch.ones(2)}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:9f\nsize 1234\n"


def tensors(path: str) -> dict[str, torch.Tensor]:
    return dict(open_weights(path))


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor] = STATE) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ".bin", ".h5", ".weights"])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty; copy or download it again"),
        (POINTER, "is a pointer of Git LFS, not the file; run `git lfs pull`"),
        (b"<!DOCTYPE html><title>Not found</title>", "is a web page, .*/resolve/"),
        (b"\n <HTML><body>login</body></HTML>", "is a web page"),
        (b"GGUF\x03\0\0\0" + bytes(40), "is a GGUF file of llama.cpp; give the safetensors"),
        (b"\x89HDF\r\n\x1a\n" + bytes(40), "is an HDF5 file"),
        (b"\x93NUMPY\x01\0" + bytes(40), "is an array of NumPy"),
        (b"\x08\x08\x12\x07pytorch\x1a\x05" + bytes(40), "is an ONNX model"),
        (b"\x81\xa6params\x81\xa5Dense" + bytes(40), "is a msgpack file of Flax"),
        (b"\x1f\x8b\x08\0" + bytes(40), "is a compressed file; unpack it"),
    ],
)
def test_other_files_are_named_with_the_remedy(suffix: str, content: bytes, says: str):
    path = Path("model" + suffix)
    path.write_bytes(content)
    with pytest.raises(MergeError, match=rf"model\{suffix} {says}"):
        lm.merge(STATE, [path], lm.methods.WeightAverage())


def test_archives_that_torch_save_has_not_written():
    np.savez("a.npz", weight=np.ones(2))
    with zipfile.ZipFile("b.ckpt", "w") as archive:
        archive.writestr("folder/model.safetensors", b"x")
    Path("inner").write_text("x")
    with tarfile.open("c.pt", "w") as archive:
        archive.add("inner")
    with zipfile.ZipFile("d.pt2", "w") as archive:
        archive.writestr("d/archive_format", b"pt2")
        archive.writestr("d/models/model.json", b"{}")
    for path, says in (
        ("a.npz", "an archive of NumPy arrays"),
        ("b.ckpt", "a zip archive that torch.save has not written; unpack it"),
        ("c.pt", "a tar archive; unpack it"),
        ("d.pt2", "a program of torch.export; save the state_dict of what torch.export.load"),
    ):
        with pytest.raises(MergeError, match=rf"{path} is {says}"):
            open_weights(path)


def test_the_remedy_for_torchscript_works():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(nn.Linear(2, 2)).save("clip.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PyTorch's own advice is not seen
        with pytest.raises(MergeError, match=r"clip\.pt is a TorchScript archive") as raised:
            open_weights("clip.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(str(raised.value).split("`")[1], {"torch": torch})
    assert set(tensors("weights.pt")) == {"weight", "bias"}


def test_numpy_can_be_converted_as_is_said():
    np.savez("a.npz", **{name: tensor.numpy() for name, tensor in STATE.items()})
    save_file({name: torch.from_numpy(array) for name, array in np.load("a.npz").items()}, "a.safetensors")
    assert same(tensors("a.safetensors"))


def test_the_content_decides_and_not_the_name():
    torch.save(STATE, "checkpoint.pth.tar")
    torch.save(STATE, "old.pth.tar", _use_new_zipfile_serialization=False)
    save_file(STATE, "mistaken.bin")
    save_file(STATE, "weights")
    assert all(same(tensors(path)) for path in os.listdir())
    torch.save(STATE, "mistaken.safetensors")
    with pytest.raises(MergeError, match=r"mistaken.safetensors is a file of torch.save .*; let its name end in .pt"):
        open_weights("mistaken.safetensors")


def test_a_folder_with_nothing_but_foreign_weights():
    Path("model.gguf").write_bytes(b"GGUF\x03\0\0\0")
    with pytest.raises(MergeError, match=r"model\.gguf is a GGUF file"):
        open_weights(".")


@pytest.mark.parametrize(
    "content",
    [
        {"model": STATE, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}, "epoch": 3},
        {"model_state_dict": STATE, "optimizer_state_dict": {"state": {"w": {"exp_avg": torch.ones(2)}}}},
        {"teacher": STATE, "config": {"lr": 0.1}},
        {"epoch": torch.tensor(3), "model": STATE},
        {"checkpoint": {"net": STATE}, "rng_state": {"cpu": torch.ones(9)}},
        {"state_dict": {"module": STATE}},
        {"state_dict": STATE, "other": {"weight": torch.zeros(2, 2)}},
        {"model": STATE, "alias": STATE},
        STATE | {"_extra_state": {"scale": torch.ones(3)}},
        STATE | {"meta": {"mean": torch.ones(3)}},
    ],
)
def test_the_one_state_dict_within_a_file_is_read(content: dict):
    torch.save(content, "a.pt")
    assert same(tensors("a.pt"))


def test_of_several_state_dicts_one_must_be_chosen():
    torch.save({"student": {name: tensor + 1 for name, tensor in STATE.items()}, "teacher": STATE}, "dino.pth")
    with pytest.raises(MergeError, match=r"dino.pth holds several state dicts \(student, teacher\)") as raised:
        open_weights("dino.pth")
    remedy = str(raised.value).rpartition(" ")[2].removesuffix(".")
    assert torch.equal(tensors(remedy)["bias"], STATE["bias"] + 1)
    assert torch.equal(tensors("dino.pth#teacher")["bias"], STATE["bias"])


@pytest.mark.parametrize("wrapper", ["_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"])
def test_what_wrappers_put_into_names_is_taken_out(wrapper: str):
    torch.save({f"block.{wrapper}.{name}": tensor for name, tensor in STATE.items()}, "a.ckpt")
    assert same(tensors("a.ckpt"), {f"block.{name}": tensor for name, tensor in STATE.items()})


def test_names_of_real_wrappers():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    layers = nn.Sequential(checkpoint_wrapper(nn.Linear(2, 2)), nn.Linear(2, 2))
    keys = {name: torch.ones(2, 2) for name, _ in layers.named_parameters()}  # state_dict() has none of the first
    assert list(open_weights(keys)) == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_ddp_around_the_module_is_found_by_its_prefix():
    base = {f"layers.{i}.{name}": tensor + i for i in range(4) for name, tensor in STATE.items()}
    expert = {f"module.{name}": tensor + 2 for name, tensor in base.items()}
    torch.save({"state_dict": expert}, "ddp.pth.tar")
    merged = lm.merge(base, ["ddp.pth.tar"], lm.methods.WeightAverage())
    assert torch.equal(merged.weights["layers.3.bias"], base["layers.3.bias"] + 2)


def test_flattened_parameters_are_refused():
    with pytest.raises(MergeError, match="in which FSDP keeps many parameters as one"):
        open_weights({"_fsdp_wrapped_module._flat_param": torch.ones(9)})


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_files_without_the_right_to_read_them():
    for path, save in (("a.safetensors", save_file), ("a.pt", torch.save)):
        save(STATE, path)
        os.chmod(path, 0)
        with pytest.raises(MergeError, match=rf"{path} cannot be read: Permission denied; check your rights"):
            open_weights(path)


def test_a_file_that_cannot_be_opened_is_not_called_damaged(monkeypatch: pytest.MonkeyPatch):
    save_file(STATE, "a.safetensors")
    torch.save(STATE, "a.pt")

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    for path in ("a.safetensors", "a.pt"):
        with pytest.raises(MergeError, match=rf"{path} cannot be read: Permission denied; check your rights"):
            open_weights(path)


def test_no_advice_that_switches_safety_off_is_passed_on():
    with open("plain.pt", "wb") as file:
        pickle.dump({"a": np.ones(2)}, file)
    Path("noise.pt").write_bytes(b"no model at all" * 9)
    for path in ("plain.pt", "noise.pt"):
        with pytest.raises(MergeError) as raised:
            open_weights(path)
        assert not any(word in str(raised.value) for word in ("weights_only", "trusted", "safe_globals"))
    advice = "It failed. Try again with `weights_only=False` if you trust it. Sorry."
    assert first_line(RuntimeError(advice)) == "It failed. Sorry."
    assert first_line(RuntimeError("set trust_remote_code=True")) == "RuntimeError"


def test_a_small_file_that_says_a_lot_is_not_parsed():
    torch.save(STATE, "a.pt")
    lists = b"\x80\x02}q\x00(X\x01\x00\x00\x00aq\x01]q\x02(" + b"]" * 3_000_000 + b"eu."
    with zipfile.ZipFile("a.pt") as old, zipfile.ZipFile("b.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, lists if name.endswith("data.pkl") else old.read(name))
    with pytest.raises(MergeError, match="3,000,021 say what it holds"):
        open_weights("b.pt")


def test_very_many_tensors_and_very_long_names_are_refused(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(MergeError, match="name has 1,001 characters"):
        open_weights({"a" * 1001: torch.ones(1)})
    monkeypatch.setattr("lightning_merge.checkpoints.weights.MOST_TENSORS", 1)
    monkeypatch.setattr("lightning_merge.checkpoints.safetensors_format.MOST_TENSORS", 1)
    save_file(STATE, "a.safetensors")
    for source in (STATE, "a.safetensors"):
        with pytest.raises(MergeError, match="holds 2 tensors, and no more than 1 are read"):
            open_weights(source)
