"""Statistics that Lightning collects: at the end of a fit and in validate, on any number of processes."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning_merge.callbacks import RecordStatistics
from torch.utils.data import DataLoader, TensorDataset

import lightning_merge as lm
from lightning_merge.collect_statistics import collect_statistics
from tests.toys import quiet_trainer, tiny_expert

EVERYTHING = ("fisher", "gram", "gram_out")
fork = pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")


def fit(*callbacks, data=None, **arguments):
    settings = {"max_epochs": 1, "limit_train_batches": 3, "enable_checkpointing": True, **arguments}
    trainer = quiet_trainer(callbacks=list(callbacks), **settings)
    model = tiny_expert(learning_rate=1e-2)
    trainer.fit(model, datamodule=data or lm.Digits(train_domains=["noisy"], batch_size=64))
    return trainer, model


def assert_equal(found, expected, tolerance=1e-6):
    """To a share of the largest entry of each tensor."""
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() <= tolerance * tensor.abs().max(), name


def by_hand(model, recipe, domain="noisy", batch_size=64):
    """Over the plain training split, without Lightning."""
    data = lm.Digits()
    images, labels = data.dataset(domain, data.split(domain, "train"), augment=False)[:]
    batches = zip(images.split(batch_size), labels.split(batch_size), strict=True)
    return collect_statistics(model, batches, recipe)


class TestRecordStatistics:
    def test_beside_the_last_checkpoint(self):
        callback = RecordStatistics(EVERYTHING, labels="true")
        _, model = fit(callback, ModelCheckpoint(dirpath="run", filename="expert"))
        found = lm.open_weights("run/expert.statistics.safetensors")
        assert_equal(found, by_hand(model, callback.recipe), 1e-5)
        noted = found.header["statistics"]
        assert noted["examples"] == 1257
        assert noted["kinds"] == list(EVERYTHING)
        assert noted["expert"]["digest"] == lm.open_weights("run").digest()
        assert noted["expert"]["digest"] == lm.open_weights(model.state_dict()).digest()
        lm.merge(tiny_expert().state_dict(), {"noisy": "run"}, lm.methods.RegMean())

    def test_of_the_checkpoint_that_was_monitored(self):
        class Worse(Callback):
            def on_validation_end(self, trainer, pl_module):
                with torch.no_grad():
                    pl_module.head.bias += 1000 * trainer.current_epoch * torch.arange(10)

        checkpoint = ModelCheckpoint(dirpath="run", filename="best", monitor="val/accuracy", mode="max")
        callback = RecordStatistics(["gram"])
        _, model = fit(callback, Worse(), checkpoint, max_epochs=3)
        best = tiny_expert()
        best.load_state_dict(dict(lm.open_weights(checkpoint.best_model_path)))
        assert not torch.equal(best.head.bias, model.head.bias)
        beside = Path(checkpoint.best_model_path).with_suffix(".statistics.safetensors")
        assert_equal(lm.open_weights(beside), by_hand(best, callback.recipe), 1e-5)

    def test_the_fit_s_model_and_random_numbers_stay(self):
        after = {}
        for name, callbacks in (("without", []), ("with", [RecordStatistics(output="s.safetensors")])):
            torch.manual_seed(3)
            np.random.seed(3)
            random.seed(3)
            _, model = fit(*callbacks, enable_checkpointing=False)
            draws = torch.rand(1).item(), np.random.rand(), random.random()
            after[name] = lm.open_weights(model.state_dict()).digest(), model.training, draws
        assert after["with"] == after["without"]

    @fork
    @pytest.mark.parametrize("fisher", ["example", "batch"])
    def test_two_processes_collect_what_one_does(self, fisher):
        lm.save_weights("start.ckpt", tiny_expert().state_dict())
        found = {}
        for processes in (1, 2):
            arguments = {"devices": processes, "strategy": "ddp_fork" if processes > 1 else "auto"}
            callback = RecordStatistics(EVERYTHING, fisher=fisher, labels="true", output=f"{processes}.safetensors")
            torch.manual_seed(0)
            fit(callback, enable_checkpointing=False, limit_train_batches=1, precision="64-true", **arguments)
            found[processes] = lm.open_weights(f"{processes}.safetensors")
        assert found[2].header["statistics"]["examples"] == 1257
        assert_equal(found[2], found[1], 1e-6)

    def test_the_data_of_a_stranger(self):
        class Data(LightningDataModule):
            def setup(self, stage):
                assert stage == "fit"
                self.samples = TensorDataset(torch.randn(7, 1, 8, 8), torch.arange(7))

            def train_dataloader(self):
                return DataLoader(self.samples, batch_size=3, shuffle=True)

        fit(RecordStatistics(["gram"], output="a.safetensors"), data=Data(), limit_val_batches=0)
        assert lm.open_weights("a.safetensors").header["statistics"]["examples"] == 7
        path = lm.save_weights("expert.ckpt", tiny_expert().state_dict())
        quiet_trainer().statistics(tiny_expert(), Data(), str(path), ["gram"])
        assert lm.open_weights("expert.statistics.safetensors").header["statistics"]["examples"] == 7

    def test_what_cannot_work_is_said_before_the_fit(self):
        with pytest.raises(lm.MergeError, match="no checkpoint is written"):
            fit(RecordStatistics(), enable_checkpointing=False)
        with pytest.raises(lm.MergeError, match="kinds must be of"):
            RecordStatistics(["grams"])
