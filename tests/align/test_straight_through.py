"""Refinement of a permutation by the loss halfway."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from lightning_merge.align import Permutation, Symmetries, match_weights, refine_straight_through
from lightning_merge.utilities.errors import MergeError
from tests.align.models import same, same_orders

AXES = {
    "0.weight": ["A", None],
    "0.bias": ["A"],
    "2.weight": ["B", "A"],
    "2.bias": ["B"],
    "4.weight": [None, "B"],
}


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))


@pytest.fixture(scope="module")
def digits():
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        module = network()
        optimizer = torch.optim.Adam(module.parameters(), 2e-3)
        for _ in range(200):
            rows = torch.randint(1000, (128,))
            optimizer.zero_grad()
            F.cross_entropy(module(x[rows]), y[rows]).backward()
            optimizer.step()
        models.append({name: tensor.clone() for name, tensor in module.state_dict().items()})
    symmetries = Symmetries.from_axes(AXES, {name: tensor.shape for name, tensor in models[0].items()})
    return x, y, models, symmetries


def test_the_loss_halfway_falls_and_nothing_else_changes(digits):
    x, y, (a, b), symmetries = digits
    module = network()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    batches = [(x[i : i + 100], y[i : i + 100]) for i in range(0, 1000, 100)]

    def halfway(permutation, rows):
        weights = {name: (a[name] + tensor) / 2 for name, tensor in permutation.apply(b).items()}
        return float(F.cross_entropy(functional_call(module, weights, (x[rows],)), y[rows]))

    start = match_weights(a, b, symmetries)
    found = refine_straight_through(module, a, b, symmetries, batches, start, epochs=8, learning_rate=0.1)
    again = refine_straight_through(module, a, b, symmetries, batches, start, epochs=8, learning_rate=0.1)
    assert halfway(found, slice(0, 1000)) < 0.95 * halfway(start, slice(0, 1000))
    assert halfway(found, slice(1000, None)) < halfway(start, slice(1000, None))
    assert same_orders(found, again)
    torch.testing.assert_close(
        functional_call(module, found.apply(b), (x[:50],)), functional_call(module, b, (x[:50],))
    )
    assert same(module.state_dict(), before)
    assert module.training
    assert all(parameter.grad is None for parameter in module.parameters())


def test_the_start_is_kept_if_nothing_is_better(digits):
    x, y, (a, _), symmetries = digits
    planted = Permutation.random(symmetries, 1)
    start = planted.inverse()
    found = refine_straight_through(
        network(), a, planted.apply(a), symmetries, [(x[:100], y[:100])], start, epochs=2, learning_rate=0.5
    )
    assert same_orders(found, start)


def test_refusals(digits):
    x, y, (a, b), symmetries = digits
    start = Permutation.identity(symmetries)
    for batches, message in (
        ([], "hold no batch"),
        ([x[:10]], "has no labels"),
        ([(x[:10],)], "has no labels"),
        (iter([(x[:10], y[:10])]), "can be read only once"),
    ):
        with pytest.raises(MergeError, match=message):
            refine_straight_through(network(), a, b, symmetries, batches, start)
    with pytest.raises(MergeError, match="epochs=0"):
        refine_straight_through(network(), a, b, symmetries, [(x, y)], start, epochs=0)
    wrong = {**b, "2.bias": torch.zeros(31)}
    with pytest.raises(MergeError, match=r"'2.bias' has shape \(31,\) in the other model"):
        refine_straight_through(network(), a, wrong, symmetries, [(x, y)], start)


def test_running_statistics_are_no_weights_to_train():
    """A network with BatchNorm: its statistics are halfway, too, and have no gradient."""
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)) for _ in range(2)]
    a, b = ({name: tensor.clone() for name, tensor in net.state_dict().items()} for net in nets)
    names = {f"1.{name}": ["A"] for name in ("weight", "bias", "running_mean", "running_var")}
    axes = {"0.weight": ["A", None], "0.bias": ["A"], "3.weight": [None, "A"], **names}
    symmetries = Symmetries.from_axes(axes, {name: tensor.shape for name, tensor in a.items()})
    batches = [(torch.randn(32, 6), torch.randint(3, (32,))) for _ in range(3)]
    start = match_weights(a, b, symmetries)
    refined = refine_straight_through(nets[0], a, b, symmetries, batches, start, epochs=3, learning_rate=0.5)

    def halfway(permutation):
        weights = {name: (a[name] + tensor) / 2 for name, tensor in permutation.apply(b).items()}
        weights["1.num_batches_tracked"] = a["1.num_batches_tracked"]
        net = nets[0].eval()
        return sum(float(F.cross_entropy(functional_call(net, weights, (x,)), y)) for x, y in batches)

    assert halfway(refined) <= halfway(start)
