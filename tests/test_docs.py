"""The code in the documents runs, and SECURITY.md says what is the case."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from safetensors.torch import load_file, save_file

from lightning_merge import open_weights
from lightning_merge.__main__ import main
from lightning_merge.checkpoints import hyper_parameters
from lightning_merge.data.task_files import read_task
from lightning_merge.methods import DARE
from lightning_merge.models.from_file import read_hyper_parameters
from lightning_merge.utilities.errors import MergeError
from lightning_merge.utilities.locking import LOCK
from lightning_merge.utilities.terminal import visible
from tests.conftest import ROOT
from tests.toys import base_weights, expert_weights

BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / "docs/adding_a_method.md").read_text(), re.M | re.S)


@pytest.fixture
def written(tmp_path, monkeypatch):
    """The files of the document in an empty folder, which is the current one."""
    monkeypatch.syspath_prepend(tmp_path)
    for language, code in BLOCKS:
        if language == "python":
            Path(re.match(r"# (\w+\.py)\n", code)[1]).write_text(code)
    yield
    sys.modules.pop("trimmed_mean", None)


def test_adding_a_method(written):
    assert len(Path("trimmed_mean.py").read_text().splitlines()) < 50
    runpy.run_path("make_golden.py")
    tests = [test for name, test in runpy.run_path("test_trimmed_mean.py").items() if name.startswith("test_")]
    assert len(tests) == 3
    for test in tests:
        test()


def test_the_method_on_the_command_line(written):
    from trimmed_mean import TrimmedMean

    base = base_weights()
    experts = [expert_weights(base, i) for i in range(3)]
    for name, state in zip(("base", "a", "b", "c"), (base, *experts), strict=True):
        save_file(state, f"{name}.safetensors")
    (command,) = [code for language, code in BLOCKS if language == "bash"]
    python, module, package, *args = shlex.split(command)
    assert (python, module, package) == ("python", "-m", "lightning_merge")
    main(args)
    merged = load_file("merged.safetensors")
    median = torch.stack([expert["mlp.weight"] for expert in experts]).median(dim=0).values  # one of three is left
    torch.testing.assert_close(merged["mlp.weight"], median)

    (config,) = [code for language, code in BLOCKS if language == "yaml"]
    Path("dare.yaml").write_text(config)
    main(["merge", "--config=dare.yaml", *args[args.index("--base") :]])
    expected = DARE(drop=0.5, method=TrimmedMean(beta=0.4)).describe()
    assert open_weights("merged.safetensors").header["merge"]["method"] == expected


SECURITY = (ROOT / "SECURITY.md").read_text(encoding="utf-8")


def test_security_names_every_argument_that_is_refused():
    for name, value in hyper_parameters.UNSAFE.items():
        assert f"`{name}={value}`" in SECURITY
        assert list(hyper_parameters.unsafe_arguments({"a": [{name: value}]})) == [f"{name}={value}"]


def test_security_names_what_there_is():
    words = set(re.findall(r"`([^`]+)`", SECURITY))
    assert f"`{LOCK}`" in SECURITY
    assert {word for word in words if word.startswith("--")} == {"--ckpt_path", "--model", "--model.backbone"}
    assert hyper_parameters.OWN_MODELS[0] in words
    for name in ("timm/vit_base", "open_clip/ViT-B-32", *hyper_parameters.OWN_BACKBONES):
        assert hyper_parameters.backbone_problem(name) is None
    assert "say so yourself: --model.backbone" in str(hyper_parameters.backbone_problem("python/os.system"))
    assert visible("\x1b\u202e") == r"\x1b\u202e"
    assert {r"\x1b", r"\u202e"} <= words
    assert list(hyper_parameters.without_code({"backbone": "python/os.system", "lr": 0.1})) == ["lr"]


def test_the_compromised_releases_are_excluded():
    (lightning,) = re.findall(r'"(lightning[^_"]*)"', (ROOT / "pyproject.toml").read_text().split("dependencies")[1])
    allowed = Requirement(lightning).specifier
    for version in re.findall(r"\b2\.6\.\d", SECURITY):
        assert version not in allowed
    assert all(version in allowed for version in ("2.4.0", "2.6.1", "2.6.4"))


@pytest.mark.parametrize("text", ["!!python/object/apply:os.system [touch ran]", "a: !!python/name:os.system"])
def test_yaml_of_a_file_runs_nothing(text):
    Path("hparams.yaml").write_text(text)
    with pytest.raises(MergeError, match=r"hparams\.yaml"):
        read_hyper_parameters("hparams.yaml")
    assert not Path("ran").exists()


@pytest.mark.parametrize("suffix", [".ckpt", ".npz"])
def test_no_pickle_runs(suffix):
    class Runs:
        def __reduce__(self):
            return Path.touch, (Path("ran"),)

    path = Path(f"file{suffix}")
    if suffix == ".npz":
        np.savez(path, **dict.fromkeys(("train_images", "classes"), np.array([Runs()], dtype=object)))
    else:
        torch.save({"state_dict": {"w": torch.ones(1)}, "hyper_parameters": {"a": Runs()}}, path)
    with pytest.raises(MergeError, match="file"):
        read_task(path) if suffix == ".npz" else open_weights(path)
    assert not Path("ran").exists()
