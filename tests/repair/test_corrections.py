"""Corrections: folded or inserted they give the same model; they are copied, pickled, saved and loaded."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from lightning_merge.repair import (
    Correction,
    corrected_weights,
    find_sites,
    fold,
    insert,
    load_corrections,
    save_corrections,
)
from lightning_merge.utilities.errors import MergeError
from lightning_merge.utilities.sites import Site, at_sites
from tests.repair.models import VGG, expert_of, images, resnet18, vit


def random_correction(module: nn.Module, x: torch.Tensor, sites: list[Site] | None = None) -> Correction:
    draw = torch.Generator().manual_seed(3)
    channels = {}
    sites = find_sites(module, x) if sites is None else sites
    with torch.no_grad(), at_sites(module, sites, lambda site, a: channels.update({site: a.shape[site.axis]})):
        module.eval()(x)
    scale = {site: 0.8 + 0.4 * torch.rand(channels[site], generator=draw) for site in sites}
    return Correction(scale, {site: 0.1 * torch.randn(channels[site], generator=draw) for site in sites})


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


def test_inserted_corrections_go_along_with_copies_and_pickles():
    module, x = vit(), images(3)
    inserted = insert(module, random_correction(module, x)).eval()
    assert {"blocks.0.input_correction.scale", "blocks.0.correction.shift"} < inserted.state_dict().keys()
    file = io.BytesIO()
    torch.save(inserted, file)
    file.seek(0)
    with torch.no_grad():
        expected = inserted(x)
        for other in (copy.deepcopy(inserted), torch.load(file, weights_only=False)):
            torch.testing.assert_close(other(x), expected, rtol=0, atol=0)
            other.blocks[0].correction.scale.zero_()  # is its own
            assert not torch.allclose(other(x), expected)
            torch.testing.assert_close(inserted(x), expected, rtol=0, atol=0)
        doubled = {name: 2 * tensor for name, tensor in inserted.state_dict().items() if "correction" in name}
        assert not torch.allclose(functional_call(inserted, doubled, (x,)), expected)


def test_corrections_are_read_as_they_were_written():
    vgg, transformer = random_correction(VGG(), images(2)), random_correction(vit(), images(2))
    given = {"a/b": vgg, "a": transformer, "none": Correction()}
    save_corrections("corrections.safetensors", given)
    found = load_corrections("corrections.safetensors")
    assert list(found) == list(given)
    for task, correction in given.items():
        assert found[task].sites == correction.sites
        torch.testing.assert_close(found[task].state, correction.state, rtol=0, atol=0)


def test_what_is_no_correction_is_refused():
    site = Site("0", -1)
    with pytest.raises(MergeError, match="correction of 0 needs a scale and a shift of the same shape"):
        Correction({site: torch.ones(3)}, {})
    module = nn.Sequential(nn.Linear(2, 2))
    one = {site: torch.ones(2)}
    with pytest.raises(MergeError, match="has a 'correction' already"):
        insert(insert(module, Correction(one, one)), Correction(one, one))
    for path, message in (("7", "no part '7'"), ("", "is a Sequential, which would run a correction")):
        other = {Site(path, -1): torch.ones(2)}
        with pytest.raises(MergeError, match=message):
            insert(module, Correction(other, other))
    with pytest.raises(MergeError, match="There is no file"):
        load_corrections("nowhere.safetensors")
    from safetensors.torch import save_file

    save_file({"w": torch.ones(1)}, "weights.safetensors")
    with pytest.raises(MergeError, match="holds no corrections"):
        load_corrections("weights.safetensors")


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
