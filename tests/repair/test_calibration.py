"""Statistics of activations, and the affine maps that correct them, against NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from lightning_merge.repair.calibration import Calibration, Goals, correct_in_turn, known_problems, observe
from lightning_merge.repair.moments import Moments
from lightning_merge.utilities.errors import MergeError
from lightning_merge.utilities.sites import Site

SITE, SECOND = Site("0", -1), Site("2", -1)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).double()


def batches(count: int = 3) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(7 + i, 4, generator=draw, dtype=torch.float64) for i in range(count)]


def test_moments_are_those_of_all_batches_together():
    module = net()
    moments = observe(module, module.state_dict(), [SITE, SECOND], Calibration("photo", batches()))
    x = torch.cat(batches())
    for site, activations in ((SITE, module[0](x)), (SECOND, module(x))):
        values = activations.detach().numpy()
        assert moments[site].count == len(x)
        np.testing.assert_allclose(moments[site].mean.numpy(), values.mean(0), rtol=1e-12)
        np.testing.assert_allclose(moments[site].variance.numpy(), values.var(0), rtol=1e-10)


def test_other_weights_than_the_modules_own_are_run():
    module, other = net(), {name: 2 * tensor for name, tensor in net().state_dict().items()}
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    moments = observe(module, other, [SITE], Calibration("photo", batches()))
    np.testing.assert_allclose(
        moments[SITE].mean.numpy(), 2 * module[0](torch.cat(batches())).detach().numpy().mean(0), rtol=1e-12
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_a_correction_brings_a_site_to_its_goal():
    std, mean = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64), torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64)
    values = np.random.default_rng(0).normal(3, 0.7, (50, 3))
    now = Moments.of(torch.from_numpy(values))
    scale, shift = Goals({SITE: mean}, {SITE: std}, eps=1e-12).affine(SITE, now)
    corrected = values * scale.numpy() + shift.numpy()
    np.testing.assert_allclose(corrected.mean(0), mean.numpy(), atol=1e-9)
    np.testing.assert_allclose(corrected.std(0), std.numpy(), rtol=1e-9)


def test_gains_are_limited_and_dead_channels_only_shifted():
    goals = {"mean": {SITE: torch.ones(2).double()}, "std": {SITE: torch.full((2,), 100.0).double()}}
    now = Moments.known(10, torch.zeros(2).double(), torch.tensor([1.0, 0.0]).double())
    scale, shift = Goals(**goals).affine(SITE, now)
    assert scale.tolist() == [10.0, 1.0]
    assert shift.tolist() == [1.0, 1.0]
    scale, _ = Goals(**goals, max_gain=math.inf).affine(SITE, now)
    np.testing.assert_allclose(scale.numpy(), [100 / math.sqrt(1 + 1e-5), 100 / math.sqrt(1e-5)], rtol=1e-12)
    with pytest.raises(MergeError, match="must be positive"):
        Goals(**goals, max_gain=0)


def test_a_site_sees_those_before_it_corrected():
    module, (batch,) = net(), batches(1)
    twice = correct_in_turn(
        module,
        module.state_dict(),
        [SITE, SECOND],
        lambda site, now: (torch.full_like(now.mean, 2.0), torch.ones_like(now.mean)),
        Calibration("photo", [batch]),
    )
    first = module[0](batch)
    np.testing.assert_allclose(twice[SITE].mean.numpy(), first.detach().numpy().mean(0), rtol=1e-12)
    behind = module[2](module[1](2 * first + 1)).detach().numpy()
    np.testing.assert_allclose(twice[SECOND].mean.numpy(), behind.mean(0), rtol=1e-12)


def test_what_cannot_be_used_is_named():
    module = net()
    bad = [batches(1)[0] * float("nan")]
    with pytest.raises(MergeError, match="activations at 0 are not finite on the data of photo"):
        observe(module, module.state_dict(), [SITE], Calibration("photo", bad))
    known = {SITE: Moments.of(torch.randn(5, 2).double())}
    problems = known_problems(known, module, module.state_dict(), [SITE, SECOND], Calibration("photo", batches()))
    assert len(problems) == 2
    assert "have 2 channels at the site '0', where the model has 3" in " ".join(problems)
    assert "lack the site '2'" in " ".join(problems)
