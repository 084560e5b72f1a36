"""What becomes of the numbers that are logged with a candidate's weights, on one process and on several."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning_merge.callbacks import CompareMerged
from torchmetrics import MeanMetric

import lightning_merge as lm
from lightning_merge.evaluation.beside.candidate_loop import CandidateNumbers, _Results
from lightning_merge.utilities.processes import Processes
from tests.own_project import Classifier, loader, quiet


class Two(Processes):
    """This process and another one, which has said what it has to say."""

    def __init__(self, other: list[Any]) -> None:
        super().__init__()
        self.count, self.other, self.said = 2, other, []

    def gather(self, value: Any) -> list[Any]:
        self.said.append(value)
        return [value, self.other[len(self.said) - 1] if self.other else value]


def numbers(processes: Processes, *logged: tuple[str, Any, int], **arguments) -> CandidateNumbers:
    """The numbers after these have been logged, each ``(name, value, batch size)``."""
    trainer: Trainer = quiet()
    trainer.strategy._lightning_module = Classifier()
    trainer.state.fn, trainer.testing = TrainerFn.TESTING, True
    results = trainer.test_loop._results = _Results(training=False)
    found = CandidateNumbers(trainer, processes)
    for name, value, size in logged:
        results.log("test_step", name, value, batch_size=size, on_epoch=True, **arguments)
    found.update_eval_epoch_metrics()
    return found


def together(here: list, there: list, **arguments) -> list[dict[str, float]]:
    """The numbers of two processes."""
    said = []
    for logged in (here, there):
        listener = Two([])
        numbers(listener, *logged, **arguments)
        said.append(listener.said)
    pairs = [(here, said[1]), (there, said[0])]
    return [numbers(Two(other), *logged, **arguments).values for logged, other in pairs]


def value(number: float) -> torch.Tensor:
    return torch.tensor(number)


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [("mean", (3 * 2 + 1 * 10) / 4), ("sum", 12), ("max", 10), ("min", 2)],
)
def test_numbers_are_reduced_over_processes_whether_or_not_the_module_asks(reduction, expected):
    for sync_dist in (True, False):
        arguments = {"reduce_fx": reduction, "sync_dist": sync_dist, "sync_dist_fn": None}
        assert together([("a", value(2.0), 3)], [("a", value(10.0), 1)], **arguments) == [{"a": expected}] * 2


def test_a_process_that_has_logged_nothing_has_the_numbers_of_the_others():
    assert together([], [("a", value(2.0), 3)]) == [{"a": 2.0}] * 2


def test_double_precision_stays():
    third = torch.tensor(1 / 3, dtype=torch.float64)
    assert together([("a", third, 1)], [("a", third, 2)]) == [{"a": 1 / 3}] * 2


def test_other_metrics_in_another_process_are_an_error():
    one, two = MeanMetric(), MeanMetric()
    with pytest.raises(lm.MergeError, match=r"Classifier has not logged the same metrics .* \(they are one, two\)"):
        together([("one", one, 1)], [("two", two, 1)])


def test_a_process_that_fails_stops_the_others_once():
    found = None
    with pytest.raises(lm.MergeError, match="Process 1 has failed, and the others stop: out of luck"):
        found = numbers(Two(["out of luck"]))
    assert found is None


STREAM = [*loader(8)]
"""Batches that are given out once."""


def test_a_loader_that_ends_earlier_at_the_second_time():
    class Once:
        def __iter__(self):
            while STREAM:
                yield STREAM.pop()

    lm.save_weights("a.ckpt", Classifier().state_dict())
    with pytest.raises(lm.MergeError, match="not as many batches as the first time; give loaders"):
        quiet(callbacks=[CompareMerged({"a": "a.ckpt"})]).test(Classifier(), Once(), verbose=False)
