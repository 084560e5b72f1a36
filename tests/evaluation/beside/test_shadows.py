"""A shadow by itself: the hooks that it calls, and what becomes of the numbers that they log."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torchmetrics import MeanMetric

import lightning_merge as lm
from lightning_merge.evaluation.beside.shadows import Shadow
from lightning_merge.utilities.processes import Processes
from tests.own_project import quiet

WEIGHTS = {"layer.weight": torch.tensor([[2.0]])}


class Doubling(LightningModule):
    """Multiplies by a weight, in the original 1 and in the shadow 2, and notes which of its hooks are called."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.layer.weight)
        self.calls: list[tuple[Any, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, 1)`` to ``(N, 1)``."""
        return self.layer(x)

    def on_test_batch_start(self, batch, batch_idx, dataloader_idx=0):
        self.calls.append(("start", batch_idx, dataloader_idx))

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.calls.append(("step", batch_idx, dataloader_idx))
        return self(batch).sum()

    def on_test_batch_end(self, outputs, batch, batch_idx, dataloader_idx=0):
        self.calls.append(("end", outputs, batch_idx, dataloader_idx))

    def on_test_epoch_end(self):
        self.calls.append(("epoch end",))


class Others(Processes):
    """This process, and another one that has logged what another shadow has."""

    def __init__(self, other: Shadow | None = None) -> None:
        super().__init__()
        self.sent: Any = None
        self.others = []
        if other is not None:
            listener = Others()
            other.logged(listener)
            self.others = [listener.sent]

    def gather(self, value: Any) -> list[Any]:
        self.sent = value
        return [value, *self.others]


def trainer(stage: str = "testing") -> Trainer:
    """A trainer that is within an evaluation."""
    trainer = quiet()
    setattr(trainer, stage, True)
    return trainer


def shadow(module: LightningModule, batches=(), stage: str = "testing") -> Shadow:
    """A shadow that has gone through batches: tensors, or pairs of a tensor and the index of its loader."""
    context = trainer(stage)
    shadow = Shadow(context, module, WEIGHTS)
    shadow.keep = context  # a LightningModule may hold on to its trainer weakly
    for i, batch in enumerate(batches):
        values, loader = batch if isinstance(batch, tuple) else (batch, None)
        shadow.run_batch(values, i, loader)
    return shadow


def ones(n: int, value: float = 1.0) -> Tensor:
    return torch.full((n, 1), value)


def logging(log) -> LightningModule:
    """A module whose step is ``log(module, outputs)``."""

    class Logging(Doubling):
        def test_step(self, batch, batch_idx, dataloader_idx=0):
            log(self, self(batch))

    return Logging()


def test_hooks_are_called_in_order_with_the_other_weights():
    module = Doubling()
    run = shadow(module, [ones(3), ones(2, 5.0)])
    run.end()
    assert run.module.calls == [
        ("start", 0, 0),
        ("step", 0, 0),
        ("end", 6.0, 0, 0),
        ("start", 1, 0),
        ("step", 1, 0),
        ("end", 20.0, 1, 0),
        ("epoch end",),
    ]
    assert module.calls == []
    assert module.layer.weight.item() == 1.0


def test_the_index_of_a_loader_is_passed_on():
    run = shadow(Doubling(), [(ones(1), 0), (ones(1), 1)])
    assert [call[-1] for call in run.module.calls] == [0, 0, 0, 1, 1, 1]


def test_a_step_may_do_without_the_index_of_the_batch():
    class Short(Doubling):
        def test_step(self, batch):
            self.log("sum", self(batch).sum())

    assert shadow(Short(), [ones(3)]).logged(Processes()) == {"sum": 6.0}


def test_within_a_validation_the_hooks_of_validation_are_called():
    class Validated(Doubling):
        def validation_step(self, batch, batch_idx):
            self.log("mean", self(batch).mean())

        def on_validation_epoch_end(self):
            self.calls.append(("validated",))

    run = shadow(Validated(), [ones(3)], stage="validating")
    run.end()
    assert run.module.calls == [("validated",)]
    assert run.logged(Processes()) == {"mean": 2.0}


def test_a_batch_is_not_changed():
    class InPlace(Doubling):
        def test_step(self, batch, batch_idx):
            batch["x"].mul_(-1)
            self.log("sum", batch["x"].sum(), batch_size=3)

    batch = {"x": ones(3), "names": ["a", "b", "c"]}
    assert shadow(InPlace(), [batch]).logged(Processes()) == {"sum": -3.0}
    assert torch.equal(batch["x"], ones(3))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, (3 * 2 + 1 * 10) / 4),  # outputs are 2 in three samples and 10 in one
        ({"batch_size": 1}, (2 + 10) / 2),
        ({"reduce_fx": torch.mean}, (3 * 2 + 1 * 10) / 4),
        ({"reduce_fx": "avg"}, (3 * 2 + 1 * 10) / 4),
        ({"reduce_fx": "SUM"}, 12),
        ({"reduce_fx": torch.sum}, 12),
        ({"reduce_fx": "max"}, 10),
        ({"reduce_fx": min}, 2),
        ({"on_step": True, "on_epoch": True}, (3 * 2 + 1 * 10) / 4),
    ],
)
def test_numbers_are_reduced_over_batches(arguments, expected):
    module = logging(lambda self, outputs: self.log("value", outputs.mean(), **arguments))
    assert shadow(module, [ones(3), ones(1, 5.0)]).logged(Processes()) == {"value": expected}


def test_whatever_is_a_number_is_logged():
    def log(self, outputs):
        self.log("float", 0.5)
        self.log("int", 3)
        self.log("one entry", outputs[:1, 0])
        self.log_dict({"first": 1.0, "second": torch.tensor(2)})

    logged = shadow(logging(log), [ones(3), ones(2)]).logged(Processes())
    assert logged == {"float": 0.5, "int": 3.0, "one entry": 2.0, "first": 1.0, "second": 2.0}
    assert {type(value) for value in logged.values()} == {float}


def test_numbers_have_the_precision_in_which_lightning_logs():
    module = logging(lambda self, outputs: self.log("third", outputs.mean()))
    logged = shadow(module, [ones(1, 0.5), ones(1, 0.0), ones(1, 0.0)]).logged(Processes())
    assert logged["third"] == float(torch.tensor(1 / 3, dtype=torch.float32)) != 1 / 3


def test_what_is_logged_for_steps_alone_is_left_out():
    module = logging(lambda self, outputs: self.log("step", outputs.mean(), on_step=True, on_epoch=False))
    assert shadow(module, [ones(3)]).logged(Processes()) == {}


def test_a_logged_tensor_is_taken_as_it_is_at_that_moment():
    def log(self, outputs):
        self.log("before", outputs[0, 0])
        outputs.mul_(-1)

    assert shadow(logging(log), [ones(3)]).logged(Processes()) == {"before": 2.0}


def test_at_the_end_there_is_neither_a_batch_nor_a_loader():
    class Ending(Doubling):
        def test_step(self, batch, batch_idx, dataloader_idx):
            self.log("mean", self(batch).mean(), add_dataloader_idx=False)

        def on_test_epoch_end(self):
            self.log("mean", 6.0)  # counts as one sample
            self.log("end", 1.0)

    run = shadow(Ending(), [(ones(3), 1)])
    run.end()
    assert run.logged(Processes()) == {"mean": (3 * 2 + 6) / 4, "end": 1.0}


def test_every_loader_has_names_of_its_own():
    def log(self, outputs):
        self.log("mean", outputs.mean())
        self.log("total", outputs.sum(), reduce_fx="sum", add_dataloader_idx=False)

    run = shadow(logging(log), [(ones(3), 0), (ones(1, 5.0), 0), (ones(2, 3.0), 1)])
    assert run.logged(Processes()) == {"mean/dataloader_idx_0": 4.0, "total": 28.0, "mean/dataloader_idx_1": 6.0}


class Measuring(Doubling):
    """Logs a metric."""

    def __init__(self, name: str = "metric") -> None:
        super().__init__()
        self.name, self.metric = name, MeanMetric()

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.metric(self(batch))
        self.log("loss", 1.0)
        self.log(self.name, self.metric)


def test_a_metric_is_the_shadows_own():
    module = Measuring()
    module.metric.update(100.0)
    run = shadow(module, [ones(3), ones(1, 5.0)])
    assert run.logged(Processes()) == {"loss": 1.0, "metric": 4.0}
    assert module.metric.compute() == 100.0


def test_a_metric_of_one_loader_does_not_see_the_next():
    logged = shadow(Measuring(), [(ones(3), 0), (ones(1, 5.0), 1)]).logged(Processes())
    assert logged["metric/dataloader_idx_0"] == 2.0


class TestProcesses:
    @pytest.mark.parametrize(
        ("reduction", "expected"),
        [("mean", (3 * 2 + 1 * 10) / 4), ("sum", 12), ("max", 10), ("min", 2)],
    )
    def test_numbers_are_reduced_over_processes(self, reduction, expected):
        module = logging(lambda self, outputs: self.log("value", outputs.mean(), reduce_fx=reduction))
        here, there = shadow(module, [ones(3)]), shadow(module, [ones(1, 5.0)])
        assert here.logged(Others(there)) == {"value": expected}
        assert there.logged(Others(here)) == {"value": expected}

    def test_a_process_without_a_batch_has_the_numbers_of_the_others(self):
        module = logging(lambda self, outputs: self.log("value", outputs.mean()))
        here, there = shadow(module), shadow(module, [ones(3)])
        assert here.logged(Others(there)) == {"value": 2.0}

    def test_names_are_in_the_order_in_which_the_first_process_logs(self):
        here = shadow(logging(lambda self, _: self.log_dict({"b": 1.0, "a": 2.0})), [ones(1)])
        there = shadow(logging(lambda self, _: self.log_dict({"a": 4.0, "c": 5.0, "b": 3.0})), [ones(1)])
        assert list(here.logged(Others(there)).items()) == [("b", 2.0), ("a", 3.0), ("c", 5.0)]

    def test_other_metrics_in_another_process_are_an_error(self):
        here, there = shadow(Measuring("one"), [ones(1)]), shadow(Measuring("two"), [ones(1)])
        with pytest.raises(lm.MergeError, match=r"Measuring has not logged the same metrics .* \(they are one, two\)"):
            here.logged(Others(there))
