"""``--ckpt_path`` adds to the model that the user has named, and never chooses code."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import nn

import lightning_merge as lm
from lightning_merge.trainer import MergeCLI
from lightning_merge.trainer.cli import main

QUIET = ["--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.fast_dev_run=true"]


@pytest.fixture
def hostile(monkeypatch):
    Path("hostile.py").write_text(
        "from pathlib import Path\nimport lightning_merge as lm\nfrom torch import nn\nPath('ran').touch()\n"
        "class Model(lm.Expert):\n    pass\n"
        "class Net(nn.Linear):\n    num_features = 64\n"
    )
    monkeypatch.syspath_prepend(str(Path.cwd()))
    yield
    sys.modules.pop("hostile", None)


def write(**hyper_parameters) -> str:
    lm.save_weights("a.ckpt", {"w": torch.ones(2)}, hyper_parameters=hyper_parameters)
    return "--ckpt_path=a.ckpt"


def fails(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*arguments, *QUIET])
    assert ended.value.code not in (0, None)
    return capsys.readouterr().err


EXPERT = ["--model=Expert", "--model.backbone=timm/resnet18", "--model.num_classes=10", "--model.pretrained=false"]


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize(
    "stated",
    [
        {"_class_path": "hostile.Model", "backbone": "timm/resnet18", "num_classes": 10},
        {"_class_path": "os.system", "command": "touch ran"},
        {"_class_path": "lightning_merge.models.Expert", "backbone": "python/hostile.Net", "num_classes": 10},
        {"backbone": "python/hostile.Net", "num_classes": 10},
    ],
)
def test_a_checkpoint_names_no_code(hostile, capsys, verb, stated):
    message = fails(capsys, verb, *EXPERT, "--data=Digits", write(**stated))
    assert "a.ckpt" in message
    assert "say so yourself: --model" in message
    assert not Path("ran").exists()


def test_without_a_model_on_the_command_line(hostile, capsys):
    message = fails(capsys, "test", "--data=Digits", write(_class_path="hostile.Model", num_classes=10))
    assert "a file may not choose which code runs" in message
    assert not Path("ran").exists()


@pytest.mark.parametrize("verb", ["merge", "statistics", "evaluate"])
def test_other_verbs_do_not_read_it(hostile, capsys, verb):
    message = fails(capsys, verb, *EXPERT, write(_class_path="hostile.Model", backbone="python/hostile.Net"))
    assert "hostile" not in message
    assert not Path("ran").exists()


def test_no_config_switches_a_loader_s_safety_off(capsys):
    arguments = ['--model.backbone_args={"trust_remote_code": true}', "--data=Digits"]
    assert "trust_remote_code=True; no loader's safety" in fails(capsys, "test", *EXPERT, *arguments)
    assert "weights_only=False; no loader's safety" in fails(
        capsys, "test", *EXPERT, "--data=Digits", "--weights_only=false"
    )


class Project(LightningModule):
    """A module of a project's own, with arguments that the command line turns into objects."""

    def __init__(self, hidden: int = 2, net: nn.Module | None = None, optimizer: OptimizerCallable = torch.optim.SGD):
        super().__init__()
        self.save_hyperparameters("hidden")
        self.layer = nn.Linear(3, hidden)

    def predict_step(self, batch):
        return self.layer(batch)

    def predict_dataloader(self):
        return [torch.ones(1, 3)]


def project(*arguments: str):
    command = ["predict", *QUIET, *arguments]
    return MergeCLI(Project, args=command, save_config_callback=None)


def test_plain_values_reach_a_model_of_a_project():
    lm.save_weights("a.ckpt", Project(5).state_dict(), hyper_parameters={"hidden": 5})
    assert project("--ckpt_path=a.ckpt").model.layer.out_features == 5


@pytest.mark.parametrize(
    "stated",
    [
        {"net": {"class_path": "hostile.Net", "init_args": {"in_features": 1, "out_features": 1}}},
        {"optimizer": "hostile.Model"},
        {"optimizer": {"class_path": "hostile.Net"}},
        {"_class_path": "hostile.Model"},
    ],
)
def test_code_does_not(hostile, capsys, stated):
    write(**stated)
    with pytest.raises(SystemExit):
        project("--ckpt_path=a.ckpt")
    assert "a file may not choose which code runs" in capsys.readouterr().err
    assert not Path("ran").exists()


def test_unless_the_user_says_the_same():
    arguments = {"in_features": 1, "out_features": 1, "bias": True, "device": None, "dtype": None}
    net = {"class_path": "torch.nn.Linear", "init_args": arguments}
    lm.save_weights("a.ckpt", Project(5).state_dict(), hyper_parameters={"hidden": 5, "net": net})
    said = ["--model.net=torch.nn.Linear", "--model.net.in_features=1", "--model.net.out_features=1"]
    assert project("--ckpt_path=a.ckpt", *said).model.layer.out_features == 5
