"""Folded into weights, or inserted where that would not be exact, corrections give the same model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from lightning_merge.repair import Correction, corrected_weights, fold, insert
from lightning_merge.repair.folding import Home
from lightning_merge.utilities.sites import Site
from tests.repair.models import VGG, expert_of, images, random_correction, resnet18, vit

SCALE, SHIFT = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([1.0, 0.0, -3.0])


class TestFormulas:
    """The parameters with a correction in them, computed by hand."""

    @pytest.mark.parametrize("shape", [(3,), (3, 4), (3, 4, 2), (3, 4, 2, 2)])
    def test_at_an_output_rows_are_scaled(self, shape):
        weight, bias = torch.randn(shape), torch.randn(3)
        folded = Home("w", "b").fold({"w": weight, "b": bias}, SCALE, SHIFT)
        for channel in range(3):
            torch.testing.assert_close(folded["w"][channel], SCALE[channel] * weight[channel])
            torch.testing.assert_close(folded["b"][channel], SCALE[channel] * bias[channel] + SHIFT[channel])

    def test_at_an_input_columns_are_scaled(self):
        weight, bias = torch.randn(5, 3), torch.randn(5)
        folded = Home("w", "b", is_input=True).fold({"w": weight, "b": bias}, SCALE, SHIFT)
        torch.testing.assert_close(folded["w"], weight @ torch.diag(SCALE))
        torch.testing.assert_close(folded["b"], bias + weight @ SHIFT)

    def test_half_precision_is_rounded_once(self):
        weights = {"w": torch.randn(3, 4).half(), "b": torch.randn(3).half()}
        scale, shift = SCALE.double() / 3, SHIFT.double() / 7
        folded = Home("w", "b").fold(weights, scale, shift)
        assert torch.equal(folded["w"], (weights["w"].double() * scale[:, None]).half())
        assert torch.equal(folded["b"], (weights["b"].double() * scale + shift).half())


def test_the_given_weights_stay_as_they_are_and_others_are_the_same_tensors():
    module = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3))
    weights = module.state_dict()
    before = copy.deepcopy(weights)
    folded, left = fold(module, weights, Correction({Site("0", -1): SCALE}, {Site("0", -1): SHIFT}))
    torch.testing.assert_close(weights, before, rtol=0, atol=0)
    assert not left
    assert {name for name in weights if folded[name] is not weights[name]} == {"0.weight", "0.bias"}


def test_what_a_headless_model_lacks_is_not_folded():
    """Of a part whose parameters are not among the weights the correction stays one that is inserted."""
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3))
    body = {name: tensor for name, tensor in module.state_dict().items() if name.startswith("0")}
    sites = [Site("0", -1), Site("1", -1)]
    folded, left = fold(module, body, Correction(dict.fromkeys(sites, SCALE), dict.fromkeys(sites, SHIFT)))
    assert folded.keys() == body.keys()
    assert left.sites == [Site("1", -1)]


def test_corrections_of_the_output_and_the_input_of_one_layer():
    module, x = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3)), torch.randn(7, 2)
    sites = [Site("0", -1), Site("1", -1, input=True), Site("1", -1)]
    correction = Correction({site: SCALE / (i + 1) for i, site in enumerate(sites)}, dict.fromkeys(sites, SHIFT))
    folded, left = fold(module, module.state_dict(), correction)
    assert not left
    with torch.no_grad():
        hidden = module[0](x) * SCALE + SHIFT
        hidden = hidden * SCALE / 2 + SHIFT
        expected = module[1](hidden) * SCALE / 3 + SHIFT
        torch.testing.assert_close(functional_call(module, folded, (x,)), expected, rtol=1e-4, atol=1e-5)


def efficientnet() -> nn.Module:
    import timm

    return timm.create_model("efficientnet_lite0", num_classes=3, in_chans=1)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    flat = nn.Sequential(nn.Flatten(1), nn.Unflatten(1, (8, 8)), nn.Linear(8, 8))
    return nn.Sequential(flat, nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, 2))


@pytest.mark.parametrize(
    ("build", "kept"),
    [
        (VGG, ["unit"]),
        (resnet18, [f"layer{i}.{j}" for i in range(1, 5) for j in range(2)]),
        (vit, ["blocks.0:input", "blocks.0", "blocks.1"]),
        (efficientnet, None),
        (encoder, []),
    ],
)
def test_folded_and_inserted_corrections_are_the_same_model(build, kept):
    module, x = build(), images(6, 32 if build in (resnet18, efficientnet) else 8)
    weights = expert_of(module, 1, 0.1)
    correction = random_correction(module, x)
    with torch.no_grad(), correction.applied(module.eval()):
        expected = functional_call(module, weights, (x,))
        plain = functional_call(copy.deepcopy(module), weights, (x,))
    inserted = insert(module, correction)
    inserted.load_state_dict(weights | correction.state, strict=True)
    rest = fold(module, weights, correction)[1]
    repaired = insert(module, rest)
    repaired.load_state_dict(corrected_weights(module, weights, correction), strict=True)
    if kept is not None:
        assert [site.name for site in rest.sites] == kept
    else:
        assert 0 < len(rest) < len(correction) / 2
    with torch.no_grad():
        torch.testing.assert_close(inserted(x), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(repaired(x), expected, rtol=1e-4, atol=1e-5)
        uncorrected = functional_call(insert(module, Correction()), weights, (x,))
    assert (uncorrected - expected).abs().max() > 1e-3
    assert plain.shape == expected.shape


def test_what_has_no_bias_or_shares_its_weights_keeps_its_correction():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other, self.bare = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
            self.other.weight = self.one.weight
            self.norm, self.odd = nn.LayerNorm(4), Odd(4)

        def forward(self, x):
            return self.odd(self.norm(self.bare(self.other(self.one(x)))))

    class Odd(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x).relu()

    module = Tied()
    x = torch.randn(5, 4)
    sites = [Site(path, -1) for path in ("one", "other", "bare", "norm", "odd")]
    correction = random_correction(module, x, sites)
    _, rest = fold(module, module.state_dict(), correction)
    assert [site.name for site in rest.sites] == ["one", "other", "bare", "odd"]


def test_an_input_of_a_linear_layer_is_folded_and_one_of_a_padded_convolution_is_not():
    module, x = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Flatten(), nn.Linear(128, 3)), images(4)
    correction = random_correction(module, x, [Site("0", 1, input=True), Site("2", -1, input=True)])
    folded, rest = fold(module, module.state_dict(), correction)
    assert [site.name for site in rest.sites] == ["0:input"]
    with torch.no_grad():
        with correction.applied(module):
            expected = module(x)
        with rest.applied(module):
            torch.testing.assert_close(functional_call(module, folded, (x,)), expected, rtol=1e-5, atol=1e-5)


def test_running_statistics_are_not_folded():
    module = resnet18()
    folded, _ = fold(module, module.state_dict(), random_correction(module, images(2, 32)))
    for name in ("bn1.running_mean", "bn1.running_var", "bn1.num_batches_tracked"):
        assert torch.equal(folded[name], module.state_dict()[name])
    assert not torch.equal(folded["bn1.weight"], module.state_dict()["bn1.weight"])


class Standardised(nn.Conv2d):
    """A convolution whose weight is standardised: it does not scale with it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias, padding=1)


class Twins(nn.Module):
    """One layer under two names, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(5, 5)
        self.b = self.a
        self.head = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.b(self.a(x).relu()).relu()).flatten(1)


def conv(layer: nn.Module, *more: nn.Module) -> nn.Module:
    return nn.Sequential(layer, *more, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


@pytest.mark.parametrize(
    ("module", "site", "shape"),
    [
        (conv(nn.Conv2d(3, 8, 3, padding=1), nn.LayerNorm([8, 8, 8])), Site("1", 1), (4, 3, 8, 8)),
        (conv(Standardised(3, 8, 3)), Site("0", 1), (4, 3, 8, 8)),
        (conv(nn.Conv2d(3, 8, 3, padding=1)), Site("0", -1), (4, 3, 8, 8)),
        (Twins(), Site("a", 1), (4, 5, 5)),
        (Twins(), Site("a", -1), (4, 5, 5)),
        (nn.Sequential(nn.Linear(5, 5), nn.LayerNorm(5), nn.Flatten(), nn.Linear(25, 3)), Site("1", 1), (4, 5, 5)),
        (nn.Sequential(nn.Linear(5, 5), nn.Flatten(), nn.Linear(25, 3)), Site("0", 1), (4, 5, 5)),
        (nn.Sequential(nn.ReLU(), nn.Linear(5, 5), nn.Flatten(), nn.Linear(25, 3)), Site("1", 1, True), (4, 5, 5)),
    ],
)
def test_what_a_weight_cannot_hold_is_not_folded(module, site, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    width = shape[1] if shape[1] == 5 else 8
    correction = Correction({site: torch.linspace(0.5, 2, width)}, {site: torch.linspace(-1, 1, width)})
    with correction.applied(module), torch.no_grad():
        wanted = module(x)
    _, rest = fold(module, module.state_dict(), correction)
    inserted = insert(module, rest)
    inserted.load_state_dict(corrected_weights(module, module.state_dict(), correction))
    with torch.no_grad():
        torch.testing.assert_close(inserted(x), wanted)
