"""A linear probe of features."""

from __future__ import annotations

import pytest
import torch

import lightning_merge as lm
from lightning_merge.analysis import embed, linear_probe
from lightning_merge.utilities.sites import Site


def clusters(count: int, seed: int, apart: float = 6.0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    return torch.randn(count, 4, generator=draw) + apart * torch.eye(3, 4)[labels], labels


def test_tells_classes_apart_where_there_is_something_to_tell():
    assert linear_probe(clusters(60, 0), clusters(90, 1)) > 0.98
    x, _ = clusters(300, 2, apart=0)
    y = torch.randint(0, 3, (300,), generator=torch.Generator().manual_seed(5))
    assert 0.2 < linear_probe((x[:150], y[:150]), (x[150:], y[150:])) < 0.5  # chance


def test_is_the_classifier_that_minimizes_the_documented_loss():
    (x, y), test = clusters(60, 0, apart=1.0), clusters(200, 1, apart=1.0)
    mean, deviation = x.double().mean(dim=0), x.double().std(dim=0, correction=0)
    weight, bias = (torch.zeros(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 4), (3,)))
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        logits = (x - mean) / deviation @ weight.T + bias
        value = torch.nn.functional.cross_entropy(logits, y) + 0.05 / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    hits = (((test[0] - mean) / deviation @ weight.T + bias).argmax(dim=1) == test[1]).double().mean()
    assert linear_probe((x, y), test, decay=0.05) == pytest.approx(float(hits), abs=0.0051)
    assert 0.4 < hits < 0.95


def test_of_embeddings():
    module = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    weights = module.state_dict()
    train, test = (embed(module, weights, [clusters(60, seed)], Site("1", -1)) for seed in (0, 1))
    assert linear_probe(train, test) > 0.9


def test_what_was_fitted_to_is_not_measured_on():
    given = clusters(30, 0)
    with pytest.raises(lm.MergeError, match="30 of the 30 features to test on are among those to train on"):
        linear_probe(given, given)
    x, y = clusters(30, 1)
    assert linear_probe(given, (torch.cat([x, given[0][:3]]), torch.cat([y, given[1][:3]]))) > 0.5  # duplicates


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ((torch.randn(4, 3), None), clusters(9, 1), "to train on have no labels"),
        (clusters(9, 0), (torch.randn(4, 4), torch.zeros(3)), r"to test on must be \(N, channels\)"),
        (clusters(9, 0), (torch.full((2, 4), torch.nan), torch.zeros(2)), "to test on hold values that are not finite"),
        (clusters(9, 0), (torch.randn(2, 3), torch.zeros(2)), "of 4 and of 3 channels"),
        ((torch.randn(4, 4), torch.ones(4)), clusters(9, 1), "at least two classes"),
    ],
)
def test_what_cannot_be_probed(train, test, message):
    with pytest.raises(lm.MergeError, match=message):
        linear_probe(train, test)


def test_arguments():
    with pytest.raises(lm.MergeError, match="got 0 and 10"):
        linear_probe(clusters(9, 0), clusters(9, 1), decay=0, steps=10)
