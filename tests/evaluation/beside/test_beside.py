"""Other weights in the module itself: the numbers of separate evaluations, and a module that is left as it was."""

from __future__ import annotations

import copy
import csv
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning_merge.callbacks import CompareMerged, MergeEveryEpoch
from torch.nn import functional as F

import lightning_merge as lm
from lightning_merge.methods import WeightAverage
from tests.evaluation.beside.kinds import (
    KINDS,
    BankOfTheEpoch,
    CompiledMethod,
    Kind,
    LayersOfSetup,
    PrototypesInSetup,
    batches,
)
from tests.own_project import Classifier, data, loader, plain, processes, quiet, weights
from tests.toys import tiny_vgg


def beside(module, candidates, loaders, **arguments) -> dict[str, dict[str, float]]:
    """The rows of candidates beside the module's own weights, in ``test``."""
    for row, state in candidates.items():
        lm.save_weights(f"{row}.ckpt", state)
    callback = CompareMerged({row: f"{row}.ckpt" for row in candidates}, output="table.csv")
    quiet(callbacks=[callback], **arguments).test(module, loaders, verbose=False)
    records = csv.DictReader(Path("table.csv").read_text().splitlines())  # the callback may be another process's
    return {record.pop("candidate"): {k: float(v) for k, v in record.items() if v} for record in records}


def alone(module, state, loaders, **arguments) -> dict[str, float]:
    """What a separate ``trainer.test`` says of the weights."""
    module = copy.deepcopy(module)
    module.load_state_dict(state)
    logged = {}
    for results in quiet(**arguments).test(module, loaders, verbose=False):
        logged |= plain(results)
    return logged


CANDIDATES = {"a": weights(1), "b": weights(2)}


def check(module, loaders, candidates=CANDIDATES, **arguments) -> dict[str, dict[str, float]]:
    """Compare with separate evaluations, to the last bit."""
    before = copy.deepcopy(module.state_dict())
    rows = beside(module, candidates, loaders, **arguments)
    for row, state in candidates.items():
        assert rows[row] == alone(module, state, loaders, **arguments)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    return rows


def test_a_module_that_logs_numbers_and_metrics():
    rows = check(Classifier(), loader())
    assert list(rows["a"]) == ["test/accuracy", "test/loss", "test/largest", "test/labels"]
    assert rows["a"] != rows["b"]


@pytest.mark.parametrize("inference_mode", [True, False])
def test_several_loaders(inference_mode):
    loaders = [loader(11), loader(7, batch_size=3, seed=1), loader(5, seed=2)]
    rows = check(Classifier(), loaders, inference_mode=inference_mode, limit_test_batches=2)
    assert "test/loss/dataloader_idx_2" in rows["a"]


def test_a_module_that_logs_from_its_hooks():
    module, digits = tiny_vgg(), lm.Digits(test_domains=["thick", "noisy"])
    states = {str(seed): {k: v + 0.1 * torch.randn_like(v) for k, v in module.state_dict().items()} for seed in (1, 2)}
    rows = check(module, digits, states, limit_test_batches=2)
    assert {"test/thick/accuracy", "test/noisy/accuracy"} <= set(rows["1"])


def test_names_for_each_loader_that_the_module_gives_itself():
    class Named(Classifier):
        def test_step(self, batch, batch_idx, dataloader_idx):
            loss = F.cross_entropy(self(batch[0]), batch[1])
            self.log(f"loss of {dataloader_idx}", loss, add_dataloader_idx=False)
            self.log("every step", loss, on_step=True, on_epoch=False)

    rows = beside(Named(), CANDIDATES, [loader(11), loader(6)])
    assert list(rows["a"]) == ["loss of 0", "loss of 1"]


def test_a_step_without_the_index_of_the_batch_that_changes_the_batch():
    class InPlace(Classifier):
        def test_step(self, batch):
            batch[0].mul_(-1)
            self.evaluate(batch, "test")

    def collate(samples):
        return tuple(map(torch.stack, zip(*samples, strict=True)))

    check(InPlace(), torch.utils.data.DataLoader(data(), batch_size=4, collate_fn=collate))


def test_random_numbers_are_drawn_as_by_each_alone():
    class Noisy(Classifier):
        def test_step(self, batch, batch_idx):
            self.log("noise", F.cross_entropy(self(batch[0] + torch.randn_like(batch[0])), batch[1]))
            self.drawn = torch.rand(())

    module, shuffled = Noisy(), loader(9, shuffle=True)
    torch.manual_seed(5)
    rows = beside(module, CANDIDATES, shuffled)
    drawn = module.drawn.clone()
    for row, state in CANDIDATES.items():
        torch.manual_seed(5)
        assert rows[row] == alone(module, state, shuffled)
    torch.manual_seed(5)
    quiet().test(module, shuffled, verbose=False)
    assert torch.equal(module.drawn, drawn)


def test_precision_is_the_trainers():
    rows = check(Classifier(), loader(), precision="bf16-mixed")
    assert rows["a"]["test/loss"] != beside(Classifier(), CANDIDATES, loader())["a"]["test/loss"]


def test_tied_weights_stay_tied():
    class Tied(Classifier):
        def __init__(self):
            super().__init__()
            self.again, self.itself = self.head, [self]

    module = Tied()
    state = {**weights(1), "again.weight": weights(1)["head.weight"], "again.bias": weights(1)["head.bias"]}
    check(module, loader(), {"a": state})
    assert module.again is module.head


def plainly(kind, stage: str = "test") -> dict[str, float]:
    """What a plain run of Lightning says of the weights of seed 1 in one process, in a module of their own."""
    trainer, module = quiet(), kind(1)
    return getattr(trainer, stage)(module, batches(), verbose=False)[0]


def forget(kind) -> None:
    """Empty the cache that the instances of a class share."""
    getattr(vars(kind).get("text"), "known", {}).clear()


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_the_module_does_the_row_is_that_of_a_plain_test(kind):
    rows = beside(kind(0), {"other": kind(1).state_dict()}, batches())
    forget(kind)
    assert rows["other"] == plainly(kind)
    assert rows["other"] != rows["current"]
    forget(kind)


@pytest.mark.parametrize("kind", [CompiledMethod, BankOfTheEpoch, PrototypesInSetup])
def test_whatever_the_module_does_on_two_processes(kind):
    expected = plainly(kind)
    found = beside(kind(0), {"other": kind(1).state_dict()}, batches(), **processes(2))["other"]
    assert found == pytest.approx(expected, rel=1e-6)
    assert found["test/accuracy"] == expected["test/accuracy"]


@pytest.mark.parametrize("kind", [CompiledMethod, BankOfTheEpoch, PrototypesInSetup])
def test_whatever_the_module_does_the_validation_of_a_fit_is_that_of_a_plain_one(kind):
    logged = {}

    class Look(Callback):
        def on_validation_end(self, trainer, pl_module):
            logged.update({name: float(value) for name, value in trainer.callback_metrics.items()})

    for seed in (0, 1):
        lm.save_weights(f"{seed}.ckpt", kind(seed).state_dict())
    ends = []
    for callbacks in ([], [MergeEveryEpoch("0.ckpt", ["1.ckpt"], WeightAverage(), name="run"), Look()]):
        module = kind(0)
        quiet(callbacks=callbacks, max_epochs=1, num_sanity_val_steps=0).fit(module, batches(), batches())
        ends.append(module)
    assert all(torch.equal(tensor, ends[1].state_dict()[name]) for name, tensor in ends[0].state_dict().items())
    merged = lm.merge("0.ckpt", {"1": "1.ckpt", "run": ends[0].state_dict()}, WeightAverage()).weights
    module = kind(0)
    module.load_state_dict({key: merged[key.replace("_orig_mod.", "")] for key in module.state_dict()})
    expected = quiet().validate(module, batches(), verbose=False)[0]
    assert all(logged[f"merged/{name}"] == torch.tensor(value) for name, value in expected.items())  # in float32


def test_layers_that_setup_makes_anew_get_the_weights():
    state = LayersOfSetup(1).state_dict()
    torch.save({"state_dict": state, "pytorch-lightning_version": "2.4.0"}, "whole.ckpt")
    module = LayersOfSetup(0)
    rows = beside(module, {"other": state}, batches())
    assert rows["other"] == quiet().test(LayersOfSetup(0), batches(), "whole.ckpt", verbose=False)[0]


def test_everything_of_a_module_is_as_after_its_own_evaluation():
    class Busy(Kind):
        def reach(self):
            self.generator, self.seen, self.hidden = torch.Generator().manual_seed(1), [], [torch.ones(4)]

        def test_step(self, batch, batch_idx):
            self.seen.append({"drawn": torch.rand(2, generator=self.generator), "x": batch[0]})
            self.total = getattr(self, "total", 0) + batch[0].sum()
            with torch.no_grad():
                self.hidden[0].add_(self.head.bias)
            super().test_step(batch, batch_idx)

        def on_test_epoch_end(self):
            self.log("total", self.total)

    one, other = Busy(0), Busy(0)
    quiet().test(one, batches(), verbose=False)
    seen = other.seen
    beside(other, {"a": Kind(1).state_dict(), "b": Kind(2).state_dict()}, batches())
    assert other.seen is seen
    torch.testing.assert_close(other.seen, one.seen, rtol=0, atol=0)
    assert torch.equal(other.total, one.total)
    assert torch.equal(other.hidden[0], one.hidden[0])
    assert torch.equal(other.generator.get_state(), one.generator.get_state())
    assert not {"log", "reset"} & set(vars(other))


def test_callbacks_and_loggers_rest_and_the_trainer_is_as_before():
    class Stops(Classifier):
        def on_validation_epoch_end(self):
            self.trainer.should_stop = float(self.trainer.callback_metrics["val/loss"]) > 1.2
            super().on_validation_epoch_end()

    calls = []

    class Count(Callback):
        def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
            calls.append(batch_idx)

    lm.save_weights("bad.ckpt", {name: 9.0 * tensor for name, tensor in weights(1).items()})
    callback = CompareMerged({"bad": "bad.ckpt"}, stages=["fit"])
    trainer = quiet(callbacks=[callback, Count()], num_sanity_val_steps=0, max_epochs=2)
    trainer.fit(Stops(), loader(), loader())
    assert callback.table[1]["val/loss"] > 1.2
    assert trainer.current_epoch == 2
    assert calls == [*range(6)] * 2
    assert not {"reset"} & set(vars(trainer.fit_loop.epoch_loop.val_loop))


def test_an_error_leaves_the_module_as_it_was():
    class Fails(Kind):
        def test_step(self, batch, batch_idx):
            if torch.equal(self.head.bias, Kind(1).head.bias):
                raise RuntimeError("out of luck")
            super().test_step(batch, batch_idx)

    module, own = Fails(0), Kind(0).state_dict()
    with pytest.raises(RuntimeError, match="out of luck"):
        beside(module, {"other": Kind(1).state_dict()}, batches())
    assert all(torch.equal(tensor, own[name]) for name, tensor in module.state_dict().items())
