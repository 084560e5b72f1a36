"""Activations of a merged model beside an expert's, against the formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import lightning_merge as lm
from lightning_merge.analysis import compare_activations, embed, loss_and_accuracy
from lightning_merge.utilities.sites import Site


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 3))


def two_models() -> tuple[nn.Sequential, dict, dict]:
    torch.manual_seed(3)
    merged, expert = network().state_dict(), network().state_dict()
    expert["1.bias"] = torch.randn(4)
    return network(), merged, expert


IMAGES = torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(0))
SITES = [Site("1"), Site("4"), Site("4", input=True)]


def direct(module: nn.Sequential, weights: dict, upto: int) -> torch.Tensor:
    """The activation behind the first ``upto`` layers."""
    own = network()
    own.load_state_dict({**module.state_dict(), **weights})
    with torch.no_grad():
        return own.eval()[:upto](IMAGES).double()


def test_distances_and_variances_are_the_formulas():
    module, merged, expert = two_models()
    module.train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    found = compare_activations(module, merged, expert, list(IMAGES.split(4)), SITES)
    assert [record.site for record in found] == SITES
    for record, upto in zip(found, (2, 5, 4), strict=True):
        a, b = direct(module, merged, upto), direct(module, expert, upto)
        distance = torch.stack([(x - y).norm() for x, y in zip(a, b, strict=True)]).mean()
        assert record.distance == pytest.approx(distance.item(), rel=1e-5)
        size = torch.stack([y.norm() for y in b]).mean()
        assert record.relative_distance == pytest.approx((distance / size).item(), rel=1e-5)
        over = (0, 2, 3) if a.dim() == 4 else (0,)
        var_a, var_b = a.var(over, unbiased=False), b.var(over, unbiased=False)
        assert record.variance_ratio == pytest.approx((var_a.mean() / var_b.mean()).item(), rel=1e-5)
        ratios = (var_a / var_b)[var_b > 0]
        assert record.median_variance_ratio == pytest.approx(ratios.median().item(), rel=1e-5)
    assert module.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_a_model_does_not_differ_from_itself():
    module, merged, _ = two_models()
    (record,) = compare_activations(module, merged, merged, [(IMAGES, torch.zeros(10))], [Site("1")])
    assert (record.distance, record.relative_distance) == (0, 0)
    assert (record.variance_ratio, record.median_variance_ratio) == (1, 1)


def test_a_corrected_module_runs_the_merged_model():
    module, merged, expert = two_models()

    class Doubled(nn.BatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    corrected = network()
    corrected[1] = Doubled(4)
    plain, doubled = (
        compare_activations(module, merged, expert, [IMAGES], [Site("1")], merged_module=other)[0]
        for other in (None, corrected)
    )
    assert doubled.variance_ratio == pytest.approx(4 * plain.variance_ratio, rel=1e-5)


def test_channels_that_do_not_vary_never_make_nan():
    module, merged, expert = two_models()
    still = {**expert, "1.weight": torch.zeros(4)}
    (collapsed,) = compare_activations(module, still, expert, [IMAGES], [Site("1")])
    assert (collapsed.variance_ratio, collapsed.median_variance_ratio) == (0, 0)
    (both,) = compare_activations(module, still, still, [IMAGES], [Site("1")])
    assert (both.variance_ratio, both.median_variance_ratio, both.relative_distance) == (1, 1, 0)
    (grown,) = compare_activations(module, merged, still, [IMAGES], [Site("1")])
    assert grown.variance_ratio == math.inf
    partly = {**expert, "1.weight": torch.tensor([0.0, 1, 1, 1])}
    (mixed,) = compare_activations(module, expert, partly, [IMAGES], [Site("1")])
    assert mixed.median_variance_ratio == pytest.approx(1)


def test_what_cannot_work_is_said_in_a_sentence():
    module, merged, expert = two_models()
    with pytest.raises(lm.MergeError, match="no part '9'"):
        compare_activations(module, merged, expert, [IMAGES], [Site("9")])
    with pytest.raises(lm.MergeError, match="hold no sample"):
        compare_activations(module, merged, expert, [], [Site("1")])
    with pytest.raises(lm.MergeError, match=r"'4.bias' has shape \(5,\) in the expert"):
        compare_activations(module, merged, {"4.bias": torch.zeros(5)}, [IMAGES], [Site("1")])


def test_embeddings_are_activations_averaged_over_the_places():
    module, merged, _ = two_models()
    labels = torch.arange(10)
    batches = list(zip(IMAGES.split(4), labels.split(4), strict=True))
    features, found = embed(module, merged, batches, Site("1"))
    torch.testing.assert_close(features, direct(module, merged, 2).mean(dim=(2, 3)).float())
    assert torch.equal(found, labels)
    features, found = embed(module, merged, [IMAGES], Site("4", input=True))
    torch.testing.assert_close(features, direct(module, merged, 4).float())
    assert found is None


class Tied(nn.Module):
    """A layer under two names, another one with its weight, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(5, 5)
        self.b, self.c, self.idle = self.a, nn.Linear(5, 5), nn.Linear(5, 5)
        self.c.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.a(x).relu()))


def test_tied_and_half_precision_weights_are_run_and_the_module_is_as_before():
    module, data = Tied(), [(torch.randn(4, 5), torch.arange(4))]
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    other = {name: torch.full_like(tensor, 0.1).half() for name, tensor in before.items()}
    assert loss_and_accuracy(module, data, other)[0] == pytest.approx(math.log(5))
    assert loss_and_accuracy(module, data, before) == loss_and_accuracy(module, data, {})
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    with pytest.raises(lm.MergeError, match="idle was not reached"):
        embed(module, {}, data, Site("idle"))
