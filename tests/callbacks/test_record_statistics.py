"""Statistics that Lightning collects: at the end of a fit and in validate, on any number of processes."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning_merge.callbacks import RecordStatistics
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

import lightning_merge as lm
from lightning_merge.evaluation.statistics.collect import Recipe, StatisticsCollector, collect_statistics
from lightning_merge.utilities.processes import Processes
from tests.evaluation.statistics.test_record import assert_equal, by_hand
from tests.toys import quiet_trainer, tiny_expert
from tests.utilities.test_processes import on_processes

EVERYTHING = ("fisher", "gram", "gram_out")
fork = pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")


def fit(*callbacks, data=None, **arguments):
    settings = {"max_epochs": 1, "limit_train_batches": 3, "enable_checkpointing": True, **arguments}
    trainer = quiet_trainer(callbacks=list(callbacks), **settings)
    model = tiny_expert(learning_rate=1e-2)
    trainer.fit(model, datamodule=data or lm.Digits(train_domains=["noisy"], batch_size=64))
    return trainer, model


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
        lm.merge(tiny_expert().state_dict(), {"noisy": "run"}, lm.methods.RegMean(), allow_strangers=True)

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
        for name, callbacks in (("without", []), ("with", [RecordStatistics(output="s.safetensors", batches=2)])):
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


class Stranger(LightningModule):
    """A project's own module, whose weights stay, so that they are the same on any number of processes."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.LayerNorm([4, 4, 4])
        self.hidden = nn.Linear(64, 6)
        self.head = nn.Linear(6, 3)
        self.to(dtype)

    def forward(self, x):
        return self.head(self.hidden(self.norm(self.conv(x)).relu().flatten(1)).relu())

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("loss", nn.functional.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Samples(LightningDataModule):
    """A project's own data: 13 samples, which two or three processes cannot share out evenly."""

    def __init__(self, n=13, **arguments):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(n, 1, 6, 6, generator=draw, dtype=torch.float64)
        self.targets = torch.randint(3, (n,), generator=draw)
        self.arguments = {"batch_size": 6, "shuffle": True, "drop_last": True} | arguments

    def train_dataloader(self):
        return DataLoader(TensorDataset(self.inputs, self.targets), **self.arguments)

    def val_dataloader(self):
        return DataLoader(TensorDataset(self.inputs, self.targets), batch_size=6)


def run(callback, *more, data=None, processes=1, model=None, **arguments):
    parallel = {"devices": processes, "strategy": "ddp_fork"} if processes > 1 else {}
    saving = any(isinstance(one, ModelCheckpoint) for one in more)
    settings = {"max_epochs": 1, "num_sanity_val_steps": 0, "enable_checkpointing": saving, **parallel, **arguments}
    trainer = quiet_trainer(callbacks=[callback, *more], **settings)
    model, data = model or Stranger(), data or Samples()
    if getattr(callback, "when", "fit") == "fit":
        trainer.fit(model, datamodule=data)
    else:
        trainer.validate(model, datamodule=data, verbose=False)
    return trainer


def moments_by_hand(model, inputs):
    """Mean and variance over all samples and places, layer by layer."""
    with torch.no_grad():
        norm = model.norm(model.conv(inputs))
        hidden = model.hidden(norm.relu().flatten(1))
    rows = {"norm": norm.movedim(1, -1).flatten(0, -2), "hidden": hidden}
    found = {f"mean.{name}": x.mean(0) for name, x in rows.items()}
    return found | {f"var.{name}": x.var(0, unbiased=False) for name, x in rows.items()}


class TestAnyProject:
    def test_moments_are_those_of_a_plain_computation(self):
        run(RecordStatistics(["moments"], output="a.safetensors"))
        found, model, data = lm.open_weights("a.safetensors"), Stranger(), Samples()
        expected = moments_by_hand(model, data.inputs)
        assert_equal({name: found[name] for name in expected}, expected, 1e-12)
        assert int(found["count.hidden"]) == 13
        assert int(found["count.norm"]) == 13 * 16
        assert {name.split(".")[0] for name in found} == {"mean", "var", "count", "axis"}
        assert found.header["statistics"]["kinds"] == ["moments"]

    @fork
    @pytest.mark.parametrize("when", ["fit", "validate"])
    def test_one_two_and_three_processes_record_the_same(self, when):
        found = {}
        for processes in (1, 2, 3):
            kinds = [*EVERYTHING, "moments"]
            run(
                RecordStatistics(kinds, labels="true", output=f"{processes}.safetensors", when=when),
                processes=processes,
            )
            found[processes] = lm.open_weights(f"{processes}.safetensors")
        for processes in (1, 2, 3):
            assert found[processes].header["statistics"]["examples"] == 13
            assert_equal(found[processes], found[1], 1e-6)
        assert torch.equal(found[3]["count.norm"], found[1]["count.norm"])
        data = Samples()
        expected = collect_statistics(Stranger(), [(data.inputs, data.targets)], Recipe(EVERYTHING, labels="true"))
        assert_equal({name: found[3][name] for name in expected}, expected, 1e-6)

    @fork
    def test_batches_and_their_gradients_do_not_depend_on_processes(self):
        for processes in (1, 3):
            callback = RecordStatistics(["fisher"], 2, "batch", "true", f"{processes}.safetensors", "validate")
            run(callback, processes=processes)
        one, three = lm.open_weights("1.safetensors"), lm.open_weights("3.safetensors")
        assert one.header["statistics"]["examples"] == three.header["statistics"]["examples"] < 13
        assert_equal(three, one, 1e-6)

    def test_statistics_lie_beside_the_checkpoint_that_is_validated(self):
        lm.save_weights("run/expert.ckpt", Stranger().state_dict())
        callback = RecordStatistics(["fisher", "moments"], when="validate")
        trainer = quiet_trainer(callbacks=[callback])
        model = Stranger()
        nn.init.zeros_(model.head.weight)
        trainer.validate(model, Samples(), ckpt_path="run/expert.ckpt", verbose=False, weights_only=True)
        found = lm.open_weights("run/expert.statistics.safetensors")
        assert found.header["statistics"]["expert"]["digest"] == lm.open_weights("run/expert.ckpt").digest()
        assert found["fisher.hidden.weight"].abs().max() > 0
        with pytest.raises(lm.MergeError, match="of no checkpoint, beside which to write"):
            trainer.validate(model, Samples(), verbose=False)

    def test_a_sampler_with_random_numbers_of_its_own_draws_as_without(self):
        class Drawn(Samples):
            def train_dataloader(self):
                draw = torch.Generator().manual_seed(5)
                sampler = WeightedRandomSampler([1.0] * 13, 13, generator=draw)
                return DataLoader(TensorDataset(self.inputs, self.targets), 4, sampler=sampler)

        with_, without = Stranger(), Stranger()
        run(RecordStatistics(["moments"], output="a.safetensors"), data=Drawn(), model=with_)
        run(Callback(), data=Drawn(), model=without)
        assert torch.equal(with_.head.weight, without.head.weight)

    def test_a_checkpoint_that_leaves_out_what_is_frozen(self):
        class Partly(Stranger):
            def on_save_checkpoint(self, checkpoint):
                checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if "head" in k}

        run(RecordStatistics(["fisher"]), ModelCheckpoint(dirpath="run", filename="part"), model=Partly())
        assert "fisher.hidden.weight" in lm.open_weights("run/part.statistics.safetensors")

    def test_a_validation_within_a_fit_records_nothing(self):
        trainer = quiet_trainer(callbacks=[RecordStatistics(output="a.safetensors", when="validate")], max_epochs=1)
        trainer.fit(Stranger(), datamodule=Samples())
        assert not Path("a.safetensors").exists()

    def test_a_fast_dev_run_tries_it_and_writes_nothing(self, monkeypatch):
        seen, update = [], StatisticsCollector.update
        monkeypatch.setattr(StatisticsCollector, "update", lambda self, x, y: seen.append(len(x)) or update(self, x, y))
        run(RecordStatistics(["moments"]), fast_dev_run=1)
        run(RecordStatistics(["moments"], output="a.safetensors", when="validate"), fast_dev_run=2)
        assert len(seen) == 1 + 2
        assert list(Path().rglob("*.safetensors")) == []

    def test_twice_in_one_trainer_with_accumulation_and_from_a_checkpoint(self):
        checkpoint = ModelCheckpoint(dirpath="run", filename="{epoch}")
        trainer = run(RecordStatistics(["moments"]), checkpoint, accumulate_grad_batches=2)
        first = lm.open_weights("run/epoch=0.statistics.safetensors")
        trainer.fit_loop.max_epochs = 2
        trainer.fit(Stranger(), datamodule=Samples(), ckpt_path="run/epoch=0.ckpt")
        assert_equal(lm.open_weights("run/epoch=1.statistics.safetensors"), first, 1e-12)

    def test_beside_the_average_are_the_statistics_of_the_average(self):
        averaging = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging")
        model = Stranger()
        model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=0.5)
        checkpoint = ModelCheckpoint(dirpath="run", filename="average")
        run(
            RecordStatistics(["moments"]),
            averaging.EMAWeightAveraging(decay=0.5),
            checkpoint,
            model=model,
            max_epochs=3,
        )
        average = Stranger()
        average.load_state_dict(dict(lm.open_weights("run/average.ckpt")))
        expected = moments_by_hand(average, Samples().inputs)
        found = lm.open_weights("run/average.statistics.safetensors")
        assert_equal({name: found[name] for name in expected}, expected, 1e-12)
        assert found.header["statistics"]["expert"]["digest"] == lm.open_weights("run/average.ckpt").digest()

    def test_what_is_not_finite_is_said(self):
        data = Samples()
        data.inputs[3, 0, 0, 0] = float("nan")
        with pytest.raises(lm.MergeError, match="activations at norm are not finite"):
            run(RecordStatistics(["moments"], output="a.safetensors", when="validate"), data=data)
        assert not Path("a.safetensors").exists()

    def test_what_cannot_be_written(self):
        Path("folder.safetensors").mkdir()
        with pytest.raises(lm.MergeError, match="it is a folder"):
            run(RecordStatistics(output="folder.safetensors"))
        with pytest.raises(lm.MergeError, match="when must be fit or validate"):
            RecordStatistics(when="test")


@fork
@pytest.mark.parametrize("fisher", ["example", "batch"])
@pytest.mark.parametrize("count", [1, 3])
def test_a_process_that_fails_stops_the_others(fisher, count):
    """It fails after as many batches; in one case the others have no more of them by then."""
    data = Samples()

    def work(rank):
        def batches():
            for start in range(3):
                if rank == 1 and start == count - 1:
                    raise lm.MergeError("The sample cannot be read.")
                yield data.inputs[start : start + 2], data.targets[start : start + 2]

        collector = StatisticsCollector(Stranger(), recipe=Recipe(("fisher",), fisher), processes=Processes(True))
        collector.update_all(batches())

    _, errors = on_processes(2, work)
    assert all("The sample cannot be read." in error for error in errors)


@fork
def test_unequal_numbers_of_batches_are_an_error_where_batches_count():
    data = Samples()

    def work(rank):
        collector = StatisticsCollector(Stranger(), recipe=Recipe(("fisher",), "batch"), processes=Processes(True))
        collector.update_all([(data.inputs, data.targets)] * (1 + rank))

    _, errors = on_processes(2, work)
    assert all("different numbers of batches" in error for error in errors)
