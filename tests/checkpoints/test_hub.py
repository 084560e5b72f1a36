"""Models on the Hugging Face Hub, which no test asks: what the library would fetch is in a folder."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

import huggingface_hub
import pytest
import torch

from lightning_merge.checkpoints import open_weights, save_weights
from lightning_merge.utilities.errors import MergeError
from tests.toys import base_weights


@pytest.fixture
def asked(monkeypatch) -> list[tuple]:
    """What the library is asked for; it finds what is in the folder ``remote``."""
    calls: list[tuple] = []

    def snapshot_download(name, revision=None, allow_patterns=()):
        calls.append((name, revision, allow_patterns[0]))
        for file in Path("remote").iterdir():
            if any(fnmatchcase(file.name, pattern) for pattern in allow_patterns):
                Path("cache").mkdir(exist_ok=True)
                (Path("cache") / file.name).write_bytes(file.read_bytes())
        return "cache"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_safetensors_are_fetched_and_pickles_are_not(asked):
    save_weights("remote/model.safetensors", base_weights())
    save_weights("remote/pytorch_model.bin", base_weights(seed=1))
    opened = open_weights("hf-hub:somebody/model@v2")
    assert torch.equal(opened["mlp.weight"], base_weights()["mlp.weight"])
    assert opened.name == "hf-hub:somebody/model@v2"
    assert asked == [("somebody/model", "v2", "*.safetensors")]


def test_pickles_where_there_is_nothing_else(asked):
    save_weights("remote/pytorch_model.bin", base_weights())
    assert torch.equal(open_weights("hf-hub:somebody/model")["mlp.weight"], base_weights()["mlp.weight"])
    assert [patterns for _, _, patterns in asked] == ["*.safetensors", "*.bin"]


def test_a_model_without_weights(asked):
    Path("remote").mkdir()
    Path("cache").mkdir()
    with pytest.raises(MergeError, match="hf-hub:a/b holds neither"):
        open_weights("hf-hub:a/b")


@pytest.mark.parametrize("name", ["nobody/nothing", "no name at all"])
def test_what_cannot_be_fetched_is_said(name):
    """The tests run offline, so that the library itself refuses."""
    with pytest.raises(MergeError, match=f"hf-hub:{name} cannot be fetched"):
        open_weights(f"hf-hub:{name}")
