"""What a callback must know before the fit: what its checkpoints will hold, and whether the module can be called."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_merge.callbacks import MergeAfterFit, RecordStatistics, SaveTaskVector
from torch.utils.data import DataLoader, TensorDataset

import lightning_merge as lm


class Net(LightningModule):
    steps = 0

    def __init__(self, root="text", width=2):
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(width, width)

    def training_step(self, batch, index):
        type(self).steps += 1
        loss = torch.nn.functional.cross_entropy(self.layer(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Callable(Net):
    def forward(self, x):
        return self.layer(x)


class Data(LightningDataModule):
    def __init__(self, where="here"):
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.ones(8, 2), torch.zeros(8, dtype=torch.long)), batch_size=4)


def fit(module, callback, data=None, root=".", **arguments):
    Net.steps = Callable.steps = 0
    callbacks = [ModelCheckpoint(), callback] if arguments.get("enable_checkpointing", True) else [callback]
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(max_epochs=1, default_root_dir=root, callbacks=callbacks, **quiet, **arguments)
    trainer.fit(module, datamodule=data or Data())


@pytest.fixture
def merge():
    lm.save_weights("base.ckpt", Net().state_dict())
    lm.save_weights("e.ckpt", Net().state_dict())
    return MergeAfterFit("base.ckpt", ["e.ckpt"], lm.methods.WeightAverage())


@pytest.mark.parametrize("who", ["MergeAfterFit", "SaveTaskVector", "RecordStatistics"])
def test_hyper_parameters_that_no_checkpoint_can_give_back(merge, who):
    callbacks = {
        "MergeAfterFit": merge,
        "SaveTaskVector": SaveTaskVector("base.ckpt"),
        "RecordStatistics": RecordStatistics(kinds=["fisher"]),
    }
    with pytest.raises(lm.MergeError, match=rf"{who} reads a checkpoint .*: root is a PosixPath\. .*ignore=\['root'\]"):
        fit(Callable(Path("x")), callbacks[who])
    assert Callable.steps == 0


def test_hyper_parameters_of_the_data_are_in_the_checkpoint_too(merge):
    with pytest.raises(lm.MergeError, match="where is a PosixPath"):
        fit(Net(), merge, Data(Path("x")))
    assert Net.steps == 0


def test_plain_hyper_parameters_and_those_that_are_not_written_are_no_fault(merge):
    fit(Net([1, {"a": torch.ones(2), "b": None}]), merge)
    assert Net.steps == 2
    fit(Net(Path("x")), MergeAfterFit("base.ckpt", ["e.ckpt"], output="m.ckpt"), enable_checkpointing=False)
    assert Path("m.ckpt").exists()
    fit(Net(lambda: 1), MergeAfterFit("base.ckpt", ["e.ckpt"], output="n.ckpt"))  # Lightning leaves it out


def test_a_module_without_forward(merge):
    with pytest.raises(
        lm.MergeError, match=r"RecordStatistics runs the model by calling it, and Net has no forward\(\)"
    ):
        fit(Net(), RecordStatistics(kinds=["fisher"]))
    assert Net.steps == 0
    module = Net()
    module.forward = module.layer.forward
    fit(module, RecordStatistics(kinds=["gram"]))
    assert list(Path().rglob("*.statistics.safetensors"))


def test_runs_whose_folder_is_in_a_store(merge):
    MemoryFileSystem.store.clear()
    fit(Callable(), merge, root="memory://runs")
    fit(Callable(), SaveTaskVector("base.ckpt"), root="memory://runs")
    fit(Callable(), RecordStatistics(kinds=["gram"]), root="memory://runs")
    written = [Path(name).name for name in fsspec.filesystem("memory").find("/runs")]
    assert sum(name.endswith(".task_vector.safetensors") for name in written) == 1
    assert sum(name.endswith(".statistics.safetensors") for name in written) == 1
    assert not list(Path().glob("memory*"))
    assert set(lm.open_weights("merged.ckpt")) == {"layer.weight", "layer.bias"}
