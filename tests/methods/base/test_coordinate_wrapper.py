"""What wrappers that merge in other coordinates share."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from lightning_merge.methods import EMR, Context, CoreSpace, KnOTS, TaskArithmetic
from lightning_merge.methods.base.coordinate_wrapper import CoordinateWrapper


@dataclass(frozen=True)
class Doubled(CoordinateWrapper):
    """The coordinates are twice the parameter."""

    def merge_coordinates(self, deltas, context, rule):
        return rule(2 * deltas, context) / 2


@pytest.mark.parametrize("cls", [KnOTS, CoreSpace])
def test_who_merges_in_coordinates(cls):
    method = cls(EMR())
    assert isinstance(method, CoordinateWrapper)
    assert method.dtype == torch.float64
    assert method.per_task


def test_a_wrapper_must_say_how_it_merges():
    with pytest.raises(TypeError, match="merge_coordinates"):
        CoordinateWrapper(TaskArithmetic())


def test_the_method_inside_merges_and_keeps_a_model_for_each_task():
    deltas = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
    context = Context(survey=torch.ones(2))
    method = Doubled(EMR())
    assert torch.equal(method.update(deltas, context), EMR().update(deltas, context))
    for expert in (0, 1):
        assert torch.equal(method.task_update(deltas, expert, context), EMR().task_update(deltas, expert, context))
    assert not torch.equal(method.task_update(deltas, 0, context), method.task_update(deltas, 1, context))
