"""The plane of two task vectors, and the accuracies that are measured on it."""

from __future__ import annotations

import pytest
import torch

import lightning_merge as lm
from lightning_merge.analysis import landscape, normalized_accuracy, task_plane


def models() -> tuple[dict, dict, dict]:
    def draw() -> dict:
        return {
            "w": torch.randn(4, 3),
            "b": torch.randn(3),
            "bn.running_var": torch.rand(3),
            "count": torch.tensor(3),
        }

    return draw(), draw(), draw()


def flat(weights: dict) -> torch.Tensor:
    return torch.cat([weights["w"].flatten(), weights["b"]])


def test_base_experts_and_task_arithmetic_lie_where_the_plane_says():
    base, one, two = models()
    plane = task_plane(base, one, two)
    assert plane.expert_2 == (1, 0)
    assert plane.expert_1[1] == 1
    for point, weights in (((0, 0), base), (plane.expert_1, one), (plane.expert_2, two)):
        torch.testing.assert_close(flat(plane.at(*point)), flat(weights))
    added = flat(base) + 0.4 * (flat(one) + flat(two) - 2 * flat(base))
    torch.testing.assert_close(flat(plane.at(*plane.task_arithmetic(0.4))), added)
    merged = lm.merge(base, [one, two], lm.methods.TaskArithmetic(scale=0.4)).weights
    torch.testing.assert_close(flat(plane.at(*plane.task_arithmetic(0.4))), flat(merged))
    assert flat(plane.u).dot(flat(plane.v)).item() == pytest.approx(0, abs=1e-4)
    far = plane.at(-1.5, 2.5)
    assert torch.equal(far["bn.running_var"], base["bn.running_var"])
    assert far["count"] == 3


def test_the_grid_holds_average_and_worst_of_the_normalized_accuracies():
    base, one, two = models()
    plane = task_plane(base, one, two)

    def evaluate(weights, task):
        goal = {"first": one, "second": two}[task]
        return 0.8 / (1 + (flat(weights) - flat(goal)).square().sum().item())

    found = landscape(plane, evaluate, {"first": 0.8, "second": 0.4}, points=3, span=(-1.0, 1.0))
    assert found.xs.tolist() == found.ys.tolist() == [-1, 0, 1]
    for row, y in enumerate((-1, 0, 1)):
        for column, x in enumerate((-1, 0, 1)):
            first, second = (evaluate(plane.at(x, y), task) for task in ("first", "second"))
            assert found.accuracies["second"][row, column] == pytest.approx(second)
            assert found.average[row, column] == pytest.approx((first / 0.8 + second / 0.4) / 2)
            assert found.worst[row, column] == pytest.approx(min(first / 0.8, second / 0.4))
    assert found.average[1, 2] > 1  # the second expert itself, whose accuracy is twice what it is divided by
    assert found.best(found.average) == (1, 0)


def test_planes_that_do_not_exist():
    base, one, two = models()
    with pytest.raises(lm.MergeError, match="second expert is the base itself"):
        task_plane(base, one, base)
    with pytest.raises(lm.MergeError, match="on one line"):
        task_plane(base, {**base, "w": base["w"] + 1}, {**base, "w": base["w"] - 2})
    with pytest.raises(lm.MergeError, match="second model lacks 'b'"):
        task_plane(base, one, {name: tensor for name, tensor in two.items() if name != "b"})
    with pytest.raises(lm.MergeError, match="at least two points"):
        landscape(task_plane(base, one, two), lambda *_: 1.0, {"task": 1.0}, points=1)


def test_normalized_accuracy():
    found = normalized_accuracy({"a": 0.45, "b": 0.2}, {"a": 0.9, "b": 0.8})
    assert found.by_task == {"a": pytest.approx(0.5), "b": pytest.approx(0.25)}
    assert (found.average, found.worst) == (pytest.approx(0.375), pytest.approx(0.25))
    with pytest.raises(lm.MergeError, match="'b' cannot be normalized: its expert has none"):
        normalized_accuracy({"a": 0.4, "b": 0.2}, {"a": 0.9, "b": 0.0})
    with pytest.raises(lm.MergeError, match="no task"):
        normalized_accuracy({}, {})
