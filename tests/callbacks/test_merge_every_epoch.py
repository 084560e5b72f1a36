"""What the running weights are worth in a merge: the right numbers, and a fit that does not notice."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning_merge.callbacks import MergeEveryEpoch

import lightning_merge as lm
from lightning_merge.methods import SCORE, RandMix, WeightAverage
from tests.own_project import Classifier, data, loader, plain, processes, quiet, save, weights

EXPERTS = {"base": "0.ckpt", "experts": {"one": "1.ckpt", "two": "2.ckpt"}}


def fit(*callbacks, ckpt_path=None, module=None, **arguments):
    """Fit with dropout, shuffled; the trainer."""
    seed_everything(3)
    module = module or Classifier(dropout=0.5)
    train = torch.utils.data.DataLoader(data(20, seed=7), batch_size=4, shuffle=True)
    trainer = quiet(callbacks=list(callbacks), **arguments)
    trainer.fit(module, train, loader(), ckpt_path=ckpt_path)
    return trainer


class Record(Callback):
    """Keeps what was validated: the module's weights in its validation, and the metrics after it."""

    def __init__(self) -> None:
        self.states, self.metrics, self.gradients = [], [], []

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        if not trainer.sanity_checking and batch_idx == 0:
            self.states.append({name: tensor.clone() for name, tensor in pl_module.state_dict().items()})

    def on_validation_end(self, trainer, pl_module) -> None:
        if not trainer.sanity_checking:
            self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def value_of(state) -> dict[str, float]:
    module = Classifier()
    module.load_state_dict(state)
    return plain(quiet().validate(module, loader(), verbose=False)[0])


def merged(state, method) -> dict[str, float]:
    """What a separate validation says of the merge of these running weights."""
    experts = {**EXPERTS["experts"], "this run": state}
    return value_of(lm.merge("0.ckpt", experts, method).weights)


@pytest.fixture(autouse=True)
def _experts():
    save(0, 1, 2)


def test_the_numbers_of_a_merge_in_a_separate_validation():
    record = Record()
    fit(record, MergeEveryEpoch(**EXPERTS, methods={"mean": WeightAverage(), "SCORE": SCORE()}))
    assert len(record.states) == 2
    for state, logged in zip(record.states, record.metrics, strict=True):
        assert {n: logged[n] for n in value_of(state)} == pytest.approx(value_of(state), rel=1e-6)
        for row, method in {"mean": WeightAverage(), "SCORE": SCORE()}.items():
            expected = {f"{row}/{name}": value for name, value in merged(state, method).items()}
            assert {name: logged[name] for name in expected} == pytest.approx(expected, rel=1e-6)


class Final(Callback):
    """Writes the weights, the optimizer's state and the next random numbers at the end of a fit."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_end(self, trainer, pl_module) -> None:
        state = {"weights": pl_module.state_dict(), "optimizer": trainer.optimizers[0].state_dict()}
        state["gradients"] = [parameter.grad for parameter in pl_module.parameters()]
        torch.save({**state, "random": torch.rand(3)}, f"{self.path}-{trainer.global_rank}.pt")


def averaging() -> list[Callback]:
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    if not hasattr(callbacks, "EMAWeightAveraging"):
        pytest.skip("this Lightning averages no weights")
    return [callbacks.EMAWeightAveraging(decay=0.5)]


@pytest.mark.parametrize(
    ("count", "ema", "arguments"),
    [
        (1, False, {"val_check_interval": 2}),
        (1, False, {"accumulate_grad_batches": 2, "precision": "bf16-mixed"}),
        (1, True, {}),
        (2, True, {"accumulate_grad_batches": 2}),
    ],
)
def test_the_fit_does_not_notice_to_the_last_bit(count, ema, arguments):
    for path in ("with", "without"):
        methods = {"mean": WeightAverage(), "random": RandMix()}
        callbacks = [MergeEveryEpoch(**EXPERTS, methods=methods)] if path == "with" else []
        fit(*callbacks, *(averaging() if ema else []), Final(path), **processes(count), **arguments)
    for rank in range(count):
        one, other = (torch.load(f"{path}-{rank}.pt") for path in ("with", "without"))
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("first", [True, False])
def test_the_average_is_merged_wherever_the_callback_stands(first):
    record, callback, ema = Record(), MergeEveryEpoch(**EXPERTS, method=WeightAverage()), averaging()
    fit(*([callback, *ema] if first else [*ema, callback]), record)
    for state, logged in zip(record.states, record.metrics, strict=True):
        assert logged["merged/val/loss"] == pytest.approx(merged(state, WeightAverage())["val/loss"], rel=1e-6)


def test_the_same_numbers_on_two_processes():
    """The weights of the fit are not the same, so that the learning rate is zero."""

    class Still(Classifier):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    class Save(Record):
        def on_validation_end(self, trainer, pl_module):
            super().on_validation_end(trainer, pl_module)
            torch.save(self.metrics, f"{trainer.world_size}-{trainer.global_rank}.pt")

    def still():
        module = Still()
        module.load_state_dict(weights(5))
        module.net[1].momentum = 0.0
        return module

    for count in (1, 2):
        fit(Save(), MergeEveryEpoch(**EXPERTS, method=WeightAverage()), module=still(), **processes(count))
    alone = torch.load("1-0.pt")[-1]
    for rank in range(2):
        found = torch.load(f"2-{rank}.pt")[-1]
        names = [name for name in alone if name.startswith("merged/") and "batches" not in name]
        assert {name: found[name] for name in names} == pytest.approx({name: alone[name] for name in names}, rel=1e-6)
        assert found["merged/val/accuracy"] == alone["merged/val/accuracy"]


def test_checkpoints_and_early_stopping_monitor_the_merged_model():
    record = Record()
    checkpoint = ModelCheckpoint(dirpath="best", monitor="merged/val/accuracy", mode="max")
    stopping = EarlyStopping("merged/val/loss", patience=9)
    fit(MergeEveryEpoch(**EXPERTS), checkpoint, stopping, record, max_epochs=4, enable_checkpointing=True)
    best = max(metrics["merged/val/accuracy"] for metrics in record.metrics)
    assert float(checkpoint.best_model_score) == pytest.approx(best)
    assert float(stopping.best_score) == pytest.approx(min(m["merged/val/loss"] for m in record.metrics))


def test_a_fit_that_is_resumed_counts_on():
    checkpoint = ModelCheckpoint(dirpath="run", save_last=True)
    logger = CSVLogger("whole")
    fit(MergeEveryEpoch(**EXPERTS, every_n=2), checkpoint, max_epochs=3, enable_checkpointing=True, logger=logger)
    resumed = MergeEveryEpoch(**EXPERTS, every_n=2)
    record = Record()
    fit(resumed, Final("resumed"), record, ckpt_path="run/last.ckpt", max_epochs=4)
    assert len(record.metrics) == 1
    assert "merged/val/loss" in record.metrics[0]
    assert resumed.state_dict() == {"validations": 4}
    fit(Final("plain"), ckpt_path="run/last.ckpt", max_epochs=4)
    one, other = torch.load("resumed-0.pt"), torch.load("plain-0.pt")
    torch.testing.assert_close(one["weights"], other["weights"], rtol=0, atol=0)


def test_every_second_validation():
    record = Record()
    fit(record, MergeEveryEpoch(**EXPERTS, every_n=2))
    assert ["merged/val/loss" in metrics for metrics in record.metrics] == [False, True]


def test_what_is_there_at_every_second_validation_cannot_be_monitored():
    callbacks = [MergeEveryEpoch("base.ckpt", ["a.ckpt"], every_n=2), ModelCheckpoint(monitor="merged/val_loss")]
    with pytest.raises(lm.MergeError, match="measures it in one of 2 only; leave every_n at 1"):
        fit(*callbacks, enable_checkpointing=True)


def test_fast_dev_run_and_twice_in_one_trainer():
    record = Record()
    fit(MergeEveryEpoch(**EXPERTS), record, fast_dev_run=True)
    trainer = fit(MergeEveryEpoch(**EXPERTS), record, max_epochs=1)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(Classifier(), loader(), loader())
    assert ["merged/val/loss" in metrics for metrics in record.metrics] == [True] * 3


def test_the_head_of_this_run_is_kept():
    record = Record()
    fit(record, MergeEveryEpoch(**EXPERTS, method=WeightAverage(), exclude=["head.*"]), max_epochs=1)
    experts = [lm.open_weights(path) for path in EXPERTS["experts"].values()] + [record.states[0]]
    expected = lm.merge("0.ckpt", experts, WeightAverage(), exclude=["head.*"]).weights
    expected |= {name: tensor for name, tensor in record.states[0].items() if name.startswith("head.")}
    assert record.metrics[0]["merged/val/loss"] == pytest.approx(value_of(expected)["val/loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"experts": ["gone.ckpt"]}, r"no file or folder gone\.ckpt"),
        ({"every_n": 0}, "every_n is 0"),
        ({"method": SCORE(), "methods": {"a": SCORE()}}, "leave one of them out"),
        ({"name": "one"}, "called 'one', and so is one of the experts"),
    ],
)
def test_what_cannot_work_is_said_before_the_fit(arguments, message):
    with pytest.raises(lm.MergeError, match=message):
        fit(MergeEveryEpoch(**EXPERTS | arguments))
