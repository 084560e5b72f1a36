"""The line between two models, against what git-re-basin's authors' own code found."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from torch import nn

import lightning_merge as lm
from lightning_merge.analysis import interpolate, loss_and_accuracy, loss_barrier
from tests import toys


class MLP(nn.Module):
    """The golden files' model."""

    def __init__(self) -> None:
        super().__init__()
        for i, (wide, out) in enumerate([(64, 48), (48, 40), (40, 32), (32, 10)]):
            setattr(self, f"layer{i}", nn.Linear(wide, out))

    def forward(self, images):
        x = images.flatten(1)
        for i in range(3):
            x = getattr(self, f"layer{i}")(x).relu()
        return self.layer3(x)


@pytest.fixture(scope="module")
def golden():
    return toys.golden("nonlocal_grb_digits_mlp"), json.loads(
        (toys.GOLDEN / "nonlocal_grb_digits_mlp.json").read_text()
    )


@pytest.mark.parametrize(("other", "run"), [("B", "naive"), ("Bperm", "aligned")])
def test_golden_barriers(golden, other, run):
    groups, numbers = golden
    batches = list(zip(groups["x_test"][""].split(200), groups["y_test"][""].split(200), strict=True))
    found = loss_barrier(groups["A"], groups[other], partial(loss_and_accuracy, MLP(), batches), points=11)
    assert found.barrier == pytest.approx(numbers[f"barrier_{run}"], abs=1e-4)
    torch.testing.assert_close(found.losses.float(), groups[f"curve_{run}"][""][:, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.accuracies.float(), groups[f"curve_{run}"][""][:, 1])
    assert found.accuracies[5] == pytest.approx(numbers[f"acc_mid_{run}"])
    assert found.accuracies[[0, -1]].tolist() == pytest.approx([numbers["acc_A"], numbers["acc_B"]])
    chord = found.accuracies[0] + found.lambdas * (found.accuracies[-1] - found.accuracies[0])
    assert found.accuracy_barrier == pytest.approx((chord - found.accuracies).max().item())


def test_a_line_downhill_has_no_barrier():
    found = loss_barrier({"w": torch.tensor(2.0)}, {"w": torch.tensor(0.0)}, lambda m: (m["w"].item() ** 2, 0.5))
    assert found.barrier == found.accuracy_barrier == 0
    assert len(found.losses) == 25


def test_buffers_on_the_line():
    torch.manual_seed(1)
    a, b = ({k: v.clone() for k, v in nn.BatchNorm1d(3).state_dict().items()} for _ in range(2))
    b["running_var"] *= 5
    b["num_batches_tracked"] += 7
    b["weight"] = b["weight"].half()
    found = interpolate(a, b, 0.25)
    assert found["running_var"].tolist() == [2.0] * 3
    assert found["num_batches_tracked"] == 0
    assert found["weight"].dtype == torch.float32
    assert a["running_var"].tolist() == [1.0] * 3


def test_what_cannot_work_is_said_in_a_sentence():
    a = {"w": torch.zeros(2)}
    with pytest.raises(lm.MergeError, match="points must be at least 3"):
        loss_barrier(a, a, lambda _: (0, 0), points=2)
    with pytest.raises(lm.MergeError, match=r"'w' has shape \(2,\) in the first model, \(3,\) in the second"):
        loss_barrier(a, {"w": torch.zeros(3)}, lambda _: (0, 0))
    with pytest.raises(lm.MergeError, match="second model lacks 'w'"):
        loss_barrier(a, {}, lambda _: (0, 0))
    for batches, message in (
        ([], "hold no sample"),
        ([torch.zeros(2, 64)], "no labels"),
        ([{"image": 1}], "holds a dict"),
    ):
        with pytest.raises(lm.MergeError, match=message):
            loss_and_accuracy(MLP(), batches, {})
    with pytest.raises(lm.MergeError, match="'head' of the model is no parameter of the module"):
        loss_and_accuracy(MLP(), [], {"head": torch.zeros(1)})
